//! Paged causal attention of a few query rows over one KV head.
//!
//! A score is one FMA chain over the head's dimensions (lanes are keys). Keys are taken in chunks of 256
//! absolute positions: per chunk the maximum, the sum of exponentials (16 lanes = position mod 16, halving
//! tree) and the weighted values (one FMA chain over positions, lanes are dimensions); chunks are combined in
//! order. A cap, linear biases and, as if it were one more chunk at the end, a sink enter where a task has them.
//! Bytes are multiplied as integers in f32; a key's scale multiplies the finished chain, a value's scale the weight that
//! the softmax gives it. All of it belongs to one (row, head): neighbours in the tile only share loads, so the bits depend
//! neither on the tile, nor on the block size, nor on what was already stored when the step began.

mod bias;
mod scores;
mod values;

use half::{bf16, f16};

use bias::bias_chunk;
use scores::{KEY_VECTORS, normalize_chunk, score_chunk};
use values::{scale_weights, weigh_chunk};

use crate::dtype::KvDType;
use crate::exp::exp;
use crate::hadamard::{rotate, rotates};
use crate::lanes::{Element, LANES, Lanes, kernel};
use crate::path::CpuPath;

/// Absolute positions per chunk.
pub(crate) const CHUNK: usize = 256;

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
    /// Their bfloat16 scales, where the type has them.
    pub(crate) key_scales: *const u16,
    pub(crate) value_scales: *const u16,
    /// From one block to the next: elements of keys, elements of values, scales.
    pub(crate) key_stride: usize,
    pub(crate) value_stride: usize,
    pub(crate) block_slots: usize,
    /// The sequence's blocks, each within the pool and enough for the last row's position.
    pub(crate) block_table: &'a [u32],
    pub(crate) block_size: usize,
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
    /// Query heads per KV head.
    pub(crate) group: usize,
    pub(crate) rows: usize,
    /// Position of the first row.
    pub(crate) first_position: usize,
    pub(crate) scale: f32,
    pub(crate) window: Option<u32>,
    pub(crate) softcap: Option<f32>,
    pub(crate) alibi: Option<TaskAlibi<'a>>,
    /// Per query head of the group: a logit without a value.
    pub(crate) sinks: Option<&'a [f32]>,
}

/// A task's linear biases; see [`crate::backend::Alibi`].
#[derive(Clone, Copy)]
pub(crate) struct TaskAlibi<'a> {
    /// Per query head of the group.
    pub(crate) slopes: &'a [f32],
    pub(crate) factor: f32,
    pub(crate) rounded: bool,
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
        let rotated = if self.dtype.scale_bytes() > 0 { queries * self.head_dim } else { 0 };
        queries * (CHUNK + 2 * self.value_dim + 4) + KEY_VECTORS * LANES * (self.head_dim + 1) + rotated
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
    /// `[queries][CHUNK]`: scores, then exponentials.
    scores: *mut f32,
    /// `[queries][value_dim]`: the chunk's weighted values.
    chunk: *mut f32,
    /// `[queries][value_dim]`: over all chunks so far.
    total: *mut f32,
    softmax: *mut Softmax,
    /// `[head_dim][KEY_VECTORS · 16]`: keys brought side by side, where blocks are too small for that.
    keys: *mut E,
    /// `[KEY_VECTORS · 16]`: their scales.
    scales: *mut u16,
    /// `[queries][head_dim]`: the queries, rotated as keys of bytes are.
    queries: *mut f32,
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
            let total = chunk.add(queries * task.value_dim);
            let softmax = total.add(queries * task.value_dim);
            let scales = softmax.add(4 * queries);
            let keys = scales.add(KEY_VECTORS * LANES);
            let queries = keys.add(KEY_VECTORS * LANES * task.head_dim);
            Scratch { scores: base, chunk, total, softmax: softmax.cast(), keys: keys.cast(), scales: scales.cast(), queries }
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
        let rotated;
        let task = if E::SCALED && rotates(task.head_dim) {
            rotated = rotate_queries(task, scratch.queries);
            &rotated
        } else {
            task
        };
        for query in 0..queries {
            *scratch.softmax.add(query) = Softmax { max: f32::NEG_INFINITY, sum: 0.0, chunk_max: 0.0, chunk_sum: 0.0 };
        }
        for chunk in first / CHUNK..=(end - 1) / CHUNK {
            let start = chunk * CHUNK;
            let keys = (start.max(first), end.min(start + CHUNK));
            score_chunk::<L, E>(task, &scratch, keys);
            if task.softcap.is_some() || task.alibi.is_some() {
                bias_chunk::<L>(task, scratch.scores, keys);
            }
            for query in 0..queries {
                let (from, to) = clip(task.visible(query), keys);
                if from < to {
                    normalize_chunk::<L>(&mut *scratch.softmax.add(query), scratch.scores.add(query * CHUNK), from - start, to - start);
                }
            }
            if E::SCALED {
                scale_weights::<L>(task, scratch.scores, keys);
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
            if let Some(sinks) = task.sinks {
                let head = query % task.group;
                let softmax = &mut *scratch.softmax.add(query);
                (softmax.chunk_max, softmax.chunk_sum) = (*sinks.get_unchecked(head), 1.0);
                std::slice::from_raw_parts_mut(scratch.chunk.add(query * task.value_dim), task.value_dim).fill(0.0);
                combine::<L>(task, &scratch, query);
            }
            let out = task.out.add(query / task.group * task.out_width + query % task.group * task.value_dim);
            let sum = L::splat((*scratch.softmax.add(query)).sum);
            let mut dim = 0;
            while dim < task.value_dim {
                let count = LANES.min(task.value_dim - dim);
                let total = L::load_partial(scratch.total.add(query * task.value_dim + dim), count);
                total.div(sum).store_partial(out.add(dim), count);
                dim += count;
            }
            if E::SCALED {
                rotate(std::slice::from_raw_parts_mut(out, task.value_dim));
            }
        }
    }
}

/// Copies the task's queries to `to`, rotated as its keys are; returns the task that reads them there.
///
/// # Safety
/// As [`attention_body`]; `to` holds queries · head_dim values.
#[inline(always)]
unsafe fn rotate_queries<'a>(task: &AttentionTask<'a>, to: *mut f32) -> AttentionTask<'a> {
    let width = task.group * task.head_dim;
    for row in 0..task.rows {
        // SAFETY: the row's queries exist in both.
        unsafe {
            let queries = std::slice::from_raw_parts_mut(to.add(row * width), width);
            queries.copy_from_slice(std::slice::from_raw_parts(task.q.add(row * task.q_width), width));
            queries.chunks_exact_mut(task.head_dim).for_each(rotate);
        }
    }
    AttentionTask { q: to, q_width: width, ..task.clone() }
}

/// The part of a query's keys that lies in a chunk.
#[inline(always)]
fn clip(visible: (usize, usize), keys: (usize, usize)) -> (usize, usize) {
    (visible.0.max(keys.0), visible.1.min(keys.1))
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
        let chunk = scratch.chunk.add(query * task.value_dim);
        let total = scratch.total.add(query * task.value_dim);
        if softmax.max == f32::NEG_INFINITY {
            (softmax.max, softmax.sum) = (softmax.chunk_max, softmax.chunk_sum);
            std::ptr::copy_nonoverlapping(chunk, total, task.value_dim);
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
        while dim < task.value_dim {
            let count = LANES.min(task.value_dim - dim);
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
            KvDType::Int8 => attend_elements::<i8>(path, task, scratch),
        }
    }
}
