//! Products with dense weights (F32, F16, BF16): f32 activations, weights widened exactly.
//!
//! A leaf's sum has 16 lanes (lane = column mod 16, counted from the leaf's start), FMA, then the halving tree;
//! leaves are added in the tree's order. Tiles of rows × tokens only share loads: every (row, token) sum is
//! its own, so its bits do not depend on the tile.

// Indices name the rows, tokens and vectors of a register tile; several arrays share them.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use crate::lanes::{Element, LANES, Lanes, LeafStack, kernel};

/// Tokens whose activations are kept in the nearer caches while a task's rows pass over them.
const TOKEN_BLOCK: usize = 64;

/// One task: some rows of a matrix times all tokens.
#[derive(Clone)]
pub(crate) struct DenseTask<'a> {
    /// Row 0 of the matrix; no alignment.
    pub(crate) weight: *const u8,
    pub(crate) stride_bytes: usize,
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

/// # Safety
/// All pointers hold what the task's numbers say; nobody else writes the task's rows of `out`.
#[inline(always)]
unsafe fn dense_body<L: Lanes, E: Element>(task: DenseTask<'_>) {
    let mut block = 0;
    while block < task.tokens {
        let block_end = task.tokens.min(block + TOKEN_BLOCK);
        let mut row = task.rows.start;
        while row < task.rows.end {
            let rows = if task.rows.end - row >= 4 { 4 } else { 1 };
            let mut token = block;
            while token < block_end {
                let tokens = if block_end - token >= 4 { 4 } else { 1 };
                // SAFETY: the tile lies within the task's rows and tokens.
                unsafe {
                    match (rows, tokens) {
                        (4, 4) => dense_tile::<L, E, 4, 4>(&task, row, token),
                        (4, _) => dense_tile::<L, E, 4, 1>(&task, row, token),
                        (_, 4) => dense_tile::<L, E, 1, 4>(&task, row, token),
                        _ => dense_tile::<L, E, 1, 1>(&task, row, token),
                    }
                }
                token += tokens;
            }
            row += rows;
        }
        block = block_end;
    }
}

/// R rows times T tokens.
///
/// # Safety
/// As [`dense_body`]; rows row..row + R and tokens token..token + T exist.
#[inline(always)]
unsafe fn dense_tile<L: Lanes, E: Element, const R: usize, const T: usize>(task: &DenseTask<'_>, row: usize, token: usize) {
    // SAFETY: all offsets stay within the rows and tokens of the tile.
    unsafe {
        let weights: [*const E; R] = pointers(task.weight, row, task.stride_bytes);
        let inputs: [*const f32; T] = pointers(task.x.cast(), token, task.x_width * size_of::<f32>());
        let mut stacks = [(); T].map(|()| LeafStack::<f32, R>::new(0.0));
        for (leaf, &merges) in task.merges.iter().enumerate() {
            let sums = dense_leaf::<L, E, R, T>(&weights, &inputs, task.bounds[leaf]..task.bounds[leaf + 1]);
            for t in 0..T {
                stacks[t].push(sums[t], merges);
            }
        }
        for (t, stack) in stacks.into_iter().enumerate() {
            let out = task.out.add((token + t) * task.out_width + row);
            let mut totals = stack.total();
            if let Some(bias) = task.bias {
                for (r, total) in totals.iter_mut().enumerate() {
                    *total += *bias.add(row + r);
                }
            }
            out.cast::<[f32; R]>().write(totals);
        }
    }
}

/// N consecutive rows' pointers.
///
/// # Safety
/// The rows lie in one allocation.
#[inline(always)]
unsafe fn pointers<T, const N: usize>(base: *const u8, first: usize, stride_bytes: usize) -> [*const T; N] {
    let mut rows = [std::ptr::null(); N];
    for (index, pointer) in rows.iter_mut().enumerate() {
        // SAFETY: the caller's contract.
        *pointer = unsafe { base.add((first + index) * stride_bytes).cast() };
    }
    rows
}

/// One leaf's sums, `[token][row]`.
///
/// # Safety
/// Every pointer holds `columns.end` elements.
#[inline(always)]
unsafe fn dense_leaf<L: Lanes, E: Element, const R: usize, const T: usize>(
    weights: &[*const E; R],
    inputs: &[*const f32; T],
    columns: Range<usize>,
) -> [[f32; R]; T] {
    // SAFETY: columns stay below `columns.end`.
    unsafe {
        let mut sums = [[L::splat(0.0); R]; T];
        let mut column = columns.start;
        while column + LANES <= columns.end {
            let mut x = [L::splat(0.0); T];
            for t in 0..T {
                x[t] = L::load(inputs[t].add(column));
            }
            for r in 0..R {
                let weight = E::load::<L>(weights[r].add(column));
                for t in 0..T {
                    sums[t][r] = weight.mul_add(x[t], sums[t][r]);
                }
            }
            column += LANES;
        }
        let rest = columns.end - column;
        if rest > 0 {
            for r in 0..R {
                let weight = E::load_partial::<L>(weights[r].add(column), rest);
                for t in 0..T {
                    sums[t][r] = weight.mul_add(L::load_partial(inputs[t].add(column), rest), sums[t][r]);
                }
            }
        }
        let mut totals = [[0.0; R]; T];
        for t in 0..T {
            for r in 0..R {
                totals[t][r] = sums[t][r].sum();
            }
        }
        totals
    }
}

kernel! {
    /// Computes a task; `E` is the weight's element type.
    ///
    /// # Safety
    /// All pointers hold what the task's numbers say; nobody else writes the task's rows of `out`.
    pub(crate) unsafe fn dense_rows<E: Element>(task: DenseTask<'_>) = dense_body
}
