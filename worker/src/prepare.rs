//! A model made ready to be placed: opened, checked, its tokenizer built, its memory known. No weight is loaded.

use std::path::Path;

use forge_kernels::KvDType;
use forge_model::arch::families::{FAMILIES, named};
use forge_model::{Checkpoint, DecoderOptions, GenerationDefaults, LoadMode, LoadProgress, Model, ModelError, Overrides, Shard};
use forge_shared::config;
use forge_shared::ids::Epoch;
use forge_shared::link::DefaultSampling;
use forge_shared::plan::{ModelFacts, ModelShape};
use forge_shared::spec::{self, KvCacheDtype, ModelServiceSpec};
use forge_text::ModelText;

use crate::WorkerError;

/// See the module documentation.
#[derive(Debug, Clone)]
pub struct PreparedModel {
    /// The opened checkpoint.
    pub model: Model,
    /// Tokenizer and chat template.
    pub text: ModelText,
    /// Numbers for placement, under the specification's settings.
    pub facts: ModelFacts,
    /// Content digest of the weights, part of the numerics id.
    pub digest: String,
    /// Whether to look for NaN while loading.
    pub check_weights: bool,
    /// How far its weights are loaded, once they are.
    pub progress: LoadProgress,
}

impl PreparedModel {
    /// Opens the model at `path` (a GGUF file or a Hugging Face folder) under a specification's settings.
    ///
    /// # Errors
    /// What is wrong with the checkpoint, its tokenizer, its template, or a setting.
    pub fn open(path: &Path, digest: &str, spec: &ModelServiceSpec) -> Result<Self, WorkerError> {
        let model = open_model(path, spec)?;
        let text = forge_engine::open_text(&model, path)?;
        let text = match &spec.chat_template {
            Some(file) => {
                let source = std::fs::read_to_string(file).map_err(|source| WorkerError::Read { path: file.clone(), source })?;
                text.with_chat_template(&source)?
            }
            None => text,
        };
        let facts = ModelFacts { weights_digest: digest.to_owned(), ..model_facts(&model, spec)? };
        Ok(PreparedModel {
            facts,
            model,
            text,
            digest: digest.to_owned(),
            check_weights: spec.check_weights,
            progress: LoadProgress::default(),
        })
    }

    /// Options of the rank that holds this shard.
    pub fn decoder_options(&self, sizes: DecoderSizes, shard: Shard) -> DecoderOptions {
        let progress = self.progress.clone();
        DecoderOptions { weights_digest: self.digest.clone(), scan_values: self.check_weights, progress, shard, ..sizes.options() }
    }

    /// Bytes a rank that holds this shard takes: weights, keys and values, workspace.
    ///
    /// # Errors
    /// Sizes or a shard that this model cannot have.
    pub fn needed_bytes(&self, sizes: DecoderSizes, shard: Shard) -> Result<u64, WorkerError> {
        let memory = self.model.memory(&DecoderOptions { shard, ..sizes.options() })?;
        Ok((memory.fixed_bytes() as u64).saturating_add((memory.kv_block_bytes as u64).saturating_mul(sizes.kv_blocks as u64)))
    }

    /// Sampling defaults of the checkpoint, as the gateway wants them.
    pub fn default_sampling(&self) -> DefaultSampling {
        let GenerationDefaults { temperature, top_k, top_p, min_p, repetition_penalty, .. } = *self.model.generation();
        DefaultSampling { temperature, top_k, top_p, min_p, repetition_penalty }
    }
}

/// Opens a model's files under a specification's settings and overrides, without its tokenizer.
///
/// # Errors
/// What is wrong with the files, or an override that this model cannot take.
pub fn open_model(path: &Path, spec: &ModelServiceSpec) -> Result<Model, WorkerError> {
    let rope_scaling = spec.rope_scaling.as_deref().map(str::parse).transpose();
    let rope_scaling = rope_scaling.map_err(|reason| WorkerError::Setting { field: "spec.ropeScaling", reason })?;
    spec.arch.as_deref().map_or(Ok(()), check_family)?;
    let overrides = Overrides { architecture: spec.arch.clone(), rope_scaling, sliding_window: spec.sliding_window };
    Model::open_with(path, load_mode(spec.load), &overrides).map_err(|error| blame(error, path, &overrides))
}

/// Refuses a family that no row of the table has, with the name it may have been meant for.
fn check_family(name: &str) -> Result<(), WorkerError> {
    if named(name).is_ok() {
        return Ok(());
    }
    let known = FAMILIES.iter().flat_map(|family| [&[family.name], family.model_types, family.gguf_architectures].concat());
    let families = FAMILIES.map(|family| family.name).join(", ");
    let meant = match config::nearest(name, known.map(str::to_owned)) {
        Some(nearest) => format!("did you mean `{nearest}`? There are {families}"),
        None => format!("there are {families}"),
    };
    Err(WorkerError::Setting { field: "spec.arch", reason: format!("no family is called `{name}`; {meant}") })
}

/// An error that comes of an override is the override's: the same files open without it.
fn blame(error: ModelError, path: &Path, overrides: &Overrides) -> WorkerError {
    let open = |overrides: &Overrides| Model::open_with(path, LoadMode::Mmap, overrides);
    if overrides.rope_scaling.is_some() && open(&Overrides { rope_scaling: None, ..overrides.clone() }).is_ok() {
        let reason = match error {
            ModelError::Config { key, reason, .. } => format!("{key} {reason}"),
            other => other.to_string(),
        };
        return WorkerError::Setting { field: "spec.ropeScaling", reason };
    }
    let Some(given) = overrides.architecture.clone() else { return error.into() };
    let remedy = match open(&Overrides { architecture: None, ..overrides.clone() }) {
        Ok(model) => format!("the files themselves say {}, and are read as that without it", model.architecture().family),
        Err(ModelError::UnknownFamily { nearest, .. }) => nearest.trim_start_matches(['.', ' ']).to_owned(),
        // With and without it: the files are damaged or incomplete.
        Err(_) => return error.into(),
    };
    WorkerError::Family { given, remedy, source: Box::new(error) }
}

/// Whether the first `bytes` bytes of a GGUF file hold its whole header: it can be read, and no weight begins before
/// their end.
pub fn header_is_whole(path: &Path, bytes: u64) -> bool {
    let Ok(checkpoint) = Checkpoint::open(path, LoadMode::Mmap) else { return false };
    let first_weight = checkpoint.tensors().values().map(|tensor| tensor.bytes.start as u64).min();
    first_weight.is_some_and(|start| start <= bytes)
}

/// Numbers for placement, under a specification's settings; the weights' digest is the caller's to know.
///
/// # Errors
/// Settings this model cannot have.
pub fn model_facts(model: &Model, spec: &ModelServiceSpec) -> Result<ModelFacts, WorkerError> {
    let summary = model.summary();
    // A context beyond the model's is refused by placement, with the nearest that fits; the sizes here only have to
    // be valid.
    let sizes = DecoderSizes {
        max_model_len: spec.max_model_len.unwrap_or(summary.context_length).min(summary.context_length),
        block_size: spec.block_size,
        kv_blocks: 1,
        kv_cache_dtype: spec.kv_cache_dtype,
        max_step_tokens: spec.max_step_tokens,
        max_batch_size: spec.max_batch_size,
        epoch: Epoch::default(),
    };
    let memory = model.memory(&sizes.options())?;
    Ok(ModelFacts {
        layers: model.architecture().layers,
        context_length: summary.context_length,
        weights_bytes: (memory.weights_bytes + memory.copied_bytes) as u64,
        kv_slot_bytes: (memory.kv_block_bytes as u64).div_ceil(spec.block_size as u64),
        workspace_bytes: (memory.workspace_bytes + memory.rope_bytes) as u64,
        weights_digest: String::new(),
        shape: model_shape(model)?,
    })
}

/// What of a model can be divided among ranks.
fn model_shape(model: &Model) -> Result<ModelShape, WorkerError> {
    let (architecture, parts) = (model.architecture(), model.parts()?);
    Ok(ModelShape {
        heads: architecture.attention.heads,
        kv_heads: architecture.attention.kv_heads,
        experts: architecture.experts.as_ref().map_or(0, |experts| experts.count),
        hidden_size: architecture.hidden_size,
        vocab_size: architecture.vocab_size,
        embedding_bytes: parts.embedding_bytes as u64,
        head_bytes: parts.head_bytes as u64,
        layer_bytes: parts.layer_bytes.into_iter().map(|bytes| bytes as u64).collect(),
        expert_bytes: parts.expert_bytes.into_iter().map(|bytes| bytes as u64).collect(),
        tensor_extra_bytes: parts.tensor_extra_bytes.into_iter().map(|bytes| bytes as u64).collect(),
    })
}

/// The sizes of a plan that a decoder needs.
#[derive(Debug, Clone, Copy)]
pub struct DecoderSizes {
    /// Longest sequence.
    pub max_model_len: usize,
    /// Slots per KV block.
    pub block_size: usize,
    /// KV blocks.
    pub kv_blocks: usize,
    /// KV storage type.
    pub kv_cache_dtype: KvCacheDtype,
    /// Most rows of a step.
    pub max_step_tokens: usize,
    /// Most sequences at once.
    pub max_batch_size: usize,
    /// Epoch of the plan.
    pub epoch: Epoch,
}

impl DecoderSizes {
    /// Options of the rank that holds everything; digest and checks are the model's matter.
    fn options(self) -> DecoderOptions {
        DecoderOptions {
            max_model_len: self.max_model_len,
            block_size: self.block_size,
            kv_blocks: self.kv_blocks,
            kv_dtype: kv_dtype(self.kv_cache_dtype),
            max_step_rows: self.max_step_tokens,
            max_logits_rows: self.max_batch_size,
            shard: Shard::default(),
            epoch: self.epoch,
            weights_digest: String::new(),
            scan_values: true,
            progress: LoadProgress::default(),
        }
    }
}

/// The kernels' name of a KV type.
pub fn kv_dtype(dtype: KvCacheDtype) -> KvDType {
    match dtype {
        KvCacheDtype::F32 => KvDType::F32,
        KvCacheDtype::F16 => KvDType::F16,
        KvCacheDtype::Bf16 => KvDType::BF16,
        KvCacheDtype::Int8 => KvDType::Int8,
    }
}

fn load_mode(mode: spec::LoadMode) -> LoadMode {
    match mode {
        spec::LoadMode::Mmap => LoadMode::Mmap,
        spec::LoadMode::Eager => LoadMode::Eager,
    }
}
