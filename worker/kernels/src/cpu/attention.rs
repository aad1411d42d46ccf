//! One attention call: its operands checked, and cut into tasks of a few rows and one KV head.
//!
//! How the rows are cut never shows in the results: every (row, head) is computed whole by one task.

use std::cell::RefCell;

use super::{CpuBackend, CpuBuffer, expect_at_least, expect_equal};
use crate::attention::{AttentionTask, TaskAlibi, attend};
use crate::backend::AttentionParams;
use crate::batch::{AttentionBatch, SequenceSlice};
use crate::error::{KernelError, Result};
use crate::kv::CpuKvPool;
use crate::memory::SharedPointer;

/// Query rows × heads that an attention task aims at: they share the loads of keys and values.
const ATTENTION_TILE: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// What [`crate::Backend::attention`] reads.
#[derive(Clone, Copy)]
pub(super) struct AttentionOperands<'a> {
    pub(super) q: &'a CpuBuffer,
    pub(super) pool: &'a CpuKvPool,
    pub(super) layer: usize,
    pub(super) batch: AttentionBatch<'a>,
    pub(super) params: AttentionParams<'a, CpuBackend>,
}

/// Computes all rows, on the backend's threads.
pub(super) fn attention(backend: &CpuBackend, operands: AttentionOperands<'_>, out: &mut CpuBuffer) -> Result<()> {
    operands.check(out)?;
    let AttentionOperands { q, pool, layer, batch, params } = operands;
    let shape = pool.shape;
    let group = params.heads / params.kv_heads;
    let tasks = attention_tiles(batch.sequences, rows_per_tile(group));
    let out_width = out.width;
    let target = SharedPointer::new(&mut out.values);
    backend.pool.run(tasks.len() * shape.kv_heads, |index| {
        let (tile, head) = (&tasks[index / shape.kv_heads], index % shape.kv_heads);
        let sequence = tile.sequence;
        let table_start = sequence.table_start as usize;
        let at = pool.offsets(layer, 0, head);
        let heads = head * group..(head + 1) * group;
        let task = AttentionTask {
            dtype: shape.dtype,
            q: q.row(tile.row)[heads.start * shape.head_dim..].as_ptr(),
            q_width: q.width,
            out: target.get().wrapping_add(tile.row * out_width + heads.start * shape.value_dim),
            out_width,
            keys: pool.keys[at.keys..].as_ptr(),
            values: pool.values[at.values..].as_ptr(),
            key_scales: pool.key_scales[at.scales..].as_ptr(),
            value_scales: pool.value_scales[at.scales..].as_ptr(),
            key_stride: shape.kv_heads * shape.block_size * shape.head_dim,
            value_stride: shape.kv_heads * shape.block_size * shape.value_dim,
            block_slots: shape.kv_heads * shape.block_size,
            block_table: &batch.block_tables[table_start..table_start + sequence.table_len as usize],
            block_size: shape.block_size,
            head_dim: shape.head_dim,
            value_dim: shape.value_dim,
            group,
            rows: tile.rows,
            first_position: sequence.first_position as usize + tile.row - sequence.row_start as usize,
            scale: params.scale,
            window: params.window,
            softcap: params.softcap,
            alibi: params.alibi.map(|alibi| TaskAlibi {
                slopes: &alibi.slopes.values()[heads.clone()],
                factor: alibi.factor,
                rounded: alibi.rounded,
            }),
            sinks: params.sinks.map(|sinks| &sinks.values()[heads]),
        };
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(scratch.len().max(task.scratch_elements()), 0.0);
            // SAFETY: `check` made sure of all sizes; each (tile, head) has one task.
            unsafe { attend(backend.path, &task, scratch.as_mut_ptr()) };
        });
    });
    Ok(())
}

/// A few consecutive rows of one sequence.
struct AttentionTile<'a> {
    sequence: &'a SequenceSlice,
    /// First row of the step.
    row: usize,
    rows: usize,
}

/// Rows per tile, so that rows × group is near [`ATTENTION_TILE`] and a multiple of 4 where that is possible.
fn rows_per_tile(group: usize) -> usize {
    let most = (ATTENTION_TILE / group).max(1);
    (1..=most).rev().find(|rows| (rows * group).is_multiple_of(4)).unwrap_or(most)
}

/// All tiles, those with the most keys first, so that the last to run are short.
fn attention_tiles(sequences: &[SequenceSlice], rows_per_tile: usize) -> Vec<AttentionTile<'_>> {
    let mut tiles = Vec::new();
    for sequence in sequences {
        let mut row = 0;
        while row < sequence.row_count as usize {
            let rows = rows_per_tile.min(sequence.row_count as usize - row);
            tiles.push(AttentionTile { sequence, row: sequence.row_start as usize + row, rows });
            row += rows;
        }
    }
    tiles.sort_by_key(|tile| {
        let last = tile.sequence.first_position as usize + tile.row - tile.sequence.row_start as usize;
        std::cmp::Reverse(last)
    });
    tiles
}

impl AttentionOperands<'_> {
    /// Everything the attention kernels rely on.
    fn check(&self, out: &CpuBuffer) -> Result<()> {
        let AttentionOperands { q, pool, layer, batch, params } = *self;
        const NAME: &str = "attention";
        let shape = pool.shape;
        expect_at_least(NAME, "layers", shape.layers, layer.saturating_add(1))?;
        expect_equal(NAME, "kv_heads", params.kv_heads, shape.kv_heads)?;
        expect_equal(NAME, "head_dim", params.head_dim, shape.head_dim)?;
        expect_equal(NAME, "value_dim", params.value_dim, shape.value_dim)?;
        expect_equal(NAME, "block_size", batch.block_size, shape.block_size)?;
        expect_at_least(NAME, "kv_heads", shape.kv_heads.min(shape.head_dim).min(shape.value_dim).min(shape.block_size), 1)?;
        expect_at_least(NAME, "heads", params.heads, params.kv_heads)?;
        expect_equal(NAME, "heads beyond whole groups", params.heads % params.kv_heads, 0)?;
        expect_equal(NAME, "q row", q.width, params.heads.saturating_mul(params.head_dim))?;
        expect_equal(NAME, "out row", out.width, params.heads.saturating_mul(params.value_dim))?;
        if let Some(alibi) = params.alibi {
            expect_equal(NAME, "alibi slopes", alibi.slopes.length, params.heads)?;
        }
        if let Some(sinks) = params.sinks {
            expect_equal(NAME, "sinks", sinks.length, params.heads)?;
        }
        if params.window == Some(0) {
            return Err(KernelError::Shape { operation: NAME, operand: "window", actual: 0, expected: 1 });
        }
        let mut next_row = 0;
        for sequence in batch.sequences {
            expect_equal(NAME, "row_start", sequence.row_start as usize, next_row)?;
            expect_at_least(NAME, "row_count", sequence.row_count as usize, 1)?;
            next_row += sequence.row_count as usize;
            let positions = sequence.first_position as usize + sequence.row_count as usize;
            let needed = positions.div_ceil(shape.block_size);
            expect_at_least(NAME, "block table of a sequence", sequence.table_len as usize, needed)?;
            let start = sequence.table_start as usize;
            expect_at_least(NAME, "block_tables", batch.block_tables.len(), start + sequence.table_len as usize)?;
            let greatest = batch.block_tables[start..start + needed].iter().max().map_or(0, |&block| block as usize + 1);
            expect_at_least(NAME, "pool blocks", shape.blocks, greatest)?;
        }
        expect_at_least(NAME, "q", q.rows, next_row)?;
        expect_at_least(NAME, "out", out.rows, next_row)
    }
}
