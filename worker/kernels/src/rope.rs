//! Rotary positions: tabulated cosines and sines, and the rotation of a row's heads.

use crate::backend::{RopeParams, RopeStyle};
use crate::error::{KernelError, Result};
use crate::lanes::{LANES, Lanes, kernel};
use crate::memory::AlignedBuffer;

/// Cosines and sines of all positions: row p is [cos of R/2 frequencies, sin of R/2 frequencies].
pub struct CpuRopeTable {
    pub(crate) style: RopeStyle,
    pub(crate) half: usize,
    pub(crate) positions: usize,
    values: AlignedBuffer<f32>,
}

impl CpuRopeTable {
    /// Tabulates. The angle is position · frequency rounded to f32, as the reference implementations have it;
    /// its cosine and sine are computed in f64 and rounded.
    pub(crate) fn new(params: &RopeParams) -> Result<Self> {
        let half = params.rotary_dim / 2;
        if !params.rotary_dim.is_multiple_of(2) || params.inverse_frequencies.len() != half {
            return Err(KernelError::Shape {
                operation: "rope_table",
                operand: "inverse_frequencies",
                actual: params.inverse_frequencies.len(),
                expected: half,
            });
        }
        let length = params.max_positions.saturating_mul(params.rotary_dim);
        let mut values = AlignedBuffer::zeroed(length, "the table of rotary positions")?;
        for (position, row) in values.chunks_exact_mut(params.rotary_dim.max(1)).enumerate() {
            let (cosines, sines) = row.split_at_mut(half);
            for (index, &frequency) in params.inverse_frequencies.iter().enumerate() {
                let angle = f64::from(position as f32 * frequency);
                cosines[index] = angle.cos() as f32 * params.attention_factor;
                sines[index] = angle.sin() as f32 * params.attention_factor;
            }
        }
        Ok(CpuRopeTable { style: params.style, half, positions: params.max_positions, values })
    }

    /// Cosines, then sines, of a position.
    pub(crate) fn row(&self, position: usize) -> &[f32] {
        &self.values[position * 2 * self.half..(position + 1) * 2 * self.half]
    }
}

/// One row's heads.
#[derive(Clone, Copy)]
pub(crate) struct RopeRow {
    pub(crate) x: *mut f32,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    /// First rotated column of a head.
    pub(crate) offset: usize,
    /// R/2 cosines, then R/2 sines.
    pub(crate) table: *const f32,
    pub(crate) half: usize,
    pub(crate) style: RopeStyle,
}

/// # Safety
/// `x` is writable for heads · head_dim elements, `table` readable for 2 · half, and offset + 2 · half ≤ head_dim.
#[inline(always)]
unsafe fn rope_body<L: Lanes>(row: RopeRow) {
    for head in 0..row.heads {
        // SAFETY: all offsets stay below heads · head_dim and 2 · half.
        unsafe {
            let x = row.x.add(head * row.head_dim + row.offset);
            match row.style {
                RopeStyle::Neox => rotate_halves::<L>(x, row.table, row.half),
                RopeStyle::Gptj => rotate_neighbours(x, row.table, row.half),
            }
        }
    }
}

/// Pairs (i, i + half).
///
/// # Safety
/// `x` is writable and `table` readable for 2 · half elements.
#[inline(always)]
unsafe fn rotate_halves<L: Lanes>(x: *mut f32, table: *const f32, half: usize) {
    let mut start = 0;
    while start < half {
        let count = LANES.min(half - start);
        // SAFETY: start + count ≤ half.
        unsafe {
            let (low, high) = (x.add(start), x.add(half + start));
            let cos = L::load_partial(table.add(start), count);
            let sin = L::load_partial(table.add(half + start), count);
            let (a, b) = (L::load_partial(low, count), L::load_partial(high, count));
            let negated = L::splat(0.0).sub(b.mul(sin));
            a.mul_add(cos, negated).store_partial(low, count);
            b.mul_add(cos, a.mul(sin)).store_partial(high, count);
        }
        start += count;
    }
}

/// Pairs (2i, 2i + 1), by the same formula.
///
/// # Safety
/// `x` is writable and `table` readable for 2 · half elements.
#[inline(always)]
unsafe fn rotate_neighbours(x: *mut f32, table: *const f32, half: usize) {
    for pair in 0..half {
        // SAFETY: 2 · pair + 1 < 2 · half.
        unsafe {
            let (cos, sin) = (*table.add(pair), *table.add(half + pair));
            let (a, b) = (*x.add(2 * pair), *x.add(2 * pair + 1));
            *x.add(2 * pair) = a.mul_add(cos, 0.0 - b * sin);
            *x.add(2 * pair + 1) = b.mul_add(cos, a * sin);
        }
    }
}

kernel! {
    /// Rotates 2 · half values of every head of one row, from its column `offset`.
    ///
    /// # Safety
    /// `x` is writable for heads · head_dim elements, `table` readable for 2 · half, and offset + 2 · half ≤
    /// head_dim.
    pub(crate) unsafe fn rope_row(row: RopeRow) = rope_body
}
