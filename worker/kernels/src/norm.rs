//! RMS and layer normalization of one row, and the two halves of an RMS norm whose row several ranks share.
//!
//! Sums run over 16 lanes (lane = column mod 16) and a halving tree, so they depend on the row alone.

use crate::backend::{NormKind, NormParams};
use crate::lanes::{LANES, Lanes, LeafStack, kernel};

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

/// # Safety
/// `x` holds the last bound's elements; there are as many leaves as `merges`, at most eight.
#[inline(always)]
unsafe fn square_sum_body<L: Lanes>(x: *const f32, bounds: &[usize], merges: &[u8]) -> f32 {
    let mut stack = LeafStack::<f32, 1>::new(0.0);
    for (leaf, &merges) in bounds.windows(2).zip(merges) {
        // SAFETY: the leaf lies within x.
        unsafe { stack.push([moment::<L, true>(x.add(leaf[0]), leaf[1] - leaf[0], 0.0)], merges) };
    }
    stack.total()[0]
}

kernel! {
    /// Σ x² of one row, leaf by leaf (`bounds`, and merges after each).
    ///
    /// # Safety
    /// `x` holds the last bound's elements; there are as many leaves as `merges`, at most eight.
    pub(crate) unsafe fn square_sum(x: *const f32, bounds: &[usize], merges: &[u8]) -> f32 = square_sum_body
}

/// A row's columns that are held here, of `width` that were summed.
#[derive(Clone, Copy)]
pub(crate) struct ScaledRow {
    pub(crate) x: *mut f32,
    pub(crate) weight: *const f32,
    pub(crate) columns: usize,
    /// Σ x² over `width` columns.
    pub(crate) sum: f32,
    pub(crate) width: usize,
}

/// # Safety
/// `x` is writable and `weight` readable for `columns` elements.
#[inline(always)]
unsafe fn scale_body<L: Lanes>(row: ScaledRow, params: NormParams) {
    // SAFETY: columns below `columns` are touched.
    unsafe {
        let inverse = L::splat(1.0 / (row.sum / row.width as f32 + params.eps).sqrt());
        for column in (0..row.columns).step_by(LANES) {
            let count = LANES.min(row.columns - column);
            let weight = L::load_partial(row.weight.add(column), count).add(L::splat(params.weight_offset));
            let value = L::load_partial(row.x.add(column), count).mul(inverse);
            value.mul(weight).store_partial(row.x.add(column), count);
        }
    }
}

kernel! {
    /// x = x / sqrt(sum / width + eps) · (weight + offset), as [`norm_row`] computes it.
    ///
    /// # Safety
    /// `x` is writable and `weight` readable for `columns` elements.
    pub(crate) unsafe fn scale_row(row: ScaledRow, params: NormParams) = scale_body
}
