//! Models opened to be measured: resolved, checked against this machine's memory, loaded without an engine.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use forge_coordinator::placement::plan_alone;
use forge_eval::EvalError;
use forge_eval::protocol::SHORTEST_CHUNK;
use forge_kernels::{CpuBackend, CpuOptions};
use forge_model::{Decoder, DecoderOptions, Shard, StepModel};
use forge_shared::config::Setting;
use forge_shared::ids::{Epoch, NodeId, ServiceName};
use forge_shared::spec::{ByteSize, ModelServiceSpec};
use forge_store::{CancelFlag, ResolvedModel};
use forge_worker::prepare::{DecoderSizes, PreparedModel};
use forge_worker::{machine, ranks};

use crate::cli::SpecSources;
use crate::context::{self, Context};
use crate::failure::{Exit, Failure, Result};
use crate::{replica, runtime, support};

/// Rows of logits a decoder computes at a time.
const LOGITS_ROWS: usize = 64;
/// Rows of a step.
const STEP_ROWS: usize = 512;
/// Slots of a KV block.
const BLOCK_SIZE: usize = 16;

/// A model's name as it was given, its files, and the settings to open it with.
pub struct Subject {
    /// Name in reports.
    pub name: String,
    /// Settings.
    pub spec: ModelServiceSpec,
    /// Held, so that the store keeps the files.
    resolved: ResolvedModel,
}

/// A subject whose metadata and tokenizer were read.
pub struct Opened {
    /// Name in reports.
    pub name: String,
    /// The model.
    pub prepared: PreparedModel,
    /// Settings.
    pub spec: ModelServiceSpec,
    /// Seconds it took to open.
    pub open_s: f64,
    _resolved: ResolvedModel,
}

impl Subject {
    /// Resolves a model under the flags of a measuring command, and pulls it where it is not here.
    ///
    /// # Errors
    /// A name or setting that is wrong, a model that cannot be had.
    pub async fn find(context: &Context, model: Option<&str>, flags: &[Setting]) -> Result<Self> {
        let sources = SpecSources { file: None, assignments: Vec::new() };
        let service = context.service(&sources, model, flags)?;
        support::check(context, &service.spec.model)?;
        let resolved = context::pull(&service.spec.model, false).await?;
        Ok(Subject { name: service.spec.model.clone(), spec: service.spec, resolved })
    }

    /// Reads metadata and tokenizer.
    ///
    /// # Errors
    /// A model that cannot be used.
    pub fn open(self) -> Result<Opened> {
        let start = Instant::now();
        let digest = self.resolved.digest().to_string();
        let prepared =
            PreparedModel::open(self.resolved.path(), &digest, &self.spec).map_err(|error| replica::unusable(error, &self.resolved))?;
        support::tell_override(&prepared.model);
        Ok(Opened { name: self.name, prepared, spec: self.spec, open_s: start.elapsed().as_secs_f64(), _resolved: self.resolved })
    }
}

impl Opened {
    /// Positions the model was trained for.
    pub fn context_length(&self) -> usize {
        self.prepared.model.summary().context_length
    }

    /// Options for one sequence of `context` tokens after another.
    pub fn sequence_options(&self, context: usize) -> DecoderOptions {
        let base = self.options();
        DecoderOptions {
            max_model_len: context,
            kv_blocks: context.div_ceil(BLOCK_SIZE),
            max_step_rows: context.min(STEP_ROWS),
            max_logits_rows: context.min(LOGITS_ROWS),
            ..base
        }
    }

    /// Options whose sizes are still to be set.
    pub fn options(&self) -> DecoderOptions {
        let sizes = DecoderSizes {
            max_model_len: self.context_length(),
            block_size: BLOCK_SIZE,
            kv_blocks: 1,
            kv_cache_dtype: self.spec.kv_cache_dtype,
            max_step_tokens: STEP_ROWS,
            max_batch_size: LOGITS_ROWS,
            epoch: Epoch::default(),
        };
        self.prepared.decoder_options(sizes, Shard::default())
    }

    /// Bytes it needs with these options: weights, workspace, keys and values.
    ///
    /// # Errors
    /// Options the model cannot have.
    pub fn needed_bytes(&self, options: &DecoderOptions) -> Result<u64> {
        let memory = self.prepared.model.memory(options).map_err(|error| Failure::of(&error))?;
        Ok((memory.fixed_bytes() + options.kv_blocks * memory.kv_block_bytes) as u64)
    }

    /// Loads the weights.
    ///
    /// # Errors
    /// Damaged weights, or memory that cannot be had.
    pub fn decoder(&self, backend: Arc<CpuBackend>, options: &DecoderOptions) -> Result<Decoder<CpuBackend>> {
        self.prepared
            .model
            .decoder(backend, options)
            .map_err(|error| Failure::of(&error).while_doing(&format!("cannot load {}", self.name)))
    }
}

impl Opened {
    /// Loads the weights as the specification's layout divides them, all ranks in this process; with the threads of all.
    ///
    /// # Errors
    /// As [`Opened::decoder`]; a layout that this model cannot have.
    pub fn loaded(&self, options: &DecoderOptions) -> Result<(Box<dyn StepModel>, usize)> {
        if self.spec.layout.ranks() == 1 {
            let backend = backend(&self.spec)?;
            let threads = self.spec.threads.unwrap_or(CpuOptions::default().threads);
            return Ok((Box::new(self.decoder(backend, options)?), threads));
        }
        let devices = [machine::cpu_device(NodeId::from("local"))];
        let spec = ModelServiceSpec { max_model_len: Some(options.max_model_len), ..self.spec.clone() };
        let plan = plan_alone(&devices, &ServiceName::from("bench"), &spec, &self.prepared.facts).map_err(replica::not_placeable)?;
        let loaded = ranks::load_here(&self.prepared, options, &plan).map_err(replica::failed)?;
        Ok((loaded, plan.ranks.iter().map(|rank| rank.threads).sum()))
    }
}

/// A backend with the threads of the specification.
///
/// # Errors
/// If the system gives no threads.
pub fn backend(spec: &ModelServiceSpec) -> Result<Arc<CpuBackend>> {
    let defaults = CpuOptions::default();
    let options = CpuOptions { threads: spec.threads.unwrap_or(defaults.threads), ..defaults };
    CpuBackend::new(options).map(Arc::new).map_err(|error| Failure::of(&error))
}

/// Refuses what this machine's free memory cannot hold.
///
/// # Errors
/// The numbers, with [`Exit::NotPlaceable`].
pub fn check_memory(needed_bytes: u64) -> Result<()> {
    let free = machine::free_bytes();
    if needed_bytes <= free {
        return Ok(());
    }
    let (needed, free) = (ByteSize(needed_bytes), ByteSize(free));
    Err(Failure::new(format!("this needs {needed} of memory, and {free} are free"))
        .help("give a smaller --context or batch, or take a smaller model")
        .exit(Exit::NotPlaceable))
}

/// Runs a measurement on a thread of its own; Ctrl-C and SIGTERM end it.
///
/// # Errors
/// The work's own, or that it was stopped.
pub async fn stoppable<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    runtime::cancellable(CancelFlag::default(), work).await
}

/// Reads a text; `-` is standard input.
///
/// # Errors
/// A file that cannot be read, or is no UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let read = if path == Path::new("-") { std::io::read_to_string(std::io::stdin()) } else { std::fs::read_to_string(path) };
    read.map_err(|error| {
        let help = match error.kind() {
            std::io::ErrorKind::InvalidData => "the text must be UTF-8: convert it, with iconv for example",
            _ => "give the path of a text file, or - for standard input",
        };
        Failure::of(&error).while_doing(&format!("cannot read {}", path.display())).help(help).exit(Exit::Usage)
    })
}

impl From<EvalError> for Failure {
    fn from(error: EvalError) -> Self {
        match error {
            EvalError::TooShort { tokens, .. } if tokens >= SHORTEST_CHUNK => {
                Failure::of(&error).help(format!("--context {tokens} makes one chunk of all of it")).exit(Exit::Usage)
            }
            EvalError::Option { .. } | EvalError::TooShort { .. } | EvalError::Incomparable { .. } => Failure::of(&error).exit(Exit::Usage),
            _ => Failure::of(&error),
        }
    }
}
