//! Products with dense weights: f32 activations, weights widened exactly. An 8-bit float is then multiplied by its
//! block's scale, rounded once.
//!
//! A leaf's sum has 16 lanes (lane = column mod 16, counted from the leaf's start), FMA, then the halving tree;
//! leaves are added in the tree's order. Tiles of rows × tokens only share loads: every (row, token) sum is
//! its own, so its bits do not depend on the tile.

// Indices name the rows, tokens and vectors of a register tile; several arrays share them.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use crate::lanes::{Element, LANES, Lanes, LeafStack, kernel, padded};
use crate::scales::BlockScales;

/// Tokens whose activations are kept in the nearer caches while a task's rows pass over them.
const TOKEN_BLOCK: usize = 64;

/// A row of weights as f32.
///
/// # Safety
/// As [`Lanes::load`] and [`Lanes::load_partial`], for the row's elements from `column` on.
pub(crate) trait WeightRow: Copy {
    unsafe fn load<L: Lanes>(self, column: usize) -> L;
    unsafe fn load_partial<L: Lanes>(self, column: usize, count: usize) -> L;
}

/// The rows of a dense matrix.
pub(crate) trait WeightRows: Copy {
    /// One of them.
    type Row: WeightRow;

    /// # Safety
    /// The row exists.
    unsafe fn row(self, index: usize) -> Self::Row;
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

    #[inline(always)]
    unsafe fn row(self, index: usize) -> *const E {
        // SAFETY: the caller's contract.
        unsafe { self.base.byte_add(index * self.stride_bytes) }
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

    #[inline(always)]
    unsafe fn row(self, index: usize) -> ScaledRow<'a> {
        // SAFETY: the caller's contract.
        let bytes = unsafe { self.base.add(index * self.stride_bytes) };
        let scales = self.scales;
        ScaledRow { bytes, scales: scales.of_row(index), first_column: scales.first_column, shift: scales.column_shift() }
    }
}

impl ScaledRow<'_> {
    /// Scales of `count` columns from `column` on.
    #[inline(always)]
    unsafe fn scale<L: Lanes>(self, column: usize, count: usize) -> L {
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
        unsafe { L::load_f8e4m3(self.bytes.add(column)).mul(self.scale(column, LANES)) }
    }

    #[inline(always)]
    unsafe fn load_partial<L: Lanes>(self, column: usize, count: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_f8e4m3(padded(self.bytes.add(column), count).as_ptr()).mul(self.scale(column, count)) }
    }
}

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

/// # Safety
/// All pointers hold what the task's numbers say; nobody else writes the task's rows of `out`.
#[inline(always)]
unsafe fn dense_body<L: Lanes, S: WeightRows>(weights: S, task: DenseTask<'_>) {
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
                        (4, 4) => dense_tile::<L, S, 4, 4>(weights, &task, row, token),
                        (4, _) => dense_tile::<L, S, 4, 1>(weights, &task, row, token),
                        (_, 4) => dense_tile::<L, S, 1, 4>(weights, &task, row, token),
                        _ => dense_tile::<L, S, 1, 1>(weights, &task, row, token),
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
unsafe fn dense_tile<L: Lanes, S: WeightRows, const R: usize, const T: usize>(weights: S, task: &DenseTask<'_>, row: usize, token: usize) {
    // SAFETY: all offsets stay within the rows and tokens of the tile.
    unsafe {
        let mut rows = [weights.row(row); R];
        for r in 1..R {
            rows[r] = weights.row(row + r);
        }
        let mut inputs = [task.x; T];
        for t in 0..T {
            inputs[t] = task.x.add((token + t) * task.x_width);
        }
        let mut stacks = [(); T].map(|()| LeafStack::<f32, R>::new(0.0));
        for (leaf, &merges) in task.merges.iter().enumerate() {
            let sums = dense_leaf::<L, S::Row, R, T>(&rows, &inputs, task.bounds[leaf]..task.bounds[leaf + 1]);
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

/// One leaf's sums, `[token][row]`.
///
/// # Safety
/// Every pointer holds `columns.end` elements.
#[inline(always)]
unsafe fn dense_leaf<L: Lanes, W: WeightRow, const R: usize, const T: usize>(
    weights: &[W; R],
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
                let weight = weights[r].load::<L>(column);
                for t in 0..T {
                    sums[t][r] = weight.mul_add(x[t], sums[t][r]);
                }
            }
            column += LANES;
        }
        let rest = columns.end - column;
        if rest > 0 {
            for r in 0..R {
                let weight = weights[r].load_partial::<L>(column, rest);
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
    /// Computes a task.
    ///
    /// # Safety
    /// All pointers hold what the task's numbers say; nobody else writes the task's rows of `out`.
    pub(crate) unsafe fn dense_rows<S: WeightRows>(weights: S, task: DenseTask<'_>) = dense_body
}
