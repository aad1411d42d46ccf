//! From queries and keys to the exponentials of a chunk.
//!
//! A score's bits depend on its query and its key alone; a chunk's maximum and sum on the query's own scores.

// Indices name the queries and vectors of a register tile; several arrays share them.
#![allow(clippy::needless_range_loop)]

use super::{AttentionTask, CHUNK, Scratch, Softmax};
use crate::exp::exp;
use crate::lanes::{Element, LANES, Lanes};

/// Vectors of keys scored together.
pub(super) const KEY_VECTORS: usize = 4;

/// Scores of all queries for the chunk's keys; lanes outside `keys` hold anything.
///
/// # Safety
/// As [`super::attend`].
#[inline(always)]
pub(super) unsafe fn score_chunk<L: Lanes, E: Element>(task: &AttentionTask<'_>, scratch: &Scratch<E>, keys: (usize, usize)) {
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
/// As [`super::attend`].
#[inline(always)]
unsafe fn score_vectors<L: Lanes, E: Element, const K: usize>(task: &AttentionTask<'_>, scratch: &Scratch<E>, position: usize, end: usize) {
    // SAFETY: every vector begins below `end`; queries stay below `task.queries()`.
    unsafe {
        let mut keys = [std::ptr::null::<E>(); K];
        let mut scales = [std::ptr::null::<u16>(); K];
        let mut stride = task.block_size;
        if task.block_size.is_multiple_of(LANES) {
            for vector in 0..K {
                let at = position + vector * LANES;
                let block = *task.block_table.get_unchecked(at / task.block_size) as usize;
                keys[vector] = task.keys.cast::<E>().add(block * task.key_stride + at % task.block_size);
                if E::SCALED {
                    scales[vector] = task.key_scales.add(block * task.block_slots + at % task.block_size);
                }
            }
        } else {
            stride = K * LANES;
            gather_keys(task, scratch, position, end, K * LANES);
            for vector in 0..K {
                keys[vector] = scratch.keys.add(vector * LANES);
                scales[vector] = scratch.scales.add(vector * LANES);
            }
        }
        let tile = KeyTile { keys, scales, stride, out: scratch.scores.add(position % CHUNK) };
        let mut query = 0;
        while query < task.queries() {
            query += match task.queries() - query {
                4.. => score_tile::<L, E, 4, K>(task, query, &tile),
                3 => score_tile::<L, E, 3, K>(task, query, &tile),
                2 => score_tile::<L, E, 2, K>(task, query, &tile),
                _ => score_tile::<L, E, 1, K>(task, query, &tile),
            };
        }
    }
}

/// K vectors of keys.
struct KeyTile<E, const K: usize> {
    keys: [*const E; K],
    /// Used where the type has scales.
    scales: [*const u16; K],
    /// Elements from one dimension to the next.
    stride: usize,
    /// The first query's scores of these keys.
    out: *mut f32,
}

/// Brings `width` keys from `position` side by side, `[head_dim][width]`, and their scales; keys at `end` and later are
/// zero.
///
/// # Safety
/// As [`super::attend`]; `width` is at most [`KEY_VECTORS`] vectors.
unsafe fn gather_keys<E: Element>(task: &AttentionTask<'_>, scratch: &Scratch<E>, position: usize, end: usize, width: usize) {
    let to = scratch.keys;
    for lane in 0..width {
        let at = position + lane;
        // SAFETY: blocks of positions below `end` are in the table.
        unsafe {
            if at < end {
                let block = task.block_table[at / task.block_size] as usize;
                let from = task.keys.cast::<E>().add(block * task.key_stride + at % task.block_size);
                for dim in 0..task.head_dim {
                    *to.add(dim * width + lane) = *from.add(dim * task.block_size);
                }
                if E::SCALED {
                    *scratch.scales.add(lane) = *task.key_scales.add(block * task.block_slots + at % task.block_size);
                }
            } else {
                for dim in 0..task.head_dim {
                    *to.add(dim * width + lane) = E::ZERO;
                }
                *scratch.scales.add(lane) = 0;
            }
        }
    }
}

/// Q queries × K vectors of keys, as many vectors at a time as the registers hold sums of; returns Q.
///
/// # Safety
/// As [`super::attend`].
#[inline(always)]
unsafe fn score_tile<L: Lanes, E: Element, const Q: usize, const K: usize>(
    task: &AttentionTask<'_>,
    query: usize,
    tile: &KeyTile<E, K>,
) -> usize {
    // SAFETY: the caller's contract; vectors stay below K.
    unsafe {
        if Q * K <= L::SUMS {
            score_part::<L, E, Q, K, K>(task, query, tile, 0);
        } else if Q * 2 <= L::SUMS && K.is_multiple_of(2) {
            for first in (0..K).step_by(2) {
                score_part::<L, E, Q, K, 2>(task, query, tile, first);
            }
        } else {
            for first in 0..K {
                score_part::<L, E, Q, K, 1>(task, query, tile, first);
            }
        }
    }
    Q
}

/// Q queries × P of a tile's vectors of keys, from vector `first`.
///
/// # Safety
/// As [`super::attend`]; first + P ≤ K.
#[inline(always)]
unsafe fn score_part<L: Lanes, E: Element, const Q: usize, const K: usize, const P: usize>(
    task: &AttentionTask<'_>,
    query: usize,
    tile: &KeyTile<E, K>,
    first: usize,
) {
    // SAFETY: dim < head_dim, queries exist.
    unsafe {
        let mut inputs = [std::ptr::null::<f32>(); Q];
        for (index, input) in inputs.iter_mut().enumerate() {
            let query = query + index;
            *input = task.q.add(query / task.group * task.q_width + query % task.group * task.head_dim);
        }
        let mut scores = [[L::splat(0.0); P]; Q];
        for dim in 0..task.head_dim {
            let mut key = [L::splat(0.0); P];
            for k in 0..P {
                key[k] = E::load::<L>(tile.keys[first + k].add(dim * tile.stride));
            }
            for q in 0..Q {
                let input = L::splat(*inputs[q].add(dim));
                for k in 0..P {
                    scores[q][k] = input.mul_add(key[k], scores[q][k]);
                }
            }
        }
        if E::SCALED {
            for k in 0..P {
                let scale = L::load_bf16(tile.scales[first + k]);
                for q in 0..Q {
                    scores[q][k] = scores[q][k].mul(scale);
                }
            }
        }
        let scale = L::splat(task.scale);
        for q in 0..Q {
            for k in 0..P {
                scores[q][k].mul(scale).store(tile.out.add((query + q) * CHUNK + (first + k) * LANES));
            }
        }
    }
}

/// Scores to exponentials for lanes `start..end` of a chunk, with their maximum and sum; zero in the rest of
/// the outermost vectors.
///
/// # Safety
/// `scores` holds [`CHUNK`] elements, start < end ≤ CHUNK.
#[inline(always)]
pub(super) unsafe fn normalize_chunk<L: Lanes>(softmax: &mut Softmax, scores: *mut f32, start: usize, end: usize) {
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
