//! The rows of dense matrices: elements that widen exactly, and 8-bit floats with scales beside them.
//!
//! A row has no alignment: it lies where the file has it.

use std::ops::Range;

use crate::lanes::{Element, LANES, Lanes, padded};
use crate::prefetch::NextRows;
use crate::scales::BlockScales;

/// A row of weights as f32.
///
/// # Safety
/// As [`Lanes::load`] and [`Lanes::load_partial`], for the row's elements from `column` on.
pub(crate) trait WeightRow: Copy {
    unsafe fn load<L: Lanes>(self, column: usize) -> L;
    unsafe fn load_partial<L: Lanes>(self, column: usize, count: usize) -> L;
    /// As `load`, of columns that all have this scale.
    unsafe fn load_scaled<L: Lanes>(self, column: usize, scale: f32) -> L;
    /// A column's scale.
    unsafe fn scale(self, column: usize) -> f32;
}

/// The rows of a dense matrix.
pub(crate) trait WeightRows: Copy {
    /// One of them.
    type Row: WeightRow;
    /// Bytes of a value.
    const BYTES: usize;
    /// Tokens from which widening the weights first pays.
    const PANEL_TOKENS: usize;

    /// # Safety
    /// The row exists.
    unsafe fn row(self, index: usize) -> Self::Row;
    /// Up to where all columns from the first have the first one's scale.
    fn equal_scales(self, columns: Range<usize>) -> usize;
    /// What follows `rows` rows of `columns` values from row `index`.
    fn after(self, index: usize, rows: usize, columns: usize) -> NextRows;
}

/// Rows of elements that widen exactly.
#[derive(Clone, Copy)]
pub(crate) struct ElementRows<E> {
    /// Row 0; no alignment.
    pub(crate) base: *const E,
    pub(crate) stride_bytes: usize,
}

impl<E: Element> WeightRows for ElementRows<E> {
    type Row = *const E;
    const BYTES: usize = size_of::<E>();
    const PANEL_TOKENS: usize = 8;

    #[inline(always)]
    unsafe fn row(self, index: usize) -> *const E {
        // SAFETY: the caller's contract.
        unsafe { self.base.byte_add(index * self.stride_bytes) }
    }

    #[inline(always)]
    fn equal_scales(self, columns: Range<usize>) -> usize {
        columns.end
    }

    #[inline(always)]
    fn after(self, index: usize, rows: usize, columns: usize) -> NextRows {
        let current = self.base.cast::<u8>().wrapping_add(index * self.stride_bytes);
        NextRows { current, rows, stride_bytes: self.stride_bytes, row_bytes: columns * Self::BYTES }
    }
}

impl<E: Element> WeightRow for *const E {
    #[inline(always)]
    unsafe fn load<L: Lanes>(self, column: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { E::load(self.add(column)) }
    }

    #[inline(always)]
    unsafe fn load_partial<L: Lanes>(self, column: usize, count: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { E::load_partial(self.add(column), count) }
    }

    #[inline(always)]
    unsafe fn load_scaled<L: Lanes>(self, column: usize, _scale: f32) -> L {
        // SAFETY: the caller's contract.
        unsafe { E::load(self.add(column)) }
    }

    #[inline(always)]
    unsafe fn scale(self, _column: usize) -> f32 {
        1.0
    }
}

/// Rows of 8-bit floats with their scales.
#[derive(Clone, Copy)]
pub(crate) struct ScaledRows<'a> {
    /// Row 0.
    pub(crate) base: *const u8,
    pub(crate) stride_bytes: usize,
    pub(crate) scales: &'a BlockScales,
}

/// One of them.
#[derive(Clone, Copy)]
pub(crate) struct ScaledRow<'a> {
    bytes: *const u8,
    /// Of blocks of columns of the whole matrix.
    scales: &'a [f32],
    first_column: usize,
    shift: u32,
}

impl<'a> WeightRows for ScaledRows<'a> {
    type Row = ScaledRow<'a>;
    const BYTES: usize = 1;
    const PANEL_TOKENS: usize = 3;

    #[inline(always)]
    unsafe fn row(self, index: usize) -> ScaledRow<'a> {
        // SAFETY: the caller's contract.
        let bytes = unsafe { self.base.add(index * self.stride_bytes) };
        let scales = self.scales;
        ScaledRow { bytes, scales: scales.of_row(index), first_column: scales.first_column, shift: scales.column_shift() }
    }

    #[inline(always)]
    fn equal_scales(self, columns: Range<usize>) -> usize {
        let (first, shift) = (self.scales.first_column, self.scales.column_shift());
        let block_end = (((first + columns.start) >> shift) + 1).checked_shl(shift);
        columns.end.min(block_end.filter(|end| end >> shift != 0).map_or(usize::MAX, |end| end - first))
    }

    #[inline(always)]
    fn after(self, index: usize, rows: usize, columns: usize) -> NextRows {
        let current = self.base.wrapping_add(index * self.stride_bytes);
        NextRows { current, rows, stride_bytes: self.stride_bytes, row_bytes: columns }
    }
}

impl ScaledRow<'_> {
    /// Scales of `count` columns from `column` on.
    #[inline(always)]
    unsafe fn scales<L: Lanes>(self, column: usize, count: usize) -> L {
        let first = self.first_column + column;
        let block = first >> self.shift;
        // SAFETY: `values` holds 16.
        unsafe {
            if (first + count - 1) >> self.shift == block {
                return L::splat(self.scales[block]);
            }
            let mut values = [0.0; LANES];
            for (index, value) in values.iter_mut().enumerate().take(count) {
                *value = self.scales[(first + index) >> self.shift];
            }
            L::load(values.as_ptr())
        }
    }
}

impl WeightRow for ScaledRow<'_> {
    #[inline(always)]
    unsafe fn load<L: Lanes>(self, column: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_f8e4m3(self.bytes.add(column)).mul(self.scales(column, LANES)) }
    }

    #[inline(always)]
    unsafe fn load_partial<L: Lanes>(self, column: usize, count: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_f8e4m3(padded(self.bytes.add(column), count).as_ptr()).mul(self.scales(column, count)) }
    }
    #[inline(always)]
    unsafe fn load_scaled<L: Lanes>(self, column: usize, scale: f32) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_f8e4m3(self.bytes.add(column)).mul(L::splat(scale)) }
    }

    #[inline(always)]
    unsafe fn scale(self, column: usize) -> f32 {
        self.scales[(self.first_column + column) >> self.shift]
    }
}
