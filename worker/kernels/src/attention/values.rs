//! The weighted sum of a chunk's values.
//!
//! A sum runs over the query's own positions in order; a tile of queries only shares the loads.

// Indices name the queries and vectors of a register tile; several arrays share them.
#![allow(clippy::needless_range_loop)]

use super::{AttentionTask, CHUNK, Scratch, clip};
use crate::lanes::{Element, LANES, Lanes};

/// Most vectors of a head's dimensions accumulated together.
const VALUE_VECTORS: usize = 4;

/// Σ weight · value of every query over its keys in the chunk. Keys that a tile's queries all see go through
/// the tile together; the rest before and after, query by query.
///
/// # Safety
/// As [`super::attend`].
#[inline(always)]
pub(super) unsafe fn weigh_chunk<L: Lanes, E: Element>(task: &AttentionTask<'_>, scratch: &Scratch<E>, keys: (usize, usize)) {
    let queries = task.queries();
    // SAFETY: queries and positions stay within the task's.
    unsafe {
        for index in 0..queries * task.value_dim {
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

/// Multiplies every weight by its value's scale. A position's scale is read once for all queries.
///
/// # Safety
/// As [`super::attend`].
#[inline(always)]
pub(super) unsafe fn scale_weights<L: Lanes>(task: &AttentionTask<'_>, scores: *mut f32, keys: (usize, usize)) {
    for first in (keys.0 / LANES * LANES..keys.1).step_by(LANES) {
        // SAFETY: positions below keys.1 have blocks in the table; vectors lie within the chunk.
        unsafe {
            let scales = value_scales::<L>(task, first, keys);
            for query in 0..task.queries() {
                // Keys that a query does not see are left with anything; their weights are not read.
                let weights = scores.add(query * CHUNK + first % CHUNK);
                L::load(weights).mul(scales).store(weights);
            }
        }
    }
}

/// The scales of sixteen values from `first`, a multiple of 16; anything for positions outside `keys`.
///
/// # Safety
/// As [`super::attend`]; first < keys.1.
#[inline(always)]
unsafe fn value_scales<L: Lanes>(task: &AttentionTask<'_>, first: usize, keys: (usize, usize)) -> L {
    // SAFETY: positions below keys.1 have blocks in the table.
    unsafe {
        let at = |position: usize| {
            let block = *task.block_table.get_unchecked(position / task.block_size) as usize;
            task.value_scales.add(block * task.block_slots + position % task.block_size)
        };
        if task.block_size.is_multiple_of(LANES) {
            return L::load_bf16(at(first));
        }
        let mut scales = [0_u16; LANES];
        for position in first.max(keys.0)..keys.1.min(first + LANES) {
            scales[position - first] = *at(position);
        }
        L::load_bf16(scales.as_ptr())
    }
}

/// Q queries over positions `keys`, all dimensions.
///
/// # Safety
/// As [`super::attend`].
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
    while dim < task.value_dim {
        let rest = task.value_dim - dim;
        // SAFETY: dim stays below value_dim.
        unsafe {
            if Q * VALUE_VECTORS <= L::SUMS && rest >= VALUE_VECTORS * LANES {
                weigh_tile::<L, E, Q, VALUE_VECTORS>(task, scratch, query, keys, dim);
                dim += VALUE_VECTORS * LANES;
            } else if Q * VALUE_VECTORS > L::SUMS && Q * 2 <= L::SUMS && rest >= 2 * LANES {
                weigh_tile::<L, E, Q, 2>(task, scratch, query, keys, dim);
                dim += 2 * LANES;
            } else if rest >= LANES {
                weigh_tile::<L, E, Q, 1>(task, scratch, query, keys, dim);
                dim += LANES;
            } else {
                for index in query..query + Q {
                    weigh_rest::<L, E>(task, scratch, index, keys, dim);
                }
                dim = task.value_dim;
            }
        }
    }
}

/// Q queries × V vectors of dimensions.
///
/// # Safety
/// As [`super::attend`]; dim + 16 · V ≤ value_dim.
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
        let chunk = scratch.chunk.add(query * task.value_dim + dim);
        let mut sums = [[L::splat(0.0); V]; Q];
        for q in 0..Q {
            for v in 0..V {
                sums[q][v] = L::load(chunk.add(q * task.value_dim + v * LANES));
            }
        }
        let mut position = keys.0;
        while position < keys.1 {
            let block = *task.block_table.get_unchecked(position / task.block_size) as usize;
            let offset = position % task.block_size;
            let count = (task.block_size - offset).min(keys.1 - position);
            let mut row = task.values.cast::<E>().add(block * task.value_stride + offset * task.value_dim + dim);
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
                row = row.wrapping_add(task.value_dim);
            }
            position += count;
        }
        for q in 0..Q {
            for v in 0..V {
                sums[q][v].store(chunk.add(q * task.value_dim + v * LANES));
            }
        }
    }
}

/// One query's last dimensions, fewer than 16.
///
/// # Safety
/// As [`super::attend`]; dim < value_dim < dim + 16.
#[inline(always)]
unsafe fn weigh_rest<L: Lanes, E: Element>(task: &AttentionTask<'_>, scratch: &Scratch<E>, query: usize, keys: (usize, usize), dim: usize) {
    let count = task.value_dim - dim;
    // SAFETY: positions below keys.1 have blocks in the table.
    unsafe {
        let chunk = scratch.chunk.add(query * task.value_dim + dim);
        let mut sum = L::load_partial(chunk, count);
        for position in keys.0..keys.1 {
            let block = task.block_table[position / task.block_size] as usize;
            let offset = block * task.value_stride + position % task.block_size * task.value_dim + dim;
            let value = E::load_partial::<L>(task.values.cast::<E>().add(offset), count);
            sum = L::splat(*scratch.scores.add(query * CHUNK + position % CHUNK)).mul_add(value, sum);
        }
        sum.store_partial(chunk, count);
    }
}
