//! Products with quantized weights, read in place where they are mapped.
//!
//! Sixteen rows over 256 columns at a time are unpacked into [`part::Part`]s, which know no format any more, and
//! multiplied with all tokens. A part is 32 columns, a block of the activations; its dot product, integer scales of 16
//! columns included, is an exact integer. In f32, per leaf and in the order of its parts, there is one accumulator
//! per (row, token): acc = fma(dot, d_weight · d_activation, acc), where d_weight is exact too. For a type with
//! minima then acc = fma(m_weight, s_activation, acc), s being d · Σ values, for Q4_1 and Q5_1 rounded to f16; for
//! Q2_K, whose minima are integers of 16 columns, acc = fma(Σ minimum · Σ values, −dmin · d_activation, acc). Leaves
//! are added in the tree's order.
//! Vector lanes are different outputs (16 rows), never parts of one sum: every path gives equal bits.

// Indices name the rows, tokens and vectors of a register tile; several arrays share them.
#![allow(clippy::needless_range_loop)]

mod blocks256;
mod blocks32;
mod part;
mod words;

use std::mem::MaybeUninit;
use std::ops::Range;

pub(crate) use self::part::TokenBlocks;

use self::part::{Format, PART, Part, multiply};
use self::words::{IntegerLanes, Words};
use crate::dtype::DType;
use crate::lanes::{LANES, Lanes, kernel};
use crate::path::CpuPath;
use crate::prefetch::NextRows;

/// A matrix as the kernels see it: at least 16 rows of whole blocks.
#[derive(Clone, Copy)]
pub(crate) struct MatrixView<'a> {
    /// Row 0, block 0; no alignment.
    pub(crate) base: *const u8,
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    /// Columns in parts of 32: whole blocks of the format.
    pub(crate) parts: usize,
    /// Where each leaf ends, in blocks of the format; merges after each.
    pub(crate) leaf_ends: &'a [usize],
    pub(crate) merges: &'a [u8],
}

impl MatrixView<'_> {
    /// What follows the 16 rows at `current`.
    #[inline(always)]
    fn after<F: Format>(&self, current: *const u8) -> NextRows {
        NextRows { current, rows: LANES, stride_bytes: self.stride, row_bytes: self.parts / F::PARTS * F::BYTES }
    }
}

/// One task: some rows times all its tokens.
#[derive(Clone)]
pub(crate) struct QuantizedTask<'a> {
    pub(crate) matrix: MatrixView<'a>,
    pub(crate) rows: Range<usize>,
    pub(crate) activations: TokenBlocks,
    pub(crate) tokens: usize,
    pub(crate) bias: Option<*const f32>,
    pub(crate) out: *mut f32,
    pub(crate) out_width: usize,
}

/// Bytes of activations that stay in a core's cache while a task's rows pass over them.
const TOKEN_BLOCK_BYTES: usize = 256 << 10;

/// Most tokens that share one unpacking.
const TOKEN_BLOCK: usize = 64;

/// Room for the parts of the largest block.
const CHUNK: usize = 8;

/// Parts of smaller blocks that are unpacked together: few, so that multiplying them hides the next ones' loads.
const SMALL_BLOCKS: usize = 4;

/// 16 rows, of which lanes `first_lane..end_lane` are the task's.
struct RowTile {
    first_row: usize,
    first_lane: usize,
    end_lane: usize,
}

/// Sums of 16 rows with a block of tokens: of the current leaf, and those that wait for their neighbours while leaves
/// are added in the tree's order ([`crate::tree::merges_after`]). Eight leaves never leave more than four waiting.
/// Only what the tokens need is written and read.
struct Sums<L> {
    leaf: [MaybeUninit<L>; TOKEN_BLOCK],
    waiting: [[MaybeUninit<L>; TOKEN_BLOCK]; 4],
    depth: usize,
}

impl<L: Lanes> Sums<L> {
    /// Starts a leaf of `tokens` tokens.
    ///
    /// # Safety
    /// As [`Lanes`].
    #[inline(always)]
    unsafe fn begin_leaf(&mut self, tokens: usize) {
        for sum in &mut self.leaf[..tokens] {
            // SAFETY: the caller's contract.
            sum.write(unsafe { L::splat(0.0) });
        }
    }

    /// Puts the leaf with those that wait, then adds the two topmost `merges` times, lower one first.
    ///
    /// # Safety
    /// As [`Lanes`]; the leaf was begun with as many tokens, as were those before it.
    #[inline(always)]
    unsafe fn end_leaf(&mut self, tokens: usize, merges: u8) {
        let kept = self.depth - usize::from(merges);
        for token in 0..tokens {
            // SAFETY: the leaf and all below `depth` were written for these tokens.
            unsafe {
                let mut top = self.leaf[token].assume_init();
                for lower in self.waiting[kept..self.depth].iter().rev() {
                    top = lower[token].assume_init().add(top);
                }
                self.waiting[kept][token].write(top);
            }
        }
        self.depth = kept + 1;
    }
}

/// # Safety
/// All pointers hold what the task's numbers say; nobody else writes the task's rows of `out`.
#[inline(always)]
unsafe fn rows_body<L: IntegerLanes, F: Format>(task: QuantizedTask<'_>) {
    let mut parts = [const { Part::unwritten() }; CHUNK];
    let mut sums = Sums::<L> { leaf: [MaybeUninit::uninit(); TOKEN_BLOCK], waiting: [[MaybeUninit::uninit(); TOKEN_BLOCK]; 4], depth: 0 };
    // At least one token tile, for rows so wide that the cache does not hold one token.
    let token_block = (TOKEN_BLOCK_BYTES / (task.matrix.parts * PART)).next_multiple_of(8).clamp(8, TOKEN_BLOCK);
    let mut first_token = 0;
    while first_token < task.tokens {
        let tokens = first_token..task.tokens.min(first_token + token_block);
        first_token = tokens.end;
        let mut row = task.rows.start;
        while row < task.rows.end {
            // The last tile of a matrix reaches back over rows that are not its own, and does not store them.
            let first_row = row.min(task.matrix.rows - LANES);
            let tile = RowTile { first_row, first_lane: row - first_row, end_lane: LANES.min(task.rows.end - first_row) };
            row = first_row + tile.end_lane;
            // SAFETY: 16 rows from `first_row` exist, and the tokens do.
            unsafe {
                sum_tile::<L, F>(&task, tile.first_row, tokens.clone(), &mut parts, &mut sums);
                for (index, token) in tokens.clone().enumerate() {
                    store_lanes(&task, &tile, token, sums.waiting[0][index].assume_init());
                }
            }
        }
    }
}

/// Sums 16 rows with some tokens, all leaves: the totals are then the first that wait.
///
/// # Safety
/// As [`rows_body`]; the rows and the tokens exist.
#[inline(always)]
unsafe fn sum_tile<L: IntegerLanes, F: Format>(
    task: &QuantizedTask<'_>,
    first_row: usize,
    tokens: Range<usize>,
    parts: &mut [Part; CHUNK],
    sums: &mut Sums<L>,
) {
    // SAFETY: the caller's contract.
    unsafe {
        match tokens.len() {
            1 if F::PARTS == 1 => return sum_few::<L, F, 1>(task, first_row, tokens.start, sums),
            2 if F::PARTS == 1 => return sum_few::<L, F, 2>(task, first_row, tokens.start, sums),
            4 if F::PARTS == 1 => return sum_few::<L, F, 4>(task, first_row, tokens.start, sums),
            _ => {}
        }
    }
    let MatrixView { base, stride, parts: row_parts, leaf_ends, merges, .. } = task.matrix;
    let count = tokens.len();
    sums.depth = 0;
    let mut block = 0;
    // SAFETY: block < leaf_end, the last of which is the row's, and the caller's contract.
    unsafe {
        let weights = base.add(first_row * stride);
        let next_rows = task.matrix.after::<F>(weights);
        for (&leaf_end, &merges) in leaf_ends.iter().zip(merges) {
            sums.begin_leaf(count);
            while block < leaf_end {
                let blocks = (SMALL_BLOCKS / F::PARTS).max(1).min(leaf_end - block);
                // Half before and half after unpacking: too many at once make it wait.
                let (start, end) = (block * F::BYTES, (block + blocks) * F::BYTES);
                let middle = (start + end) / 2;
                next_rows.prefetch(start..middle);
                for index in 0..blocks {
                    let parts = &mut parts[index * F::PARTS..(index + 1) * F::PARTS];
                    F::unpack::<L::Words>(weights.add((block + index) * F::BYTES), stride, parts);
                }
                next_rows.prefetch(middle..end);
                let tokens = task.activations.after(tokens.start * row_parts + block * F::PARTS);
                multiply_tokens::<L::Words, F>(&parts[..blocks * F::PARTS], tokens, count, sums.leaf.as_mut_ptr().cast());
                block += blocks;
            }
            sums.end_leaf(count, merges);
        }
    }
}

/// As [`sum_tile`] for M tokens and blocks of one part: what is unpacked stays in registers, as do the sums of a leaf.
/// With so few tokens to share it, writing it to memory would cost more than multiplying it.
///
/// # Safety
/// As [`sum_tile`].
#[inline(always)]
unsafe fn sum_few<L: IntegerLanes, F: Format, const M: usize>(
    task: &QuantizedTask<'_>,
    first_row: usize,
    first_token: usize,
    sums: &mut Sums<L>,
) {
    let MatrixView { base, stride, parts: row_parts, leaf_ends, merges, .. } = task.matrix;
    sums.depth = 0;
    let mut block = 0;
    // SAFETY: block < leaf_end, the last of which is the row's, and the caller's contract.
    unsafe {
        let weights = base.add(first_row * stride);
        let next_rows = task.matrix.after::<F>(weights);
        for (&leaf_end, &merges) in leaf_ends.iter().zip(merges) {
            let mut leaf = [L::splat(0.0); M];
            while block < leaf_end {
                next_rows.prefetch(block * F::BYTES..(block + 1) * F::BYTES);
                let mut part = [Part::unwritten()];
                F::unpack::<L::Words>(weights.add(block * F::BYTES), stride, &mut part);
                let tokens = task.activations.after(first_token * row_parts + block);
                multiply::<L::Words, F, M>(&part, tokens, leaf.as_mut_ptr());
                block += 1;
            }
            for (sum, leaf) in sums.leaf.iter_mut().zip(leaf) {
                sum.write(leaf);
            }
            sums.end_leaf(M, merges);
        }
    }
}

/// Parts × `count` tokens, as many at a time as the registers hold.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
unsafe fn multiply_tokens<W: Words, F: Format>(parts: &[Part], tokens: TokenBlocks, count: usize, sums: *mut W::Floats) {
    let mut token = 0;
    while token < count {
        // SAFETY: no more tokens are asked for than there are.
        unsafe {
            let tokens = tokens.after(token * tokens.blocks);
            let sums = sums.add(token);
            token += match count - token {
                8.. if W::TOKENS >= 8 => {
                    multiply::<W, F, 8>(parts, tokens, sums);
                    8
                }
                4.. => {
                    multiply::<W, F, 4>(parts, tokens, sums);
                    4
                }
                2.. => {
                    multiply::<W, F, 2>(parts, tokens, sums);
                    2
                }
                _ => {
                    multiply::<W, F, 1>(parts, tokens, sums);
                    1
                }
            };
        }
    }
}

/// Adds the bias and stores the tile's own lanes.
///
/// # Safety
/// As [`rows_body`].
#[inline(always)]
unsafe fn store_lanes<L: Lanes>(task: &QuantizedTask<'_>, tile: &RowTile, token: usize, total: L) {
    // SAFETY: rows first_row + lane are rows of the matrix, of `bias` and of `out`.
    unsafe {
        let mut total = total;
        if let Some(bias) = task.bias {
            total = total.add(L::load(bias.add(tile.first_row)));
        }
        let out = task.out.add(token * task.out_width + tile.first_row);
        if tile.first_lane == 0 {
            total.store_partial(out, tile.end_lane);
        } else {
            let mut values = [0.0; LANES];
            total.store(values.as_mut_ptr());
            for (lane, value) in values.iter().enumerate().take(tile.end_lane).skip(tile.first_lane) {
                *out.add(lane) = *value;
            }
        }
    }
}

kernel! {
    /// Computes a task with lanes = rows; `F` is the weight's format.
    ///
    /// # Safety
    /// All pointers hold what the task's numbers say; nobody else writes the task's rows of `out`.
    unsafe fn format_rows<F: Format>(task: QuantizedTask<'_>) = rows_body
}

/// Computes a task whose weight is of a quantized type.
///
/// # Safety
/// All pointers hold what the task's numbers say; nobody else writes the task's rows of `out`.
pub(crate) unsafe fn quantized_rows(path: CpuPath, dtype: DType, task: QuantizedTask<'_>) {
    use blocks32::{Iq4Nl, Mxfp4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
    use blocks256::{Iq4Xs, Q2K, Q3K, Q4K, Q5K, Q6K};
    // SAFETY: the caller's contract.
    unsafe {
        match dtype {
            DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3 => unreachable!("{dtype} is not quantized"),
            DType::Q4_0 => format_rows::<Q4_0>(path, task),
            DType::Q4_1 => format_rows::<Q4_1>(path, task),
            DType::Q5_0 => format_rows::<Q5_0>(path, task),
            DType::Q5_1 => format_rows::<Q5_1>(path, task),
            DType::Q8_0 => format_rows::<Q8_0>(path, task),
            DType::Q2_K => format_rows::<Q2K>(path, task),
            DType::Q3_K => format_rows::<Q3K>(path, task),
            DType::Q4_K => format_rows::<Q4K>(path, task),
            DType::Q5_K => format_rows::<Q5K>(path, task),
            DType::Q6_K => format_rows::<Q6K>(path, task),
            DType::IQ4_NL => format_rows::<Iq4Nl>(path, task),
            DType::IQ4_XS => format_rows::<Iq4Xs>(path, task),
            DType::MXFP4 => format_rows::<Mxfp4>(path, task),
        }
    }
}
