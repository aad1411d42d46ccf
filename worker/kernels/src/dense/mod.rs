//! Products with dense weights: f32 activations, weights widened exactly. An 8-bit float is then multiplied by its
//! block's scale, rounded once.
//!
//! A leaf's sum has 16 lanes (lane = column mod 16, counted from the leaf's start), FMA, then the halving tree;
//! leaves are added in the tree's order. Tiles of rows × tokens only share loads: every (row, token) sum is
//! its own, so its bits do not depend on the tile. A few tokens multiply the weights as they lie; for more they are
//! widened once, to a panel of f32 (`panel.rs`).

// Indices name the rows, tokens and vectors of a register tile; several arrays share them.
#![allow(clippy::needless_range_loop)]

mod panel;
mod weights;

use std::ops::Range;

pub(crate) use self::weights::{ElementRows, ScaledRows, WeightRows};

use self::panel::multiply_block;
use self::weights::WeightRow;
use crate::lanes::{LANES, Lanes, LeafStack, kernel};

/// Rows that are multiplied together.
const ROWS: usize = 4;

/// One task: some rows of a matrix times all tokens.
#[derive(Clone)]
pub(crate) struct DenseTask<'a> {
    pub(crate) rows: Range<usize>,
    /// Leaves: column boundaries, and merges after each.
    pub(crate) bounds: &'a [usize],
    pub(crate) merges: &'a [u8],
    pub(crate) x: *const f32,
    pub(crate) x_width: usize,
    pub(crate) tokens: usize,
    pub(crate) bias: Option<*const f32>,
    pub(crate) out: *mut f32,
    pub(crate) out_width: usize,
}

impl DenseTask<'_> {
    /// Adds the bias to R rows' sums with a token and stores them.
    ///
    /// # Safety
    /// As [`dense_body`]; the rows and the token exist.
    #[inline(always)]
    unsafe fn store<const R: usize>(&self, token: usize, row: usize, mut totals: [f32; R]) {
        // SAFETY: the caller's contract.
        unsafe {
            if let Some(bias) = self.bias {
                for (r, total) in totals.iter_mut().enumerate() {
                    *total += *bias.add(row + r);
                }
            }
            self.out.add(token * self.out_width + row).cast::<[f32; R]>().write(totals);
        }
    }
}

/// # Safety
/// All pointers hold what the task's numbers say; nobody else writes the task's rows of `out`.
#[inline(always)]
unsafe fn dense_body<L: Lanes, S: WeightRows>(weights: S, task: DenseTask<'_>) {
    // SAFETY: the tiles lie within the task's rows and tokens.
    unsafe {
        if task.tokens >= S::PANEL_TOKENS {
            return multiply_block::<L, S>(weights, &task);
        }
        let mut row = task.rows.start;
        while row < task.rows.end {
            let rows = if task.rows.end - row >= ROWS { ROWS } else { 1 };
            for token in 0..task.tokens {
                if rows == ROWS {
                    multiply_token::<L, S, ROWS>(weights, &task, row, token);
                } else {
                    multiply_token::<L, S, 1>(weights, &task, row, token);
                }
            }
            row += rows;
        }
    }
}

/// R rows times a token, the weights as they lie.
///
/// # Safety
/// As [`dense_body`]; the rows and the token exist.
#[inline(always)]
unsafe fn multiply_token<L: Lanes, S: WeightRows, const R: usize>(weights: S, task: &DenseTask<'_>, row: usize, token: usize) {
    // SAFETY: columns stay below the last bound.
    unsafe {
        let mut rows = [weights.row(row); R];
        for r in 1..R {
            rows[r] = weights.row(row + r);
        }
        let x = task.x.add(token * task.x_width);
        let next = weights.after(row, R, task.bounds[task.merges.len()]);
        let mut stack = LeafStack::<f32, R>::new(0.0);
        for (leaf, &merges) in task.merges.iter().enumerate() {
            let columns = task.bounds[leaf]..task.bounds[leaf + 1];
            let mut sums = [L::splat(0.0); R];
            let mut column = columns.start;
            while column + LANES <= columns.end {
                let mut scales = [0.0; R];
                for r in 0..R {
                    scales[r] = rows[r].scale(column);
                }
                let equal_end = weights.equal_scales(column..columns.end);
                while column + LANES <= equal_end {
                    next.prefetch(column * S::BYTES..(column + LANES) * S::BYTES);
                    let value = L::load(x.add(column));
                    for r in 0..R {
                        sums[r] = rows[r].load_scaled::<L>(column, scales[r]).mul_add(value, sums[r]);
                    }
                    column += LANES;
                }
                // The vector in which the scales change.
                if column < equal_end && column + LANES <= columns.end {
                    let value = L::load(x.add(column));
                    for r in 0..R {
                        sums[r] = rows[r].load::<L>(column).mul_add(value, sums[r]);
                    }
                    column += LANES;
                }
            }
            let rest = columns.end - column;
            if rest > 0 {
                let value = L::load_partial(x.add(column), rest);
                for r in 0..R {
                    sums[r] = rows[r].load_partial::<L>(column, rest).mul_add(value, sums[r]);
                }
            }
            let mut totals = [0.0; R];
            for r in 0..R {
                totals[r] = sums[r].sum();
            }
            stack.push(totals, merges);
        }
        task.store(token, row, stack.total());
    }
}

kernel! {
    /// Computes a task.
    ///
    /// # Safety
    /// All pointers hold what the task's numbers say; nobody else writes the task's rows of `out`.
    pub(crate) unsafe fn dense_rows<S: WeightRows>(weights: S, task: DenseTask<'_>) = dense_body
}
