//! RMS and layer normalization of one row.
//!
//! Sums run over 16 lanes (lane = column mod 16) and a halving tree, so they depend on the row alone.

use crate::backend::{NormKind, NormParams};
use crate::lanes::{LANES, Lanes, kernel};

/// One row's operands.
#[derive(Clone, Copy)]
pub(crate) struct NormRow {
    pub(crate) x: *const f32,
    pub(crate) out: *mut f32,
    pub(crate) weight: Option<*const f32>,
    pub(crate) bias: Option<*const f32>,
    pub(crate) width: usize,
}

/// Σ (x − center)², or Σ (x − center).
///
/// # Safety
/// `x` is readable for `width` elements.
#[inline(always)]
unsafe fn moment<L: Lanes, const SQUARED: bool>(x: *const f32, width: usize, center: f32) -> f32 {
    // SAFETY: only columns below `width` are read.
    unsafe {
        let mut sum = L::splat(0.0);
        let mut column = 0;
        while column < width {
            let count = LANES.min(width - column);
            let value = L::load_partial(x.add(column), count).sub(L::splat(center)).keep(0, count, 0.0);
            sum = if SQUARED { value.mul_add(value, sum) } else { sum.add(value) };
            column += count;
        }
        sum.sum()
    }
}

/// # Safety
/// The row's pointers hold `width` elements; `out` is writable (and may be `x`).
#[inline(always)]
unsafe fn norm_body<L: Lanes>(row: NormRow, params: NormParams) {
    let width = row.width as f32;
    // SAFETY: the caller's contract.
    unsafe {
        let mean = match params.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => moment::<L, false>(row.x, row.width, 0.0) / width,
        };
        let variance = moment::<L, true>(row.x, row.width, mean) / width;
        let inverse = L::splat(1.0 / (variance + params.eps).sqrt());
        let mut column = 0;
        while column < row.width {
            let count = LANES.min(row.width - column);
            let mut value = L::load_partial(row.x.add(column), count).sub(L::splat(mean)).mul(inverse);
            if let Some(weight) = row.weight {
                value = value.mul(L::load_partial(weight.add(column), count).add(L::splat(params.weight_offset)));
            }
            if let Some(bias) = row.bias {
                value = value.add(L::load_partial(bias.add(column), count));
            }
            value.store_partial(row.out.add(column), count);
            column += count;
        }
    }
}

kernel! {
    /// out = norm(x) for one row.
    ///
    /// # Safety
    /// The row's pointers hold `width` elements; `out` is writable (and may be `x`).
    pub(crate) unsafe fn norm_row(row: NormRow, params: NormParams) = norm_body
}
