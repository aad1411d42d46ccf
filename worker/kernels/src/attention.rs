//! Paged causal attention of a few query rows over one KV head.
//!
//! A score is one FMA chain over the head's dimensions (lanes are keys). Keys are taken in chunks of 256
//! absolute positions: per chunk the maximum, the sum of exponentials (16 lanes = position mod 16, halving
//! tree) and the weighted values (one FMA chain over positions, lanes are dimensions); chunks are combined in
//! order. All of it belongs to one (row, head): neighbours in the tile only share loads, so the bits depend
//! neither on the tile, nor on the block size, nor on what was already stored when the step began.

// Indices name the rows, tokens and vectors of a register tile; several arrays share them.
#![allow(clippy::needless_range_loop)]

use half::{bf16, f16};

use crate::dtype::KvDType;
use crate::exp::exp;
use crate::lanes::{Element, LANES, Lanes, kernel};
use crate::path::CpuPath;

/// Absolute positions per chunk.
pub(crate) const CHUNK: usize = 256;
/// Vectors of keys scored together.
const KEY_VECTORS: usize = 4;
/// Vectors of a head's dimensions accumulated together.
const VALUE_VECTORS: usize = 4;

/// One task: all query heads of one KV head, for a few consecutive rows of one sequence.
#[derive(Clone)]
pub(crate) struct AttentionTask<'a> {
    pub(crate) dtype: KvDType,
    /// First row, first query head of the group.
    pub(crate) q: *const f32,
    pub(crate) q_width: usize,
    pub(crate) out: *mut f32,
    pub(crate) out_width: usize,
    /// The layer's keys and values, at the KV head within block 0.
    pub(crate) keys: *const u8,
    pub(crate) values: *const u8,
    /// Elements from one block to the next.
    pub(crate) block_stride: usize,
    /// The sequence's blocks, each within the pool and enough for the last row's position.
    pub(crate) block_table: &'a [u32],
    pub(crate) block_size: usize,
    pub(crate) head_dim: usize,
    /// Query heads per KV head.
    pub(crate) group: usize,
    pub(crate) rows: usize,
    /// Position of the first row.
    pub(crate) first_position: usize,
    pub(crate) scale: f32,
    pub(crate) window: Option<u32>,
}

impl AttentionTask<'_> {
    fn queries(&self) -> usize {
        self.rows * self.group
    }

    /// Keys that a query sees.
    fn visible(&self, query: usize) -> (usize, usize) {
        let end = self.first_position + query / self.group + 1;
        let start = self.window.map_or(0, |window| end.saturating_sub(window as usize));
        (start, end)
    }

    /// Elements of f32 scratch that the task needs.
    pub(crate) fn scratch_elements(&self) -> usize {
        let queries = self.queries();
        queries * (CHUNK + 2 * self.head_dim + 4) + KEY_VECTORS * LANES * self.head_dim
    }
}

/// A query's running (max, sum) over chunks, and the present chunk's.
#[derive(Clone, Copy)]
struct Softmax {
    max: f32,
    sum: f32,
    chunk_max: f32,
    chunk_sum: f32,
}

/// The task's scratch, cut up.
struct Scratch<E> {
    /// [queries][CHUNK]: scores, then exponentials.
    scores: *mut f32,
    /// [queries][head_dim]: the chunk's weighted values.
    chunk: *mut f32,
    /// [queries][head_dim]: over all chunks so far.
    total: *mut f32,
    softmax: *mut Softmax,
    /// [head_dim][KEY_VECTORS · 16]: keys brought side by side, where blocks are too small for that.
    keys: *mut E,
}

impl<E> Scratch<E> {
    /// # Safety
    /// `base` holds the task's `scratch_elements`.
    #[inline(always)]
    unsafe fn new(task: &AttentionTask<'_>, base: *mut f32) -> Self {
        let queries = task.queries();
        // SAFETY: the parts add up to `scratch_elements`.
        unsafe {
            let chunk = base.add(queries * CHUNK);
            let total = chunk.add(queries * task.head_dim);
            let softmax = total.add(queries * task.head_dim);
            Scratch { scores: base, chunk, total, softmax: softmax.cast(), keys: softmax.add(4 * queries).cast() }
        }
    }
}

/// # Safety
/// The task's pointers hold what its numbers say; `scratch` holds `scratch_elements`; nobody else writes the
/// task's part of `out`.
#[inline(always)]
unsafe fn attention_body<L: Lanes, E: Element>(task: &AttentionTask<'_>, scratch: *mut f32) {
    let queries = task.queries();
    let (first, _) = task.visible(0);
    let (_, end) = task.visible(queries - 1);
    // SAFETY: chunks lie within first..end; the rest is the caller's contract.
    unsafe {
        let scratch = Scratch::<E>::new(task, scratch);
        for query in 0..queries {
            *scratch.softmax.add(query) = Softmax { max: f32::NEG_INFINITY, sum: 0.0, chunk_max: 0.0, chunk_sum: 0.0 };
        }
        for chunk in first / CHUNK..=(end - 1) / CHUNK {
            let start = chunk * CHUNK;
            let keys = (start.max(first), end.min(start + CHUNK));
            score_chunk::<L, E>(task, &scratch, keys);
            for query in 0..queries {
                let (from, to) = clip(task.visible(query), keys);
                if from < to {
                    normalize_chunk::<L>(&mut *scratch.softmax.add(query), scratch.scores.add(query * CHUNK), from - start, to - start);
                }
            }
            weigh_chunk::<L, E>(task, &scratch, keys);
            for query in 0..queries {
                let (from, to) = clip(task.visible(query), keys);
                if from < to {
                    combine::<L>(task, &scratch, query);
                }
            }
        }
        for query in 0..queries {
            let out = task.out.add(query / task.group * task.out_width + query % task.group * task.head_dim);
            let sum = L::splat((*scratch.softmax.add(query)).sum);
            let mut dim = 0;
            while dim < task.head_dim {
                let count = LANES.min(task.head_dim - dim);
                let total = L::load_partial(scratch.total.add(query * task.head_dim + dim), count);
                total.div(sum).store_partial(out.add(dim), count);
                dim += count;
            }
        }
    }
}

/// The part of a query's keys that lies in a chunk.
#[inline(always)]
fn clip(visible: (usize, usize), keys: (usize, usize)) -> (usize, usize) {
    (visible.0.max(keys.0), visible.1.min(keys.1))
}

/// Scores of all queries for the chunk's keys; lanes outside `keys` hold anything.
///
/// # Safety
/// As [`attention_body`].
#[inline(always)]
unsafe fn score_chunk<L: Lanes, E: Element>(task: &AttentionTask<'_>, scratch: &Scratch<E>, keys: (usize, usize)) {
    let mut position = keys.0 / LANES * LANES;
    while position < keys.1 {
        let vectors = if keys.1 - position > (KEY_VECTORS - 1) * LANES { KEY_VECTORS } else { 1 };
        // SAFETY: positions stay below keys.1, rounded up to whole vectors.
        unsafe {
            if vectors == KEY_VECTORS {
                score_vectors::<L, E, KEY_VECTORS>(task, scratch, position, keys.1);
            } else {
                score_vectors::<L, E, 1>(task, scratch, position, keys.1);
            }
        }
        position += vectors * LANES;
    }
}

/// Scores of all queries for K vectors of keys from `position`, a multiple of 16.
///
/// # Safety
/// As [`attention_body`].
#[inline(always)]
unsafe fn score_vectors<L: Lanes, E: Element, const K: usize>(task: &AttentionTask<'_>, scratch: &Scratch<E>, position: usize, end: usize) {
    // SAFETY: every vector begins below `end`; queries stay below `task.queries()`.
    unsafe {
        let mut keys = [std::ptr::null::<E>(); K];
        let mut stride = task.block_size;
        if task.block_size.is_multiple_of(LANES) {
            for (vector, keys) in keys.iter_mut().enumerate() {
                let at = position + vector * LANES;
                let block = *task.block_table.get_unchecked(at / task.block_size) as usize;
                *keys = task.keys.cast::<E>().add(block * task.block_stride + at % task.block_size);
            }
        } else {
            stride = K * LANES;
            gather_keys(task, scratch.keys, position, end, K * LANES);
            for (vector, keys) in keys.iter_mut().enumerate() {
                *keys = scratch.keys.add(vector * LANES);
            }
        }
        let out = scratch.scores.add(position % CHUNK);
        let mut query = 0;
        while query < task.queries() {
            query += match task.queries() - query {
                4.. => score_tile::<L, E, 4, K>(task, query, keys, stride, out),
                3 => score_tile::<L, E, 3, K>(task, query, keys, stride, out),
                2 => score_tile::<L, E, 2, K>(task, query, keys, stride, out),
                _ => score_tile::<L, E, 1, K>(task, query, keys, stride, out),
            };
        }
    }
}

/// Brings `width` keys from `position` side by side, [head_dim][width]; keys at `end` and later are zero.
///
/// # Safety
/// As [`attention_body`]; `to` holds head_dim · width elements.
unsafe fn gather_keys<E: Element>(task: &AttentionTask<'_>, to: *mut E, position: usize, end: usize, width: usize) {
    for lane in 0..width {
        let at = position + lane;
        // SAFETY: blocks of positions below `end` are in the table.
        unsafe {
            if at < end {
                let block = task.block_table[at / task.block_size] as usize;
                let from = task.keys.cast::<E>().add(block * task.block_stride + at % task.block_size);
                for dim in 0..task.head_dim {
                    *to.add(dim * width + lane) = *from.add(dim * task.block_size);
                }
            } else {
                for dim in 0..task.head_dim {
                    *to.add(dim * width + lane) = E::ZERO;
                }
            }
        }
    }
}

/// Q queries × K vectors of keys; returns Q.
///
/// # Safety
/// As [`attention_body`].
#[inline(always)]
unsafe fn score_tile<L: Lanes, E: Element, const Q: usize, const K: usize>(
    task: &AttentionTask<'_>,
    query: usize,
    keys: [*const E; K],
    stride: usize,
    out: *mut f32,
) -> usize {
    // SAFETY: dim < head_dim, queries exist.
    unsafe {
        let mut inputs = [std::ptr::null::<f32>(); Q];
        for (index, input) in inputs.iter_mut().enumerate() {
            let query = query + index;
            *input = task.q.add(query / task.group * task.q_width + query % task.group * task.head_dim);
        }
        let mut scores = [[L::splat(0.0); K]; Q];
        for dim in 0..task.head_dim {
            let mut key = [L::splat(0.0); K];
            for k in 0..K {
                key[k] = E::load::<L>(keys[k].add(dim * stride));
            }
            for q in 0..Q {
                let input = L::splat(*inputs[q].add(dim));
                for k in 0..K {
                    scores[q][k] = input.mul_add(key[k], scores[q][k]);
                }
            }
        }
        let scale = L::splat(task.scale);
        for q in 0..Q {
            for k in 0..K {
                scores[q][k].mul(scale).store(out.add((query + q) * CHUNK + k * LANES));
            }
        }
    }
    Q
}

/// Scores to exponentials for lanes `start..end` of a chunk, with their maximum and sum; zero in the rest of
/// the outermost vectors.
///
/// # Safety
/// `scores` holds [`CHUNK`] elements, start < end ≤ CHUNK.
#[inline(always)]
unsafe fn normalize_chunk<L: Lanes>(softmax: &mut Softmax, scores: *mut f32, start: usize, end: usize) {
    // SAFETY: vectors from start / 16 to (end − 1) / 16 lie within the chunk.
    unsafe {
        let first = start / LANES * LANES;
        let mut greatest = L::splat(f32::NEG_INFINITY);
        let mut at = first;
        while at < end {
            let kept = (start.saturating_sub(at), LANES.min(end - at));
            greatest = L::load(scores.add(at)).keep(kept.0, kept.1, f32::NEG_INFINITY).max(greatest);
            at += LANES;
        }
        softmax.chunk_max = greatest.greatest();
        let max = L::splat(softmax.chunk_max);
        let mut sum = L::splat(0.0);
        let mut at = first;
        while at < end {
            let kept = (start.saturating_sub(at), LANES.min(end - at));
            let weights = exp(L::load(scores.add(at)).sub(max)).keep(kept.0, kept.1, 0.0);
            weights.store(scores.add(at));
            sum = sum.add(weights);
            at += LANES;
        }
        softmax.chunk_sum = sum.sum();
    }
}

/// Σ weight · value of every query over its keys in the chunk. Keys that a tile's queries all see go through
/// the tile together; the rest before and after, query by query.
///
/// # Safety
/// As [`attention_body`].
#[inline(always)]
unsafe fn weigh_chunk<L: Lanes, E: Element>(task: &AttentionTask<'_>, scratch: &Scratch<E>, keys: (usize, usize)) {
    let queries = task.queries();
    // SAFETY: queries and positions stay within the task's.
    unsafe {
        for index in 0..queries * task.head_dim {
            *scratch.chunk.add(index) = 0.0;
        }
        let mut query = 0;
        while query < queries {
            let tile = (queries - query).min(4);
            // Later queries of a tile see later keys: the last one begins last, the first one ends first.
            let shared = (clip(task.visible(query + tile - 1), keys).0, clip(task.visible(query), keys).1);
            if shared.0 < shared.1 {
                for index in query..query + tile {
                    weigh_queries::<L, E, 1>(task, scratch, index, (clip(task.visible(index), keys).0, shared.0));
                }
                match tile {
                    4 => weigh_queries::<L, E, 4>(task, scratch, query, shared),
                    3 => weigh_queries::<L, E, 3>(task, scratch, query, shared),
                    2 => weigh_queries::<L, E, 2>(task, scratch, query, shared),
                    _ => weigh_queries::<L, E, 1>(task, scratch, query, shared),
                }
                for index in query..query + tile {
                    weigh_queries::<L, E, 1>(task, scratch, index, (shared.1, clip(task.visible(index), keys).1));
                }
            } else {
                for index in query..query + tile {
                    weigh_queries::<L, E, 1>(task, scratch, index, clip(task.visible(index), keys));
                }
            }
            query += tile;
        }
    }
}

/// Q queries over positions `keys`, all dimensions.
///
/// # Safety
/// As [`attention_body`].
#[inline(always)]
unsafe fn weigh_queries<L: Lanes, E: Element, const Q: usize>(
    task: &AttentionTask<'_>,
    scratch: &Scratch<E>,
    query: usize,
    keys: (usize, usize),
) {
    if keys.0 >= keys.1 {
        return;
    }
    let mut dim = 0;
    while dim < task.head_dim {
        let rest = task.head_dim - dim;
        // SAFETY: dim stays below head_dim.
        unsafe {
            if rest >= VALUE_VECTORS * LANES {
                weigh_tile::<L, E, Q, VALUE_VECTORS>(task, scratch, query, keys, dim);
                dim += VALUE_VECTORS * LANES;
            } else if rest >= LANES {
                weigh_tile::<L, E, Q, 1>(task, scratch, query, keys, dim);
                dim += LANES;
            } else {
                for index in query..query + Q {
                    weigh_rest::<L, E>(task, scratch, index, keys, dim);
                }
                dim = task.head_dim;
            }
        }
    }
}

/// Q queries × V vectors of dimensions.
///
/// # Safety
/// As [`attention_body`]; dim + 16 · V ≤ head_dim.
#[inline(always)]
unsafe fn weigh_tile<L: Lanes, E: Element, const Q: usize, const V: usize>(
    task: &AttentionTask<'_>,
    scratch: &Scratch<E>,
    query: usize,
    keys: (usize, usize),
    dim: usize,
) {
    // SAFETY: positions below keys.1 have blocks in the table.
    unsafe {
        let weights = scratch.scores.add(query * CHUNK);
        let chunk = scratch.chunk.add(query * task.head_dim + dim);
        let mut sums = [[L::splat(0.0); V]; Q];
        for q in 0..Q {
            for v in 0..V {
                sums[q][v] = L::load(chunk.add(q * task.head_dim + v * LANES));
            }
        }
        let mut position = keys.0;
        while position < keys.1 {
            let block = *task.block_table.get_unchecked(position / task.block_size) as usize;
            let offset = position % task.block_size;
            let count = (task.block_size - offset).min(keys.1 - position);
            let mut row = task.values.cast::<E>().add(block * task.block_stride + offset * task.head_dim + dim);
            for at in position..position + count {
                let mut value = [L::splat(0.0); V];
                for v in 0..V {
                    value[v] = E::load::<L>(row.add(v * LANES));
                }
                for q in 0..Q {
                    let weight = L::splat(*weights.add(q * CHUNK + at % CHUNK));
                    for v in 0..V {
                        sums[q][v] = weight.mul_add(value[v], sums[q][v]);
                    }
                }
                row = row.wrapping_add(task.head_dim);
            }
            position += count;
        }
        for q in 0..Q {
            for v in 0..V {
                sums[q][v].store(chunk.add(q * task.head_dim + v * LANES));
            }
        }
    }
}

/// One query's last dimensions, fewer than 16.
///
/// # Safety
/// As [`attention_body`]; dim < head_dim < dim + 16.
#[inline(always)]
unsafe fn weigh_rest<L: Lanes, E: Element>(task: &AttentionTask<'_>, scratch: &Scratch<E>, query: usize, keys: (usize, usize), dim: usize) {
    let count = task.head_dim - dim;
    // SAFETY: positions below keys.1 have blocks in the table.
    unsafe {
        let chunk = scratch.chunk.add(query * task.head_dim + dim);
        let mut sum = L::load_partial(chunk, count);
        for position in keys.0..keys.1 {
            let block = task.block_table[position / task.block_size] as usize;
            let offset = block * task.block_stride + position % task.block_size * task.head_dim + dim;
            let value = E::load_partial::<L>(task.values.cast::<E>().add(offset), count);
            sum = L::splat(*scratch.scores.add(query * CHUNK + position % CHUNK)).mul_add(value, sum);
        }
        sum.store_partial(chunk, count);
    }
}

/// (M, L, A) ⊕ (m, l, a): with M' = max(M, m), both sides are multiplied by exp(their max − M') and added.
///
/// # Safety
/// As [`attention_body`].
#[inline(always)]
unsafe fn combine<L: Lanes>(task: &AttentionTask<'_>, scratch: &Scratch<impl Element>, query: usize) {
    // SAFETY: the query exists.
    unsafe {
        let softmax = &mut *scratch.softmax.add(query);
        let chunk = scratch.chunk.add(query * task.head_dim);
        let total = scratch.total.add(query * task.head_dim);
        if softmax.max == f32::NEG_INFINITY {
            (softmax.max, softmax.sum) = (softmax.chunk_max, softmax.chunk_sum);
            std::ptr::copy_nonoverlapping(chunk, total, task.head_dim);
            return;
        }
        let max = if softmax.chunk_max > softmax.max { softmax.chunk_max } else { softmax.max };
        let (mut old, mut new) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        exp(L::splat(softmax.max - max)).store(old.as_mut_ptr());
        exp(L::splat(softmax.chunk_max - max)).store(new.as_mut_ptr());
        softmax.max = max;
        softmax.sum = softmax.chunk_sum.mul_add(new[0], softmax.sum * old[0]);
        let (old, new) = (L::splat(old[0]), L::splat(new[0]));
        let mut dim = 0;
        while dim < task.head_dim {
            let count = LANES.min(task.head_dim - dim);
            let scaled = L::load_partial(total.add(dim), count).mul(old);
            L::load_partial(chunk.add(dim), count).mul_add(new, scaled).store_partial(total.add(dim), count);
            dim += count;
        }
    }
}

kernel! {
    /// Computes a task; `E` is the pool's element type.
    ///
    /// # Safety
    /// As [`attend`].
    unsafe fn attend_elements<E: Element>(task: &AttentionTask<'_>, scratch: *mut f32) = attention_body
}

/// Computes a task.
///
/// # Safety
/// The task's pointers hold what its numbers say; `scratch` holds `scratch_elements`; nobody else writes the
/// task's part of `out`.
pub(crate) unsafe fn attend(path: CpuPath, task: &AttentionTask<'_>, scratch: *mut f32) {
    // SAFETY: the caller's contract.
    unsafe {
        match task.dtype {
            KvDType::F32 => attend_elements::<f32>(path, task, scratch),
            KvDType::F16 => attend_elements::<f16>(path, task, scratch),
            KvDType::BF16 => attend_elements::<bf16>(path, task, scratch),
        }
    }
}
