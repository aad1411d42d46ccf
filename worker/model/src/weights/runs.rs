//! Which rows of a stored tensor a matrix has: runs of equal length at equal distance.
//!
//! One such value says every way in which checkpoints store several matrices as one: a range of rows (q, then k, then
//! v), rows grouped by KV head, rows that belong to two matrices by turns, an expert's part of a stack.
//!
//! Invariant: runs ascend and do not overlap.

use std::ops::Range;

/// `count` runs of `length` rows (or values), `stride` apart, the first at `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Runs {
    pub start: usize,
    pub length: usize,
    pub stride: usize,
    pub count: usize,
}

impl Runs {
    /// One run.
    pub fn contiguous(rows: Range<usize>) -> Self {
        Runs { start: rows.start, length: rows.len(), stride: rows.len(), count: 1 }
    }

    /// Every second value from `start` on, `count` of them.
    pub fn every_second(start: usize, count: usize) -> Self {
        Runs { start, length: 1, stride: 2, count }
    }

    /// The same runs further on.
    pub fn moved(self, by: usize) -> Self {
        Runs { start: self.start + by, ..self }
    }

    /// Rows in all runs.
    pub fn len(&self) -> usize {
        self.length * self.count
    }

    /// Where the rows `wanted` (counted within these runs) are stored, in order, neighbours joined.
    pub fn stored(&self, wanted: &[Range<usize>]) -> Vec<Range<usize>> {
        let mut stored: Vec<Range<usize>> = Vec::new();
        for range in wanted {
            debug_assert!(range.end <= self.len());
            let mut row = range.start;
            while row < range.end {
                let (run, within) = (row / self.length, row % self.length);
                let count = (self.length - within).min(range.end - row);
                let first = self.start + run * self.stride + within;
                match stored.last_mut() {
                    Some(last) if last.end == first => last.end = first + count,
                    _ => stored.push(first..first + count),
                }
                row += count;
            }
        }
        stored
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `stored` of one range, as (start, end).
    fn of(runs: Runs, wanted: Range<usize>) -> Vec<(usize, usize)> {
        runs.stored(std::slice::from_ref(&wanted)).iter().map(|run| (run.start, run.end)).collect()
    }

    #[test]
    fn neighbours_are_joined() {
        assert_eq!(of(Runs::contiguous(10..20), 2..5), [(12, 15)]);
        assert_eq!(Runs::contiguous(10..20).stored(&[0..2, 2..4, 6..7]), [10..14, 16..17]);
        // Runs without a gap are one.
        assert_eq!(of(Runs { start: 3, length: 4, stride: 4, count: 3 }, 0..12), [(3, 15)]);
        assert!(of(Runs::contiguous(0..5), 3..3).is_empty());
    }

    #[test]
    fn runs_are_cut_where_the_wanted_rows_begin_and_end() {
        let grouped = Runs { start: 0, length: 4, stride: 8, count: 3 };
        assert_eq!(of(grouped, 2..9), [(2, 4), (8, 12), (16, 17)]);
        assert_eq!(grouped.len(), 12);
        assert_eq!(of(grouped.moved(100), 4..8), [(108, 112)]);
        assert_eq!(of(Runs::every_second(1, 4), 1..3), [(3, 4), (5, 6)]);
    }
}
