//! Activations as signed bytes, 32 to a block: the left factor of products with quantized weights.
//!
//! For a block with greatest magnitude a: scale d = a/127, values round(x · (127/a)) to nearest even, d kept
//! rounded to f16; for types with a minimum also s = f16(d · Σ values), of d before it is rounded. This is what
//! llama.cpp's x86 code computes (`quantize_row_q8_0`, `quantize_row_q8_1`), so that results can be compared closely.
//! Types of 256 values per block take the sums unrounded, as they do there, but keep a scale for every 32 values. Only
//! a block with a below [`LEAST_MAGNITUDE`] counts as zeros: its 127/a could overflow, and its d is 0 in f16 anyway. A
//! block with an infinity or a NaN has the scale NaN: it would come out as a plausible number otherwise.

use crate::error::Result;
use crate::lanes::{LANES, Lanes, kernel};
use crate::memory::AlignedBuffer;

/// Values per block.
pub(crate) const BLOCK: usize = 32;

/// Blocks whose greatest magnitude is below this quantize to zeros. From here on 127/a and a/127 are normal numbers.
const LEAST_MAGNITUDE: f32 = 127.0 * f32::MIN_POSITIVE;

/// Quantized activations of one product call, token by token. Reused between calls.
pub(crate) struct Activations {
    /// Blocks per token.
    pub(crate) blocks: usize,
    /// `[tokens][blocks · 32]`
    pub(crate) values: AlignedBuffer<i8>,
    /// `[tokens][blocks]`: the scale d, rounded to f16.
    pub(crate) scales: AlignedBuffer<f32>,
    /// `[tokens][blocks]`: d before it is rounded · Σ values, the product rounded to f16 (for Q4_1 and Q5_1).
    pub(crate) rounded_sums: AlignedBuffer<f32>,
    /// `[tokens][blocks]`: d as in `scales` · Σ values, the product not rounded to f16 (for types of 256).
    pub(crate) sums: AlignedBuffer<f32>,
    /// `[tokens][blocks]`: Σ of the first 16 values in the lower half, of the last 16 in the upper.
    pub(crate) half_sums: AlignedBuffer<i32>,
}

impl Activations {
    pub(crate) fn empty() -> Self {
        Activations {
            blocks: 0,
            values: AlignedBuffer::empty(),
            scales: AlignedBuffer::empty(),
            rounded_sums: AlignedBuffer::empty(),
            sums: AlignedBuffer::empty(),
            half_sums: AlignedBuffer::empty(),
        }
    }

    /// Makes room for `tokens` rows of `columns` (a multiple of 32) values.
    pub(crate) fn reserve(&mut self, tokens: usize, columns: usize) -> Result<()> {
        const WHAT: &str = "quantized activations";
        self.blocks = columns / BLOCK;
        self.values.reserve(tokens * columns, WHAT)?;
        self.scales.reserve(tokens * self.blocks, WHAT)?;
        self.rounded_sums.reserve(tokens * self.blocks, WHAT)?;
        self.sums.reserve(tokens * self.blocks, WHAT)?;
        self.half_sums.reserve(tokens * self.blocks, WHAT)
    }

    /// Where token `token` goes.
    pub(crate) fn row(&mut self, token: usize) -> QuantizedRow {
        let start = token * self.blocks;
        QuantizedRow {
            values: self.values[start * BLOCK..(start + self.blocks) * BLOCK].as_mut_ptr(),
            scales: self.scales[start..start + self.blocks].as_mut_ptr(),
            rounded_sums: self.rounded_sums[start..start + self.blocks].as_mut_ptr(),
            sums: self.sums[start..start + self.blocks].as_mut_ptr(),
            half_sums: self.half_sums[start..start + self.blocks].as_mut_ptr(),
            blocks: self.blocks,
        }
    }
}

/// Destination of one token.
#[derive(Clone, Copy)]
pub(crate) struct QuantizedRow {
    pub(crate) values: *mut i8,
    pub(crate) scales: *mut f32,
    pub(crate) rounded_sums: *mut f32,
    pub(crate) sums: *mut f32,
    pub(crate) half_sums: *mut i32,
    pub(crate) blocks: usize,
}

impl QuantizedRow {
    /// The row `tokens` further on.
    ///
    /// # Safety
    /// The result must lie within the same allocations.
    pub(crate) unsafe fn offset(self, tokens: usize) -> Self {
        let blocks = tokens * self.blocks;
        // SAFETY: the caller's contract.
        unsafe {
            QuantizedRow {
                values: self.values.add(blocks * BLOCK),
                scales: self.scales.add(blocks),
                rounded_sums: self.rounded_sums.add(blocks),
                sums: self.sums.add(blocks),
                half_sums: self.half_sums.add(blocks),
                blocks: self.blocks,
            }
        }
    }
}

// SAFETY: only pointers; every dereference has its own safety comment.
unsafe impl Send for QuantizedRow {}
// SAFETY: as above.
unsafe impl Sync for QuantizedRow {}

/// # Safety
/// `x` is readable for blocks · 32 values, `row` writable.
#[inline(always)]
unsafe fn quantize_body<L: Lanes>(x: *const f32, row: QuantizedRow) {
    for block in 0..row.blocks {
        // SAFETY: block < row.blocks.
        unsafe {
            let low = L::load(x.add(block * BLOCK));
            let high = L::load(x.add(block * BLOCK + LANES));
            // Zero, but NaN where a value is infinite or NaN: what is not a number stays one, by its scale, on every path.
            if low.mul_add(L::splat(0.0), high.mul(L::splat(0.0))).sum().is_nan() {
                poison::<L>(row, block);
                continue;
            }
            let greatest = low.abs().max(high.abs()).greatest();
            let (scale, inverse) = if greatest < LEAST_MAGNITUDE { (0.0, 0.0) } else { (greatest / 127.0, 127.0 / greatest) };
            let inverse = L::splat(inverse);
            let low = low.mul(inverse).round_ties_even();
            let high = high.mul(inverse).round_ties_even();
            low.store_i8(row.values.add(block * BLOCK));
            high.store_i8(row.values.add(block * BLOCK + LANES));
            // Small integers: exact in f32, and a half's in 16 bits.
            let (first, last) = (low.sum(), high.sum());
            let sum = first + last;
            *row.half_sums.add(block) = (last as i32) << 16 | (first as i32 & 0xffff);
            let rounded = half::f16::from_f32(scale).to_f32();
            *row.scales.add(block) = rounded;
            *row.sums.add(block) = rounded * sum;
            *row.rounded_sums.add(block) = half::f16::from_f32(scale * sum).to_f32();
        }
    }
}

/// Makes a block whose every product is NaN.
///
/// # Safety
/// `row` is writable and `block` one of its blocks.
#[inline(always)]
unsafe fn poison<L: Lanes>(row: QuantizedRow, block: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        L::splat(0.0).store_i8(row.values.add(block * BLOCK));
        L::splat(0.0).store_i8(row.values.add(block * BLOCK + LANES));
        *row.half_sums.add(block) = 0;
        *row.scales.add(block) = f32::NAN;
        *row.sums.add(block) = f32::NAN;
        *row.rounded_sums.add(block) = f32::NAN;
    }
}

kernel! {
    /// Quantizes one token's row.
    ///
    /// # Safety
    /// `x` is readable for blocks · 32 values, `row` writable.
    pub(crate) unsafe fn quantize_row(x: *const f32, row: QuantizedRow) = quantize_body
}
