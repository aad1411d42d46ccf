//! One engine step: the plan that every rank receives, the `StepModel` that executes it, and the `StageModel` that
//! executes one rank's part of it.
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
#[derive(Debug, Clone, Default, PartialEq)]
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

/// What a rank starts from.
#[derive(Debug, Clone, Copy)]
pub enum StageInput<'a> {
    /// The plan's tokens: the first stage.
    Tokens,
    /// The stage before's output, [rows, hidden_size].
    Hidden(&'a [f32]),
}

/// What a rank gives.
#[derive(Debug)]
pub enum StageOutput<'a> {
    /// Logits of the plan's rows: the last stage.
    Logits(&'a mut Vec<f32>),
    /// Hidden states for the next stage, [rows, hidden_size].
    Hidden(&'a mut Vec<f32>),
    /// The last stage's logits are another expert rank's to compute: this one was needed for its experts.
    Nothing,
}

/// One rank's part of a model: a share of some layers.
pub trait StageModel: Send {
    /// Fixed facts; the same on all ranks but for the bytes of a block.
    fn stage_info(&self) -> &StepModelInfo;

    /// Runs this rank's part of a step.
    ///
    /// # Errors
    /// As [`StepModel::step`]; input or output that this stage does not have.
    fn run_stage(&mut self, plan: &StepPlan, input: StageInput<'_>, output: StageOutput<'_>) -> Result<(), ModelError>;
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

    /// The same model with several steps under way at once, where it has stages that can work side by side.
    fn pipeline(&mut self) -> Option<&mut dyn Pipeline> {
        None
    }
}

/// A model whose stages compute different steps at once.
///
/// Steps are run in the order in which they are submitted, on every rank: a later one sees what an earlier one stored.
pub trait Pipeline: StepModel {
    /// Most steps under way.
    fn depth(&self) -> usize;

    /// Begins a step. At most [`Pipeline::depth`] are under way.
    ///
    /// # Errors
    /// As [`StepModel::step`]; too many steps.
    fn submit(&mut self, plan: &StepPlan) -> Result<(), ModelError>;

    /// Waits for the oldest step under way; `logits` receives what [`StepModel::step`] would have given.
    ///
    /// # Errors
    /// As [`StepModel::step`]; no step is under way.
    fn complete(&mut self, logits: &mut Vec<f32>) -> Result<(), ModelError>;
}
