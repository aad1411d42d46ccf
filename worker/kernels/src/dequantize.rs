//! Stored weights to f32, one row at a time, and whether a row holds what is no number.
//!
//! Each value is computed as the reference programs compute it (spec E.6), so it has their bits. Products do not come
//! through here: they multiply the integers of quantized blocks.

use half::{bf16, f16};

use crate::dtype::DType;

/// Values that the nibbles of IQ4_NL and IQ4_XS stand for.
pub(crate) const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the E2M1 values that the nibbles of MXFP4 stand for.
pub(crate) const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Exponents (E8M0) from which the greatest E2M1 value is beyond f32, up to 255, which stands for NaN.
const MXFP4_BEYOND_F32: u8 = 253;

/// Writes the values of whole blocks of a type into `out`.
///
/// # Panics
/// If `out` and the bytes do not hold the same number of values.
pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(dtype.row_bytes(out.len()), Some(bytes.len()), "{} values of {dtype}", out.len());
    match dtype {
        DType::F32 => widen(bytes, out, f32::from_le_bytes),
        DType::F16 => widen(bytes, out, |bytes| f16::from_le_bytes(bytes).to_f32()),
        DType::BF16 => widen(bytes, out, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        DType::F8E4M3 => widen(bytes, out, |[byte]| f8e4m3_to_f32(byte)),
        _ => {
            let blocks = bytes.chunks_exact(dtype.block_bytes());
            for (block, out) in blocks.zip(out.chunks_exact_mut(dtype.block_elements())) {
                dequantize_block(dtype, block, out);
            }
        }
    }
}

/// Whether whole blocks of a type hold a NaN or an infinity: every value of a dense type, only the scales of a
/// quantized one. Fast, without early exit.
pub fn holds_non_finite(dtype: DType, bytes: &[u8]) -> bool {
    /// Exponent bits of f16: all set in a NaN or infinity.
    const F16: u16 = 0x7c00;
    /// Exponent bits of bf16 (and of the upper half of f32).
    const BF16: u16 = 0x7f80;
    let bad16 = |value: &[u8], exponent: u16| u16::from_le_bytes([value[0], value[1]]) & exponent == exponent;
    // `fold` with | has no early exit, so the compiler can use vectors.
    let any = |bad: bool, next: bool| bad | next;
    let blocks = || bytes.chunks_exact(dtype.block_bytes());
    match dtype {
        DType::F32 => bytes.chunks_exact(4).map(|value| bad16(&value[2..], BF16)).fold(false, any),
        DType::BF16 => bytes.chunks_exact(2).map(|value| bad16(value, BF16)).fold(false, any),
        DType::F16 => bytes.chunks_exact(2).map(|value| bad16(value, F16)).fold(false, any),
        DType::F8E4M3 => bytes.iter().map(|&value| value & 0x7f == 0x7f).fold(false, any),
        DType::MXFP4 => blocks().map(|block| block[0] >= MXFP4_BEYOND_F32).fold(false, any),
        _ => dtype.half_scales().iter().any(|&at| blocks().map(|block| bad16(&block[at..], F16)).fold(false, any)),
    }
}

/// Elements of N bytes to f32.
fn widen<const N: usize>(bytes: &[u8], out: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (&element, out) in elements.iter().zip(out) {
        *out = convert(element);
    }
}

/// An 8-bit float (see [`DType::F8E4M3`]), exactly.
pub(crate) fn f8e4m3_to_f32(byte: u8) -> f32 {
    if byte & 0x7f == 0x7f {
        return f32::NAN.copysign(if byte & 0x80 == 0 { 1.0 } else { -1.0 });
    }
    // The same bits at f16's places are 2⁻⁸ of the value: its exponent is biased by 15 and not by 7.
    let bits = u16::from(byte & 0x80) << 8 | u16::from(byte & 0x7f) << 7;
    f16::from_bits(bits).to_f32() * 256.0
}

/// Half of the power of two that an E8M0 byte stands for; exact also where that is subnormal.
pub(crate) fn half_e8m0(byte: u8) -> f32 {
    f32::from_bits(if byte < 2 { 0x0020_0000 << byte } else { u32::from(byte - 1) << 23 })
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Value i of the 32 whose nibbles lie in 16 bytes: the low nibbles come first.
fn nibble(packed: &[u8], index: usize) -> u8 {
    packed[index % 16] >> (index / 16 * 4) & 15
}

/// Bit `index` of a run of bytes.
fn bit(bits: &[u8], index: usize) -> u8 {
    bits[index / 8] >> (index % 8) & 1
}

/// One quantized block.
fn dequantize_block(dtype: DType, block: &[u8], out: &mut [f32]) {
    match dtype {
        DType::Q2_K | DType::Q3_K | DType::Q4_K | DType::Q5_K | DType::Q6_K | DType::IQ4_XS => {
            for (index, out) in out.chunks_exact_mut(16).enumerate() {
                dequantize_run(dtype, block, index, out);
            }
        }
        _ => {
            let scale = if dtype == DType::MXFP4 { half_e8m0(block[0]) } else { half_at(block, 0) };
            for (index, out) in out.iter_mut().enumerate() {
                *out = match dtype {
                    DType::Q4_0 => (f32::from(nibble(&block[2..], index)) - 8.0) * scale,
                    DType::Q4_1 => f32::from(nibble(&block[4..], index)) * scale + half_at(block, 2),
                    DType::Q5_0 => (f32::from(nibble(&block[6..], index) | bit(&block[2..], index) << 4) - 16.0) * scale,
                    DType::Q5_1 => f32::from(nibble(&block[8..], index) | bit(&block[4..], index) << 4) * scale + half_at(block, 2),
                    DType::IQ4_NL => f32::from(IQ4_VALUES[usize::from(nibble(&block[2..], index))]) * scale,
                    DType::MXFP4 => f32::from(MXFP4_VALUES[usize::from(nibble(&block[1..], index))]) * scale,
                    _ => f32::from(block[2 + index] as i8) * scale,
                };
            }
        }
    }
}

/// Sixteen values of a block of 256: run `run` of 16.
fn dequantize_run(dtype: DType, block: &[u8], run: usize, out: &mut [f32]) {
    // Which 32 values the run belongs to, and where in them it begins.
    let (part, start) = (run / 2, run % 2 * 16);
    let (scale, minimum) = run_scale(dtype, block, run);
    for (index, out) in out.iter_mut().enumerate() {
        let at = start + index;
        // Two bits at a time: 128 values to 32 bytes. Four bits at a time: 64 values to 32 bytes.
        let two_bits = |bits: &[u8]| bits[part / 4 * 32 + at] >> (part % 4 * 2) & 3;
        let four_bits = |bits: &[u8]| bits[part / 2 * 32 + at] >> (part % 2 * 4) & 15;
        let value = match dtype {
            DType::Q2_K => i32::from(two_bits(&block[16..])),
            DType::Q3_K => i32::from(two_bits(&block[32..])) - if block[at] >> part & 1 == 1 { 0 } else { 4 },
            DType::Q4_K => i32::from(four_bits(&block[16..])),
            DType::Q5_K => i32::from(four_bits(&block[48..]) | (block[16 + at] >> part & 1) << 4),
            DType::Q6_K => {
                // Nibbles of 128 values lie in 64 bytes, the upper halves being values 64 to 127.
                let low = block[part / 4 * 64 + part % 2 * 32 + at] >> (part % 4 / 2 * 4) & 15;
                i32::from(low | two_bits(&block[128..]) << 4) - 32
            }
            _ => i32::from(IQ4_VALUES[usize::from(nibble(&block[8 + part * 16..], at))]),
        };
        *out = scale * value as f32 - minimum;
    }
}

/// Scale and minimum of run `run` of 16 values. Both are exact: 11 bits of d times at most 8.
fn run_scale(dtype: DType, block: &[u8], run: usize) -> (f32, f32) {
    match dtype {
        DType::Q2_K => (half_at(block, 80) * f32::from(block[run] & 15), half_at(block, 82) * f32::from(block[run] >> 4)),
        DType::Q3_K => {
            let scales = &block[96..108];
            let low = scales[run % 8] >> (run / 8 * 4) & 15;
            let high = scales[8 + run % 4] >> (run / 4 * 2) & 3;
            (half_at(block, 108) * (f32::from(low | high << 4) - 32.0), 0.0)
        }
        DType::Q4_K | DType::Q5_K => {
            let (scales, part) = (&block[4..16], run / 2);
            let (scale, minimum) = if part < 4 {
                (scales[part] & 63, scales[part + 4] & 63)
            } else {
                let both = scales[part + 4];
                (both & 15 | scales[part - 4] >> 6 << 4, both >> 4 | scales[part] >> 6 << 4)
            };
            (half_at(block, 0) * f32::from(scale), half_at(block, 2) * f32::from(minimum))
        }
        DType::Q6_K => (half_at(block, 208) * f32::from(block[192 + run] as i8), 0.0),
        _ => {
            let part = run / 2;
            let low = block[4 + part / 2] >> (part % 2 * 4) & 15;
            let high = u16::from_le_bytes([block[2], block[3]]) >> (part * 2) & 3;
            (half_at(block, 0) * (f32::from(low) + f32::from(high) * 16.0 - 32.0), 0.0)
        }
    }
}
