//! Scales that lie beside a matrix of 8-bit floats, one per block of rows × columns.
//!
//! What it is not: the scales inside a quantized block, which belong to its bytes.

use std::ops::Range;
use std::sync::Arc;

/// A weight's value is f32(stored) · scale, rounded once. A shard shares the whole matrix's scales and says where in
/// it its own first row and column are.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockScales {
    /// Rows that share a scale; `usize::MAX` where all do.
    pub block_rows: usize,
    /// Columns that share a scale: a power of two, or `usize::MAX` where all do.
    pub block_columns: usize,
    /// Scales of one row of blocks: `values` is `[blocks of rows][blocks_per_row]`.
    pub blocks_per_row: usize,
    /// The shard's first row in the matrix that the scales belong to.
    pub first_row: usize,
    /// The shard's first column in it.
    pub first_column: usize,
    /// The scales.
    pub values: Arc<[f32]>,
}

impl BlockScales {
    /// One scale for a whole matrix.
    pub fn whole(scale: f32) -> Self {
        BlockScales {
            block_rows: usize::MAX,
            block_columns: usize::MAX,
            blocks_per_row: 1,
            first_row: 0,
            first_column: 0,
            values: [scale].into(),
        }
    }

    /// The scales of a part of this shard that begins `rows` and `columns` further on.
    #[must_use]
    pub fn part(&self, rows: usize, columns: usize) -> Self {
        BlockScales { first_row: self.first_row + rows, first_column: self.first_column + columns, ..self.clone() }
    }

    /// The scales of some runs of this shard's rows, one after another. The runs lie within the shard.
    #[must_use]
    pub fn gathered(&self, runs: &[Range<usize>]) -> Self {
        let values = runs.iter().flat_map(Range::clone).flat_map(|row| self.of_row(row).to_vec()).collect();
        BlockScales { block_rows: 1, first_row: 0, values, ..self.clone() }
    }

    /// The scales of one of the shard's rows, a block of columns each, the first that of the matrix's first column.
    pub(crate) fn of_row(&self, row: usize) -> &[f32] {
        let start = (self.first_row + row) / self.block_rows * self.blocks_per_row;
        &self.values[start..start + self.blocks_per_row]
    }

    /// The scale of a value of the shard.
    pub(crate) fn at(&self, row: usize, column: usize) -> f32 {
        self.of_row(row)[(self.first_column + column) / self.block_columns]
    }

    /// How far to shift a column of the matrix right to have the number of its block.
    pub(crate) fn column_shift(&self) -> u32 {
        if self.block_columns.is_power_of_two() { self.block_columns.trailing_zeros() } else { usize::BITS - 1 }
    }

    /// Why these scales do not fit a shard of that size, if they do not.
    pub(crate) fn misfit(&self, rows: usize, columns: usize) -> Option<String> {
        if self.block_rows == 0 || self.block_columns == 0 {
            return Some("its blocks of scales are empty".to_owned());
        }
        if !self.block_columns.is_power_of_two() && self.first_column.saturating_add(columns) > self.block_columns {
            return Some(format!("a scale for every {} columns; a power of two is needed", self.block_columns));
        }
        let last = |first: usize, count: usize, block: usize| first.checked_add(count - 1).map(|last| last / block);
        let needed = last(self.first_row, rows, self.block_rows)
            .zip(last(self.first_column, columns, self.block_columns))
            .filter(|&(_, column)| column < self.blocks_per_row)
            .and_then(|(row, _)| (row + 1).checked_mul(self.blocks_per_row));
        if needed.is_none_or(|needed| needed > self.values.len()) {
            return Some(format!("{} scales, {} for each row of blocks, do not cover it", self.values.len(), self.blocks_per_row));
        }
        self.values.iter().position(|scale| !scale.is_finite()).map(|index| format!("its scale {index} is no finite number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_gathered_rows_keep_their_scales() {
        // 3 × 2 blocks of 2 rows × 4 columns.
        let values = (0..6_u8).map(f32::from).collect();
        let whole = BlockScales { block_rows: 2, block_columns: 4, blocks_per_row: 2, first_row: 0, first_column: 0, values };
        assert_eq!((whole.at(0, 0), whole.at(1, 4), whole.at(5, 7)), (0.0, 1.0, 5.0));
        let part = whole.part(1, 3);
        assert_eq!((part.at(0, 0), part.at(0, 1), part.at(1, 0)), (0.0, 1.0, 2.0));
        let gathered = part.gathered(&[4..5, 0..2]);
        assert_eq!((gathered.at(0, 1), gathered.at(1, 1), gathered.at(2, 0)), (5.0, 1.0, 2.0));
        assert_eq!(BlockScales::whole(3.0).part(7, 9).at(100, 100), 3.0);
    }

    #[test]
    fn scales_that_do_not_cover_a_matrix_are_refused() {
        let scales =
            BlockScales { block_rows: 2, block_columns: 4, blocks_per_row: 2, first_row: 0, first_column: 0, values: [1.0; 6].into() };
        assert_eq!(scales.misfit(6, 8), None);
        assert!(scales.misfit(7, 8).is_some());
        assert!(scales.misfit(6, 9).is_some());
        assert!(scales.part(1, 0).misfit(6, 8).is_some());
        assert!(scales.part(usize::MAX, 0).misfit(6, 8).is_some());
        assert!(BlockScales { block_columns: 0, ..scales.clone() }.misfit(6, 8).is_some());
        assert!(BlockScales { block_columns: 6, ..scales.clone() }.misfit(6, 8).is_some_and(|why| why.contains("power of two")));
        assert_eq!(BlockScales { block_columns: 9, blocks_per_row: 1, ..scales.clone() }.misfit(6, 8), None);
        let bad = BlockScales { values: [1.0, f32::NAN, 1.0, 1.0, 1.0, 1.0].into(), ..scales };
        assert!(bad.misfit(6, 8).is_some_and(|why| why.contains("scale 1")));
    }
}
