//! Integer dot products with AVX-512 VNNI: 16 rows' blocks in 8 registers, unpacked once for all tokens.

// Indices name the rows, tokens and vectors of a register tile; several arrays share them.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{BlockDots, Format, RowBlocks, TokenBlocks, load_halves};
use crate::lanes::{Avx512, LANES, Lanes};
use crate::quantize::BLOCK;

/// 16 rows' integers. Nibbles: registers 0..4 hold the low halves and 4..8 the high halves of rows
/// (r, r + 4, r + 8, r + 12). Bytes, made unsigned by adding 128: registers 0..4 hold rows (i, i + 4), 4..8 rows
/// (8 + i, 12 + i). So arranged, the sums come out in row order.
type Registers = [__m512i; 8];

/// 16 bytes each of rows r, r + 4, r + 8, r + 12, given row r.
///
/// # Safety
/// AVX-512 F is available; the four rows are readable.
#[inline(always)]
unsafe fn load_four(row: *const u8, stride: usize) -> __m512i {
    // SAFETY: the caller's contract.
    unsafe {
        let four = 4 * stride;
        let a = _mm512_castsi128_si512(_mm_loadu_si128(row.cast()));
        let b = _mm512_inserti32x4::<1>(a, _mm_loadu_si128(row.add(four).cast()));
        let c = _mm512_inserti32x4::<2>(b, _mm_loadu_si128(row.add(2 * four).cast()));
        _mm512_inserti32x4::<3>(c, _mm_loadu_si128(row.add(3 * four).cast()))
    }
}

/// 32 bytes each of rows r and r + 4, given row r.
///
/// # Safety
/// AVX-512 F is available; the two rows are readable.
#[inline(always)]
unsafe fn load_two(row: *const u8, stride: usize) -> __m512i {
    // SAFETY: the caller's contract.
    unsafe {
        let a = _mm512_castsi256_si512(_mm256_loadu_si256(row.cast()));
        _mm512_inserti64x4::<1>(a, _mm256_loadu_si256(row.add(4 * stride).cast()))
    }
}

/// Splits packed nibbles into low and high halves.
///
/// # Safety
/// AVX-512 BW is available.
#[inline(always)]
unsafe fn split_nibbles(packed: [__m512i; 4]) -> Registers {
    // SAFETY: the caller's contract.
    unsafe {
        let mask = _mm512_set1_epi8(15);
        let mut registers = [_mm512_setzero_si512(); 8];
        for r in 0..4 {
            registers[r] = _mm512_and_si512(packed[r], mask);
            registers[4 + r] = _mm512_and_si512(_mm512_srli_epi16::<4>(packed[r]), mask);
        }
        registers
    }
}

/// Scales and minima of 16 rows: together one 32-bit word at the head of each row's block.
///
/// # Safety
/// As [`BlockDots::load_rows`], for a format with minima.
#[inline(always)]
unsafe fn load_headers(weights: *const u8, stride: usize) -> (Avx512, Avx512) {
    let mut words = [0_u32; LANES];
    for (row, word) in words.iter_mut().enumerate() {
        // SAFETY: the caller's contract.
        *word = unsafe { weights.add(row * stride).cast::<u32>().read_unaligned() };
    }
    // SAFETY: 16 words.
    unsafe {
        let words = _mm512_loadu_si512(words.as_ptr().cast());
        let scale = _mm512_cvtepi32_epi16(words);
        let minimum = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(words));
        (Avx512(_mm512_cvtph_ps(scale)), Avx512(_mm512_cvtph_ps(minimum)))
    }
}

/// In each 128-bit lane: the sums of a's, b's, c's and d's four partial sums.
///
/// # Safety
/// AVX-512 F is available.
#[inline(always)]
unsafe fn sum_quads(a: __m512i, b: __m512i, c: __m512i, d: __m512i) -> __m512i {
    // SAFETY: the caller's contract.
    unsafe {
        let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
    }
}

/// Sums of nibble products.
///
/// # Safety
/// As [`BlockDots::dots`].
#[inline(always)]
unsafe fn nibble_dot<F: Format>(rows: &Registers, values: *const i8, sum_of_values: *const i32) -> __m512i {
    // SAFETY: the caller's contract.
    unsafe {
        let first = _mm512_broadcast_i32x4(_mm_loadu_si128(values.cast()));
        let second = _mm512_broadcast_i32x4(_mm_loadu_si128(values.add(16).cast()));
        let mut partial = [_mm512_setzero_si512(); 4];
        for r in 0..4 {
            partial[r] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), rows[r], first);
            partial[r] = _mm512_dpbusd_epi32(partial[r], rows[4 + r], second);
        }
        let sum = sum_quads(partial[0], partial[1], partial[2], partial[3]);
        if F::OFFSET == 0 {
            return sum;
        }
        _mm512_add_epi32(sum, _mm512_set1_epi32(-F::OFFSET * *sum_of_values))
    }
}

/// Sums of byte products; −128 · Σ values undoes what made the rows unsigned, exactly.
///
/// # Safety
/// As [`BlockDots::dots`].
#[inline(always)]
unsafe fn byte_dot(rows: &Registers, values: *const i8, sum_of_values: *const i32) -> __m512i {
    // SAFETY: the caller's contract.
    unsafe {
        let values = _mm512_broadcast_i64x4(_mm256_loadu_si256(values.cast()));
        let mut partial = [_mm512_setzero_si512(); 8];
        for (partial, rows) in partial.iter_mut().zip(rows) {
            *partial = _mm512_dpbusd_epi32(_mm512_setzero_si512(), *rows, values);
        }
        let lower = sum_quads(partial[0], partial[1], partial[2], partial[3]);
        let upper = sum_quads(partial[4], partial[5], partial[6], partial[7]);
        let even = _mm512_shuffle_i32x4::<0b10_00_10_00>(lower, upper);
        let odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(lower, upper);
        _mm512_add_epi32(_mm512_add_epi32(even, odd), _mm512_set1_epi32(-128 * *sum_of_values))
    }
}

const _: () = assert!(LANES == 16, "the register arrangement is for 16 rows");

impl BlockDots for Avx512 {
    type Values = Registers;

    #[inline(always)]
    unsafe fn load_rows<F: Format>(weights: *const u8, stride: usize) -> RowBlocks<Self> {
        // SAFETY: the caller's contract.
        unsafe {
            let values = if F::NIBBLES {
                let mut packed = [_mm512_setzero_si512(); 4];
                for r in 0..4 {
                    packed[r] = load_four(weights.add(r * stride + F::VALUES), stride);
                }
                split_nibbles(packed)
            } else {
                let flip = _mm512_set1_epi8(-128);
                let mut registers = [_mm512_setzero_si512(); 8];
                for i in 0..4 {
                    let row = weights.add(i * stride + F::VALUES);
                    registers[i] = _mm512_xor_si512(load_two(row, stride), flip);
                    registers[4 + i] = _mm512_xor_si512(load_two(row.add(8 * stride), stride), flip);
                }
                registers
            };
            let (scale, minimum) =
                if F::MINIMUM { load_headers(weights, stride) } else { (load_halves(weights, stride), Self::splat(0.0)) };
            RowBlocks { values, scale, minimum }
        }
    }

    #[inline(always)]
    unsafe fn dots<F: Format, const M: usize>(rows: &Registers, tokens: TokenBlocks) -> [Self; M] {
        // SAFETY: the caller's contract.
        unsafe {
            let mut dots = [Self::splat(0.0); M];
            for (m, dots) in dots.iter_mut().enumerate() {
                let values = tokens.values.add(m * tokens.blocks * BLOCK);
                let sum = tokens.sums.add(m * tokens.blocks);
                let integers = if F::NIBBLES { nibble_dot::<F>(rows, values, sum) } else { byte_dot(rows, values, sum) };
                *dots = Avx512(_mm512_cvtepi32_ps(integers));
            }
            dots
        }
    }
}
