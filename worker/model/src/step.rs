//! One engine step: the plan that every rank receives, and the `StepModel` that executes it.
//!
//! The plan is plain data: the leading rank's engine makes it, and each rank computes its shard of it without
//! deciding anything. In one process it is handed over by reference; between processes it is sent.
//!
//! Invariant: a plan names every row, slot and block it touches; a rank needs nothing else to run it.

use forge_kernels::SequenceSlice;
use forge_shared::ids::Epoch;

use crate::ModelError;

/// What one step computes: a ragged batch of rows, one per token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepPlan {
    /// The plan's epoch: ranks refuse steps of an older one.
    pub epoch: Epoch,
    /// Counts the engine's steps within the epoch.
    pub step: u64,
    /// Token id per row.
    pub tokens: Vec<u32>,
    /// Absolute position per row.
    pub positions: Vec<u32>,
    /// KV slot per row: block · block_size + offset.
    pub slots: Vec<u32>,
    /// Sequences in row order.
    pub sequences: Vec<SequenceSlice>,
    /// Concatenated block tables (see `SequenceSlice::table_start`).
    pub block_tables: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub logits_rows: Vec<u32>,
    /// Blocks to copy (from, to) before anything else: copy on write.
    pub block_copies: Vec<(u32, u32)>,
}

/// What the engine needs to know of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct StepModelInfo {
    /// Logits per row.
    pub vocab_size: usize,
    /// Longest sequence, prompt and answer together.
    pub max_model_len: usize,
    /// Slots per KV block.
    pub block_size: usize,
    /// KV blocks allocated.
    pub kv_blocks: usize,
    /// Bytes of one KV block on the rank that has the most.
    pub kv_block_bytes: usize,
    /// Most rows a step may have.
    pub max_step_rows: usize,
    /// Most rows of logits a step may ask for.
    pub max_logits_rows: usize,
    /// Backend, kernel path, accumulation layout, KV type, rope choice and weights' digest: equal ids promise
    /// equal bits.
    pub numerics_id: String,
}

/// Anything the engine can run: a decoder, all ranks of a sharded one, later a fusion.
pub trait StepModel: Send {
    /// Fixed facts.
    fn info(&self) -> &StepModelInfo;

    /// Runs a step. `logits` receives `plan.logits_rows.len()` × `vocab_size` values, row-major, f32.
    ///
    /// # Errors
    /// A plan that does not fit the model (sizes, ids, slots), or a rank that failed: the KV state is then
    /// undefined and the replica must be rebuilt.
    fn step(&mut self, plan: &StepPlan, logits: &mut Vec<f32>) -> Result<(), ModelError>;
}
