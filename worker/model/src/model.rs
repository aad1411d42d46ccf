//! A model on disk, checked: its checkpoint, architecture and defaults, before any weight is loaded.

use std::path::Path;
use std::sync::Arc;

use forge_kernels::Backend;
use forge_shared::tree::layer_share;
use serde_json::Value;

use crate::arch::{self, Architecture, Overrides, detect, families};
use crate::checkpoint::{Checkpoint, Format, LoadMode, RawConfig};
use crate::decoder::layout::Layout;
use crate::decoder::options::{DecoderOptions, Shard};
use crate::decoder::{Decoder, Groups};
use crate::error::{ModelError, Result, list};
use crate::generation::GenerationDefaults;
use crate::gguf::GgufTokenizerData;
use crate::memory::{self, ModelMemory, ModelParts, Quantization};
use crate::weights::DecoderRefs;

/// An opened and checked model. Cheap to hold and to clone: weights stay in the mapped file.
#[derive(Debug, Clone)]
pub struct Model {
    checkpoint: Arc<Checkpoint>,
    architecture: Architecture,
    refs: Arc<DecoderRefs>,
    generation: GenerationDefaults,
}

/// Facts for `show`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSummary {
    /// GGUF or Hugging Face folder.
    pub format: Format,
    /// Name of the family's row.
    pub family: &'static str,
    /// Parameters, each tensor counted once.
    pub parameters: usize,
    /// Storage types.
    pub quantization: Quantization,
    /// Positions the model was trained for.
    pub context_length: usize,
    /// Bytes of all weights as stored.
    pub weights_bytes: usize,
    /// The model's own name, where the file has one.
    pub name: Option<String>,
    /// Licence, where the file names one.
    pub license: Option<String>,
}

impl Model {
    /// Opens a GGUF file or a Hugging Face folder, recognized by content, reads its metadata and checks that its
    /// tensors are exactly those its architecture names, with their shapes. Weights are not read (but see
    /// [`LoadMode::Eager`]).
    ///
    /// ```
    /// use std::sync::Arc;
    /// use forge_kernels::{CpuBackend, CpuOptions};
    /// use forge_model::{DecoderOptions, LoadMode, Model, Session};
    ///
    /// let model = Model::open("../../tests/fixtures/model/llama", LoadMode::Mmap)?;
    /// assert_eq!(model.architecture().layers, 3);
    /// let mut decoder = model.decoder(Arc::new(CpuBackend::new(CpuOptions::default())?), &DecoderOptions::single_sequence(64))?;
    /// let mut session = Session::new(&mut decoder);
    /// let logits = session.forward(&[1, 2, 3])?;
    /// assert_eq!(logits.len(), model.architecture().vocab_size);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Anything unreadable, malformed, unsupported, missing or left over, by name.
    pub fn open(path: impl AsRef<Path>, mode: LoadMode) -> Result<Model> {
        Self::open_with(path, mode, &Overrides::default())
    }

    /// As [`Model::open`], with what the operator says against the files.
    ///
    /// # Errors
    /// As [`Model::open`], and an override that this model cannot take.
    pub fn open_with(path: impl AsRef<Path>, mode: LoadMode, overrides: &Overrides) -> Result<Model> {
        let family = overrides.architecture.as_deref().map(families::named).transpose()?;
        Self::from_checkpoint_with(Checkpoint::open_as(path, mode, family)?, overrides)
    }

    /// As [`Model::open`], of an opened checkpoint.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn from_checkpoint(checkpoint: Checkpoint) -> Result<Model> {
        Self::from_checkpoint_with(checkpoint, &Overrides::default())
    }

    /// As [`Model::open_with`], of an opened checkpoint.
    ///
    /// # Errors
    /// As [`Model::open_with`].
    pub fn from_checkpoint_with(checkpoint: Checkpoint, overrides: &Overrides) -> Result<Model> {
        let (architecture, refs, generation) = read(&checkpoint, overrides).map_err(|error| match &overrides.architecture {
            Some(name) => with_override(error, name, &checkpoint),
            None => with_nearest(error, &checkpoint),
        })?;
        Ok(Model { checkpoint: Arc::new(checkpoint), architecture, refs: Arc::new(refs), generation })
    }

    /// What the decoder will be.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The files.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// Recommended sampling.
    pub fn generation(&self) -> &GenerationDefaults {
        &self.generation
    }

    /// What the files call their family, where the operator has it read as another; `None` where they say nothing else.
    pub fn overridden_family(&self) -> Option<String> {
        let (said, row) = match self.checkpoint.config() {
            RawConfig::Gguf(metadata) => (arch::gguf::architecture_name(metadata).ok(), families::of_gguf(metadata)),
            RawConfig::HuggingFace { config, .. } => (config.get("model_type").and_then(Value::as_str), families::by_model_type(config)),
        };
        said.filter(|_| !row.is_ok_and(|row| row.name == self.architecture.family)).map(str::to_owned)
    }

    pub(crate) fn refs(&self) -> &DecoderRefs {
        &self.refs
    }

    /// Facts for `show`.
    pub fn summary(&self) -> ModelSummary {
        let mut quantization = Quantization::default();
        self.checkpoint.distinct_tensors().for_each(|tensor| quantization.count(tensor.dtype, tensor.elements()));
        let text = |key: &str| match self.checkpoint.config() {
            RawConfig::Gguf(metadata) => metadata.optional_string(&format!("general.{key}")).ok().flatten().map(str::to_owned),
            RawConfig::HuggingFace { .. } => None,
        };
        ModelSummary {
            format: self.checkpoint.format(),
            family: self.architecture.family,
            parameters: quantization.types.values().map(|count| count.parameters).sum(),
            quantization,
            context_length: self.architecture.context_length,
            weights_bytes: self.checkpoint.stored_bytes(),
            name: text("name"),
            license: text("license"),
        }
    }

    /// The tokenizer of a GGUF file; `None` for a folder, whose tokenizer is in `tokenizer.json`.
    ///
    /// # Errors
    /// Tokenizer metadata of wrong types.
    pub fn gguf_tokenizer(&self) -> Result<Option<GgufTokenizerData>> {
        match self.checkpoint.config() {
            RawConfig::Gguf(metadata) => GgufTokenizerData::from_metadata(metadata).map(Some),
            RawConfig::HuggingFace { .. } => Ok(None),
        }
    }

    /// What a rank built with these options needs of memory. `kv_blocks` and `weights_digest` do not matter.
    ///
    /// # Errors
    /// [`crate::ModelError::Layout`] for a degree or stage that cannot be had.
    pub fn memory(&self, options: &DecoderOptions) -> Result<ModelMemory> {
        let layout = |shard: &Shard| Layout::new(&self.architecture, &self.refs, shard);
        let mut largest_kv_block_bytes = 0;
        for tp_rank in 0..options.shard.tp_size {
            let shard = Shard { tp_rank, ..options.shard.clone() };
            largest_kv_block_bytes = largest_kv_block_bytes.max(layout(&shard)?.kv_shape(&self.architecture, options).block_bytes());
        }
        let own = layout(&options.shard)?;
        Ok(ModelMemory { largest_kv_block_bytes, ..memory::of(&self.architecture, &self.refs, &own, options)? })
    }

    /// Bytes of the embedding, the head and each layer, for whoever divides the model among ranks.
    ///
    /// # Errors
    /// None that [`Self::memory`] has not.
    pub fn parts(&self) -> Result<ModelParts> {
        let of = |shard: &Shard| memory::parts(&self.architecture, &self.refs, &Layout::new(&self.architecture, &self.refs, shard)?);
        let (mut whole, attention) = (of(&Shard::default())?, &self.architecture.attention);
        for tp_size in [2, 4, 8] {
            let mut extra_bytes = 0;
            for tp_rank in 0..tp_size {
                let share = layer_share(attention.heads, attention.kv_heads, tp_rank, tp_size);
                let part = of(&Shard { tp_rank, tp_size, ..Shard::default() })?;
                extra_bytes = extra_bytes.max(whole.extra_bytes(&part, share));
            }
            whole.tensor_extra_bytes.push(extra_bytes);
        }
        Ok(whole)
    }

    /// Loads the weights and builds a decoder that shares nothing: the whole model, or one stage of it.
    ///
    /// # Errors
    /// As [`Decoder::new`].
    pub fn decoder<B: Backend>(&self, backend: Arc<B>, options: &DecoderOptions) -> Result<Decoder<B>> {
        Decoder::new(self, backend, options, Groups::alone(options.epoch))
    }
}

/// Reads a checkpoint's configuration, and finds all tensors of the architecture that it gives.
fn read(checkpoint: &Checkpoint, overrides: &Overrides) -> Result<(Architecture, DecoderRefs, GenerationDefaults)> {
    let named = overrides.architecture.as_deref().map(families::named).transpose()?;
    let (family, architecture, generation) = match checkpoint.config() {
        RawConfig::Gguf(metadata) => {
            let family = named.map_or_else(|| families::of_gguf(metadata), Ok)?;
            (family, arch::gguf::from_gguf_as(family, metadata, checkpoint.tensors())?, GenerationDefaults::default())
        }
        RawConfig::HuggingFace { config, generation } => {
            let family = named.map_or_else(|| families::by_model_type(config), Ok)?;
            (family, arch::hf::from_config_json_as(family, config)?, GenerationDefaults::from_json(generation.as_ref())?)
        }
    };
    let architecture = overrides.apply(architecture)?;
    let refs = DecoderRefs::resolve(&architecture, family, checkpoint)?;
    Ok((architecture, refs, generation))
}

/// What does not fit the family that the operator names: not the file's fault.
fn with_override(error: ModelError, name: &str, checkpoint: &Checkpoint) -> ModelError {
    let misfit = match &error {
        ModelError::MissingTensors { names } => format!("it lacks {}", list(names)),
        ModelError::UnexpectedTensors { names } => format!("that family does not use {}", list(names)),
        ModelError::TensorShape { .. } | ModelError::Config { .. } => error.to_string(),
        _ => return error,
    };
    ModelError::OverriddenFamily { name: name.to_owned(), misfit, like: detect::nearest(checkpoint.tensors()) }
}

/// An unknown family with what its tensors are like, and how to have it read as that.
fn with_nearest(error: ModelError, checkpoint: &Checkpoint) -> ModelError {
    match error {
        ModelError::UnknownFamily { found, supported, .. } => {
            let like = detect::nearest(checkpoint.tensors());
            let nearest = format!(". Nearest: {like}. `--arch NAME` reads it as a model of that family, if all tensors fit");
            ModelError::UnknownFamily { found, supported, nearest }
        }
        ModelError::Config { file, key, reason } if key == "model_type" => {
            let like = detect::nearest(checkpoint.tensors());
            let reason = format!("{reason}. Nearest by its tensors: {like}. `--arch NAME` reads it as a model of that family, if all fit");
            ModelError::Config { file, key, reason }
        }
        other => other,
    }
}
