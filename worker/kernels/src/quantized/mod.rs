//! Products with quantized weights (Q4_0, Q4_1, Q8_0), read in place where they are mapped.
//!
//! A block's dot product is an exact integer. In f32, per leaf and in the order of its blocks, there is one
//! accumulator per (row, token): acc = fma(dot, d_weight · d_activation, acc), and for Q4_1 then
//! acc = fma(m_weight, s_activation, acc). Leaves are added in the tree's order. Vector lanes are different
//! outputs (16 rows), never parts of one sum: every path gives equal bits.

// Indices name the rows, tokens and vectors of a register tile; several arrays share them.
#![allow(clippy::needless_range_loop)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use std::ops::Range;

use crate::lanes::{LANES, Lanes, LeafStack, kernel};
use crate::quantize::BLOCK;

/// A block format of weights.
pub(crate) trait Format: Copy + Send + Sync + 'static {
    /// Bytes of a block.
    const BYTES: usize;
    /// Where the 4- or 8-bit values begin in it.
    const VALUES: usize;
    /// Whether values are nibbles (else signed bytes).
    const NIBBLES: bool;
    /// Subtracted from every nibble.
    const OFFSET: i32;
    /// Whether a minimum follows the scale.
    const MINIMUM: bool;
}

/// See [`crate::DType::Q4_0`].
#[derive(Clone, Copy)]
pub(crate) struct Q4_0;
/// See [`crate::DType::Q4_1`].
#[derive(Clone, Copy)]
pub(crate) struct Q4_1;
/// See [`crate::DType::Q8_0`].
#[derive(Clone, Copy)]
pub(crate) struct Q8_0;

impl Format for Q4_0 {
    const BYTES: usize = 18;
    const VALUES: usize = 2;
    const NIBBLES: bool = true;
    const OFFSET: i32 = 8;
    const MINIMUM: bool = false;
}

impl Format for Q4_1 {
    const BYTES: usize = 20;
    const VALUES: usize = 4;
    const NIBBLES: bool = true;
    const OFFSET: i32 = 0;
    const MINIMUM: bool = true;
}

impl Format for Q8_0 {
    const BYTES: usize = 34;
    const VALUES: usize = 2;
    const NIBBLES: bool = false;
    const OFFSET: i32 = 0;
    const MINIMUM: bool = false;
}

/// Activations of consecutive tokens at one block.
#[derive(Clone, Copy)]
pub(crate) struct TokenBlocks {
    /// 32 values of the first token.
    pub(crate) values: *const i8,
    /// Σ values of the first token.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "the portable path needs no correction"))]
    pub(crate) sums: *const i32,
    /// Blocks per token: the next token is this many blocks on.
    pub(crate) blocks: usize,
}

/// One block of each of 16 rows: lanes are rows.
#[derive(Clone, Copy)]
pub(crate) struct RowBlocks<L: BlockDots> {
    /// The integers, as the path likes them.
    pub(crate) values: L::Values,
    /// The scales.
    pub(crate) scale: L,
    /// The minima, for a format with one; else zero.
    pub(crate) minimum: L,
}

/// The only part that each path writes for itself.
pub(crate) trait BlockDots: Lanes {
    /// The integers of 16 rows' blocks.
    type Values: Copy;

    /// Reads one block of 16 rows.
    ///
    /// # Safety
    /// As [`Lanes`]. `weights` is the block in the first row; the next row is `stride` bytes on.
    unsafe fn load_rows<F: Format>(weights: *const u8, stride: usize) -> RowBlocks<Self>;

    /// Integer dot products of 16 rows' blocks with M tokens.
    ///
    /// # Safety
    /// As [`Lanes`]; M tokens exist, and so do the rows that were loaded.
    unsafe fn dots<F: Format, const M: usize>(values: &Self::Values, tokens: TokenBlocks) -> [Self; M];
}

/// Where 16 rows' blocks lie: for paths that read the integers when they need them.
#[derive(Clone, Copy)]
pub(crate) struct RowPointers {
    pub(crate) first: *const u8,
    pub(crate) stride: usize,
}

impl RowPointers {
    /// [`BlockDots::load_rows`], leaving the integers where they are.
    ///
    /// # Safety
    /// As [`BlockDots::load_rows`].
    #[inline(always)]
    unsafe fn load<L: BlockDots<Values = RowPointers>, F: Format>(weights: *const u8, stride: usize) -> RowBlocks<L> {
        // SAFETY: the caller's contract.
        unsafe {
            RowBlocks {
                values: RowPointers { first: weights, stride },
                scale: load_halves(weights, stride),
                minimum: if F::MINIMUM { load_halves(weights.add(2), stride) } else { L::splat(0.0) },
            }
        }
    }
}

/// An f16 of each of 16 rows.
///
/// # Safety
/// As [`BlockDots::load_rows`], for the f16 at `first`.
#[inline(always)]
unsafe fn load_halves<L: Lanes>(first: *const u8, stride: usize) -> L {
    let mut halves = [0_u16; LANES];
    for (row, half) in halves.iter_mut().enumerate() {
        // SAFETY: the caller's contract.
        *half = unsafe { first.add(row * stride).cast::<u16>().read_unaligned() };
    }
    // SAFETY: 16 values.
    unsafe { L::load_f16(halves.as_ptr()) }
}

/// A matrix as the kernels see it: at least 16 rows of whole blocks.
#[derive(Clone, Copy)]
pub(crate) struct MatrixView<'a> {
    /// Row 0, block 0; no alignment.
    pub(crate) base: *const u8,
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    pub(crate) blocks: usize,
    /// Where each leaf ends, in blocks; merges after each.
    pub(crate) leaf_ends: &'a [usize],
    pub(crate) merges: &'a [u8],
}

/// Quantized activations of the tokens of one task.
#[derive(Clone, Copy)]
pub(crate) struct ActivationView {
    /// `[tokens][blocks · 32]`
    pub(crate) values: *const i8,
    /// `[tokens][blocks]`, each.
    pub(crate) scales: *const f32,
    pub(crate) scaled_sums: *const f32,
    pub(crate) sums: *const i32,
}

/// One task: some rows times all its tokens.
#[derive(Clone)]
pub(crate) struct QuantizedTask<'a> {
    pub(crate) matrix: MatrixView<'a>,
    pub(crate) rows: Range<usize>,
    pub(crate) activations: ActivationView,
    pub(crate) tokens: usize,
    pub(crate) bias: Option<*const f32>,
    pub(crate) out: *mut f32,
    pub(crate) out_width: usize,
}

/// Bytes of activations that stay in a core's cache while a task's rows pass over them.
const TOKEN_BLOCK_BYTES: usize = 256 << 10;

/// 16 rows, of which lanes `first_lane..end_lane` are the task's.
struct RowTile {
    first_row: usize,
    first_lane: usize,
    end_lane: usize,
}

/// # Safety
/// All pointers hold what the task's numbers say; nobody else writes the task's rows of `out`.
#[inline(always)]
unsafe fn rows_body<L: BlockDots, F: Format>(task: QuantizedTask<'_>) {
    // At least one token tile, for rows so wide that the cache does not hold one token.
    let token_block = (TOKEN_BLOCK_BYTES / (task.matrix.blocks * BLOCK)).next_multiple_of(8).max(8);
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
            unsafe { tile_tokens::<L, F>(&task, &tile, tokens.clone()) };
        }
    }
}

/// 16 rows × some tokens, as many at a time as the registers hold.
///
/// # Safety
/// As [`rows_body`]; the tokens exist.
#[inline(always)]
unsafe fn tile_tokens<L: BlockDots, F: Format>(task: &QuantizedTask<'_>, tile: &RowTile, tokens: Range<usize>) {
    let mut token = tokens.start;
    while token < tokens.end {
        // SAFETY: no more tokens are asked for than there are.
        unsafe {
            token += match tokens.end - token {
                8.. => row_tile::<L, F, 8>(task, tile, token),
                4.. => row_tile::<L, F, 4>(task, tile, token),
                2.. => row_tile::<L, F, 2>(task, tile, token),
                _ => row_tile::<L, F, 1>(task, tile, token),
            };
        }
    }
}

/// 16 rows × M tokens; returns M.
///
/// # Safety
/// As [`rows_body`]; tokens token..token + M exist.
#[inline(always)]
unsafe fn row_tile<L: BlockDots, F: Format, const M: usize>(task: &QuantizedTask<'_>, tile: &RowTile, token: usize) -> usize {
    let MatrixView { base, stride, blocks, leaf_ends, merges, .. } = task.matrix;
    // SAFETY: block < blocks, and the caller's contract.
    unsafe {
        let weights = base.add(tile.first_row * stride);
        let values = task.activations.values.add(token * blocks * BLOCK);
        let scales = task.activations.scales.add(token * blocks);
        let scaled_sums = task.activations.scaled_sums.add(token * blocks);
        let sums = task.activations.sums.add(token * blocks);
        let mut stack = LeafStack::<L, M>::new(L::splat(0.0));
        let mut block = 0;
        for (&leaf_end, &merges) in leaf_ends.iter().zip(merges) {
            let mut accumulators = [L::splat(0.0); M];
            while block < leaf_end {
                prefetch_next_rows::<F>(weights, stride, block, blocks);
                let rows = L::load_rows::<F>(weights.add(block * F::BYTES), stride);
                let tokens = TokenBlocks { values: values.add(block * BLOCK), sums: sums.add(block), blocks };
                let dots = L::dots::<F, M>(&rows.values, tokens);
                for m in 0..M {
                    let scale = rows.scale.mul(L::splat(*scales.add(m * blocks + block)));
                    accumulators[m] = dots[m].mul_add(scale, accumulators[m]);
                }
                if F::MINIMUM {
                    for m in 0..M {
                        let sum = L::splat(*scaled_sums.add(m * blocks + block));
                        accumulators[m] = rows.minimum.mul_add(sum, accumulators[m]);
                    }
                }
                block += 1;
            }
            stack.push(accumulators, merges);
        }
        let totals = stack.total();
        for (m, total) in totals.into_iter().enumerate() {
            store_lanes(task, tile, token + m, total);
        }
    }
    M
}

/// Asks for the part of the next 16 rows that lies as far on as this block.
#[inline(always)]
fn prefetch_next_rows<F: Format>(weights: *const u8, stride: usize, block: usize, blocks: usize) {
    #[cfg(target_arch = "x86_64")]
    if stride == blocks * F::BYTES {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let start = weights.wrapping_add((LANES * blocks + LANES * block) * F::BYTES);
        let mut line = 0;
        while line < LANES * F::BYTES {
            // SAFETY: a prefetch may name any address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(line).cast()) };
            line += 64;
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (weights, stride, block, blocks);
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
    pub(crate) unsafe fn quantized_rows<F: Format>(task: QuantizedTask<'_>) = rows_body
}
