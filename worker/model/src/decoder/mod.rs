//! The generic decoder: any [`Architecture`] over any [`Backend`], whole or as one rank's share.
//!
//! What it is: one rank's weights, KV pool and workspace, and the pass over them. What it is not: it schedules
//! nothing and decides nothing; the step plan says all.
//!
//! Invariant (P2): a row's logits depend on its sequence's tokens and the weights alone: not on the batch, the
//! chunks, the blocks' size or place, nor on how many ranks share the work.

mod attention;
mod choices;
mod feed_forward;
mod forward;
mod groups;
pub(crate) mod layout;
pub(crate) mod load;
mod loaded;
pub mod options;
pub(crate) mod plan;
pub(crate) mod store;
pub(crate) mod workspace;

use std::sync::Arc;

use forge_kernels::Backend;
use forge_shared::ids::Epoch;

use crate::arch::{Architecture, PositionSpec};
use crate::error::{ModelError, Result};
use crate::model::Model;
use crate::step::{StageInput, StageModel, StageOutput, StepModel, StepModelInfo, StepPlan};
use forward::Pass;
pub use groups::Groups;
use layout::Layout;
use load::Origin;
use loaded::Weights;
use options::DecoderOptions;
use workspace::Workspace;

/// One rank's decoder.
pub struct Decoder<B: Backend> {
    backend: Arc<B>,
    groups: Groups<B>,
    architecture: Architecture,
    layout: Layout,
    weights: Weights<B>,
    rope_tables: Vec<B::RopeTable>,
    workspace: Workspace<B::Buffer>,
    /// `None` where this rank has no KV heads.
    pool: Option<B::KvPool>,
    zero_ids: Vec<u32>,
    epoch: Epoch,
    info: StepModelInfo,
}

impl<B: Backend> Decoder<B> {
    /// Loads this rank's share of the weights and allocates pool and workspace.
    ///
    /// # Errors
    /// [`ModelError::Option`] and [`ModelError::Layout`] for sizes or a degree that cannot be had,
    /// [`ModelError::NonFinite`] for damaged weights, the backend's errors when memory is short.
    pub fn new(model: &Model, backend: Arc<B>, options: &DecoderOptions, groups: Groups<B>) -> Result<Self> {
        let architecture = model.architecture().clone();
        options.check(&architecture)?;
        groups.check(&options.shard)?;
        let refs = model.refs();
        let layout = Layout::new(&architecture, refs, &options.shard)?;
        let memory = model.memory(options)?;
        let origin = Origin { backend: &*backend, checkpoint: model.checkpoint(), architecture: &architecture, refs, layout: &layout };
        let weights = origin.load(&memory, options)?;
        let rope_tables = origin.rope_tables(options.max_model_len)?;
        let workspace = Workspace::new(&*backend, &architecture, &layout, options)?;
        let pool = match layout.kv_heads.len() {
            0 => None,
            _ => Some(backend.kv_pool(layout.kv_shape(&architecture, options))?),
        };
        let info = StepModelInfo {
            vocab_size: architecture.vocab_size,
            max_model_len: options.max_model_len,
            block_size: options.block_size,
            kv_blocks: options.kv_blocks,
            kv_block_bytes: memory.largest_kv_block_bytes,
            max_step_rows: options.max_step_rows,
            max_logits_rows: options.max_logits_rows,
            numerics_id: numerics_id(&*backend, &architecture, options),
        };
        let zero_ids = vec![0; options.max_step_rows];
        let epoch = options.epoch;
        Ok(Decoder { backend, groups, architecture, layout, weights, rope_tables, workspace, pool, zero_ids, epoch, info })
    }

    /// The backend.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }

    /// What the model is.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    fn check_stage(&self, plan: &StepPlan, input: &StageInput<'_>, output: &StageOutput<'_>) -> Result<()> {
        let wrong = |reason: String| Err(ModelError::Plan { field: "stage", reason });
        let layers = &self.layout.layers;
        let expected = plan.tokens.len() * self.architecture.hidden_size;
        match input {
            StageInput::Tokens if !self.layout.first_stage => {
                return wrong(format!("layers {layers:?} start from hidden states, not tokens"));
            }
            StageInput::Hidden(_) if self.layout.first_stage => return wrong(format!("layers {layers:?} start from tokens")),
            StageInput::Hidden(values) if values.len() != expected => {
                return wrong(format!("{} hidden values for a plan that needs {expected}", values.len()));
            }
            _ => {}
        }
        match output {
            StageOutput::Logits(_) if !self.layout.last_stage => wrong(format!("layers {layers:?} have no head: they give hidden states")),
            StageOutput::Hidden(_) if self.layout.last_stage => wrong(format!("layers {layers:?} end in logits")),
            StageOutput::Nothing if !self.layout.last_stage => wrong(format!("the next stage needs what layers {layers:?} give")),
            _ => Ok(()),
        }
    }

    fn compute(&mut self, plan: &StepPlan, input: StageInput<'_>, output: StageOutput<'_>) -> Result<()> {
        if let Some(pool) = &mut self.pool
            && !plan.block_copies.is_empty()
        {
            self.backend.kv_copy(pool, &plan.block_copies)?;
        }
        let pass = Pass {
            backend: &*self.backend,
            groups: &self.groups,
            architecture: &self.architecture,
            layout: &self.layout,
            weights: &self.weights,
            rope_tables: &self.rope_tables,
            block_size: self.info.block_size,
            plan,
            zero_ids: &self.zero_ids,
        };
        let rows = plan.tokens.len();
        if rows > 0 {
            match input {
                StageInput::Tokens => pass.embed(&mut self.workspace)?,
                StageInput::Hidden(values) => self.backend.write_rows(&mut self.workspace.x, 0..rows, values)?,
            }
            pass.layers(&mut self.workspace, &mut self.pool)?;
        }
        match output {
            StageOutput::Logits(logits) => {
                logits.resize(plan.logits_rows.len() * self.info.vocab_size, 0.0);
                let chunk_rows = self.info.max_logits_rows.min(self.info.max_step_rows);
                pass.logits(&mut self.workspace, chunk_rows, logits)
            }
            StageOutput::Hidden(values) => {
                values.resize(rows * self.architecture.hidden_size, 0.0);
                Ok(self.backend.read_rows(&self.workspace.x, 0..rows, values)?)
            }
            StageOutput::Nothing => Ok(()),
        }
    }
}

impl<B: Backend> StageModel for Decoder<B> {
    fn stage_info(&self) -> &StepModelInfo {
        &self.info
    }

    /// The plan is checked whole before anything is touched; if anything fails after that, the groups are aborted, so
    /// that no peer waits for this rank.
    fn run_stage(&mut self, plan: &StepPlan, input: StageInput<'_>, output: StageOutput<'_>) -> Result<()> {
        plan::check(plan, &self.info, self.epoch)?;
        self.check_stage(plan, &input, &output)?;
        self.epoch = plan.epoch;
        self.compute(plan, input, output).inspect_err(|error| self.groups.abort(&error.to_string()))
    }
}

impl<B: Backend> StepModel for Decoder<B> {
    fn info(&self) -> &StepModelInfo {
        &self.info
    }

    fn step(&mut self, plan: &StepPlan, logits: &mut Vec<f32>) -> Result<()> {
        self.run_stage(plan, StageInput::Tokens, StageOutput::Logits(logits))
    }
}

/// Equal ids promise equal bits: device path, KV type, rope choice, architecture (which an operator may override) and
/// weights.
fn numerics_id<B: Backend>(backend: &B, architecture: &Architecture, options: &DecoderOptions) -> String {
    let rope = match &architecture.position {
        PositionSpec::Rope(rope) => {
            let names: Vec<String> = rope.tables.iter().map(|table| table.numerics_name(options.max_model_len)).collect();
            names.join("+")
        }
        PositionSpec::Learned { .. } => "learned".to_owned(),
        PositionSpec::Alibi(_) => "alibi".to_owned(),
    };
    let digest = if options.weights_digest.is_empty() { "unnamed" } else { &options.weights_digest };
    let fingerprint = architecture.fingerprint();
    format!("{};kv={};rope={rope};architecture={fingerprint:016x};weights={digest}", backend.numerics_id(), options.kv_dtype)
}
