//! Several tokens: four rows' weights are widened to a panel of f32 in the nearest cache, and multiplied with a block of
//! tokens from there.
//!
//! Sums that are not finished at the end of a panel wait in memory, lane by lane: each lane still is one chain.

// Indices name the rows, tokens and vectors of a register tile; several arrays share them.
#![allow(clippy::needless_range_loop)]

use std::mem::MaybeUninit;
use std::ops::Range;

use super::weights::WeightRow;
use super::{DenseTask, ROWS, WeightRows};
use crate::lanes::{LANES, Lanes, LeafStack};
use crate::prefetch::NextRows;

/// Columns of a panel: with those of a few tokens they fill the nearest cache and leave room.
const COLUMNS: usize = 512;

/// Tokens that share a panel.
const TOKENS: usize = 64;

/// Columns of four rows.
#[repr(C, align(64))]
struct Panel([[f32; COLUMNS]; ROWS]);

/// Sums of four rows with a token: written when a leaf begins, `[row]`.
type Sums<L> = [MaybeUninit<L>; ROWS];

/// What four rows' sums with a block of tokens are in.
struct State<L> {
    sums: [Sums<L>; TOKENS],
    /// Of the leaves so far; empty between rows.
    stacks: [LeafStack<f32, ROWS>; TOKENS],
}

/// Computes a task.
///
/// # Safety
/// As [`super::dense_rows`].
#[inline(always)]
pub(super) unsafe fn multiply_block<L: Lanes, S: WeightRows>(weights: S, task: &DenseTask<'_>) {
    let mut panel = Panel([[0.0; COLUMNS]; ROWS]);
    let mut state = State { sums: [[MaybeUninit::<L>::uninit(); ROWS]; TOKENS], stacks: [const { LeafStack::new(0.0) }; TOKENS] };
    let mut first = 0;
    while first < task.tokens {
        let tokens = first..task.tokens.min(first + TOKENS);
        first = tokens.end;
        let mut row = task.rows.start;
        while row < task.rows.end {
            // SAFETY: the rows and the tokens are the task's.
            unsafe {
                if task.rows.end - row >= ROWS {
                    multiply_rows::<L, S, ROWS>(weights, task, row, tokens.clone(), &mut panel, &mut state);
                    row += ROWS;
                } else {
                    multiply_rows::<L, S, 1>(weights, task, row, tokens.clone(), &mut panel, &mut state);
                    row += 1;
                }
            }
        }
    }
}

/// R rows times at most [`TOKENS`] tokens.
///
/// # Safety
/// As [`multiply_block`]; the rows and the tokens exist.
#[inline(always)]
unsafe fn multiply_rows<L: Lanes, S: WeightRows, const R: usize>(
    weights: S,
    task: &DenseTask<'_>,
    row: usize,
    tokens: Range<usize>,
    panel: &mut Panel,
    state: &mut State<L>,
) {
    let State { sums, stacks } = state;
    let (sums, stacks) = (&mut sums[..tokens.len()], &mut stacks[..tokens.len()]);
    // SAFETY: columns stay within their leaf, and the caller's contract.
    unsafe {
        let next = weights.after(row, R, task.bounds[task.merges.len()]);
        for (leaf, &merges) in task.merges.iter().enumerate() {
            let columns = task.bounds[leaf]..task.bounds[leaf + 1];
            for sums in sums.iter_mut() {
                *sums = [MaybeUninit::new(L::splat(0.0)); ROWS];
            }
            let mut start = columns.start;
            while start < columns.end {
                let part = start..columns.end.min(start + COLUMNS);
                start = part.end;
                widen::<L, S, R>(weights, row, part.clone(), next, panel);
                multiply_part::<L, R>(task, tokens.start, part, panel, sums);
            }
            for (stack, sums) in stacks.iter_mut().zip(sums.iter()) {
                let mut totals = [0.0; ROWS];
                for r in 0..R {
                    totals[r] = sums[r].assume_init().sum();
                }
                stack.push(totals, merges);
            }
        }
        for (token, stack) in tokens.zip(stacks) {
            let totals = stack.take_total();
            if R == ROWS {
                task.store(token, row, totals);
            } else {
                task.store(token, row, [totals[0]]);
            }
        }
    }
}

/// Writes R rows' columns to the panel, followed by zeros up to 16.
///
/// # Safety
/// As [`multiply_rows`]; there are at most [`COLUMNS`].
#[inline(always)]
unsafe fn widen<L: Lanes, S: WeightRows, const R: usize>(weights: S, row: usize, columns: Range<usize>, next: NextRows, panel: &mut Panel) {
    // Each vector of these rows asks for as many bytes of the next.
    let share = LANES * S::BYTES / R;
    for r in 0..R {
        // SAFETY: the row exists and holds the columns; `to` has room for 16 where they begin.
        unsafe {
            let weights = weights.row(row + r);
            let mut column = columns.start;
            for to in panel.0[r].as_chunks_mut::<LANES>().0 {
                if column >= columns.end {
                    break;
                }
                let ahead = column * S::BYTES + r * share;
                next.prefetch(ahead..ahead + share);
                let count = LANES.min(columns.end - column);
                let values: L = if count == LANES { weights.load(column) } else { weights.load_partial(column, count) };
                values.store(to.as_mut_ptr());
                column += LANES;
            }
        }
    }
}

/// Adds the products of the panel with the tokens from `first_token` on to their sums.
///
/// # Safety
/// As [`multiply_rows`]; the panel holds the columns.
#[inline(always)]
unsafe fn multiply_part<L: Lanes, const R: usize>(
    task: &DenseTask<'_>,
    first_token: usize,
    columns: Range<usize>,
    panel: &Panel,
    sums: &mut [Sums<L>],
) {
    let mut index = 0;
    while index < sums.len() {
        // SAFETY: no more tokens are asked for than there are.
        unsafe {
            let x = task.x.add((first_token + index) * task.x_width + columns.start);
            let rest = &mut sums[index..];
            let (count, sums) = (rest.len(), rest.as_mut_ptr());
            index += match count {
                4.. if L::TOKENS >= 4 => multiply_tile::<L, R, 4>(panel, x, task.x_width, columns.len(), sums),
                3.. => multiply_tile::<L, R, 3>(panel, x, task.x_width, columns.len(), sums),
                2 => multiply_tile::<L, R, 2>(panel, x, task.x_width, columns.len(), sums),
                _ => multiply_tile::<L, R, 1>(panel, x, task.x_width, columns.len(), sums),
            };
        }
    }
}

/// R rows of the panel times T tokens; returns T.
///
/// # Safety
/// T tokens of `columns` values, `width` apart, lie at `x`; T sums at `sums` were begun.
#[inline(always)]
unsafe fn multiply_tile<L: Lanes, const R: usize, const T: usize>(
    panel: &Panel,
    x: *const f32,
    width: usize,
    columns: usize,
    sums: *mut Sums<L>,
) -> usize {
    // SAFETY: the caller's contract.
    unsafe {
        let mut rows = [std::ptr::null(); R];
        for r in 0..R {
            rows[r] = panel.0[r].as_ptr();
        }
        let mut inputs = [x; T];
        let mut at = [sums.cast::<L>(); T];
        for t in 0..T {
            inputs[t] = x.add(t * width);
            at[t] = sums.add(t).cast();
        }
        let whole = columns / LANES * LANES;
        L::add_products(at, rows, inputs, whole);
        if whole < columns {
            for t in 0..T {
                let x = L::load_partial(inputs[t].add(whole), columns - whole);
                for r in 0..R {
                    let sum = at[t].add(r);
                    *sum = L::load(rows[r].add(whole)).mul_add(x, *sum);
                }
            }
        }
    }
    T
}
