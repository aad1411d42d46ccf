//! A model on disk, checked: its checkpoint, architecture and defaults, before any weight is loaded.

use std::path::Path;
use std::sync::Arc;

use forge_kernels::Backend;
use forge_net::Collective;

use crate::arch::Architecture;
use crate::checkpoint::{Checkpoint, Format, LoadMode};
use crate::decoder::Decoder;
use crate::decoder::options::DecoderOptions;
use crate::error::Result;
use crate::generation::GenerationDefaults;
use crate::gguf::GgufTokenizerData;
use crate::memory::{ModelMemory, Quantization};

/// An opened and checked model. Cheap to hold: weights stay in the mapped file.
#[derive(Debug, Clone)]
pub struct Model {
    checkpoint: Arc<Checkpoint>,
    architecture: Architecture,
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
    /// Licence, where the file names one.
    pub license: Option<String>,
}

impl Model {
    /// Opens a GGUF file or a Hugging Face folder, recognized by content, reads its metadata and checks that its
    /// tensors are exactly those its architecture names, with their shapes. Weights are not read (but see
    /// [`LoadMode::Eager`]).
    ///
    /// # Errors
    /// Anything unreadable, malformed, unsupported, missing or left over, by name.
    pub fn open(path: impl AsRef<Path>, mode: LoadMode) -> Result<Model> {
        let _ = (path, mode);
        todo!()
    }

    /// What the decoder will be.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The files.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// Special token ids and recommended sampling.
    pub fn generation(&self) -> &GenerationDefaults {
        &self.generation
    }

    /// Facts for `show`.
    pub fn summary(&self) -> ModelSummary {
        todo!()
    }

    /// The tokenizer of a GGUF file; `None` for a folder, whose tokenizer is in `tokenizer.json`.
    ///
    /// # Errors
    /// Tokenizer metadata of wrong types.
    pub fn gguf_tokenizer(&self) -> Result<Option<GgufTokenizerData>> {
        todo!()
    }

    /// What a rank built with these options needs of memory; `kv_blocks` and `weights_digest` do not matter.
    ///
    /// # Errors
    /// As [`Decoder::new`] for options that cannot be had.
    pub fn memory(&self, options: &DecoderOptions) -> Result<ModelMemory> {
        let _ = options;
        todo!()
    }

    /// Loads the weights and builds an unsharded decoder (`options.shard.tp_size` is 1).
    ///
    /// # Errors
    /// As [`Decoder::new`].
    pub fn decoder<B: Backend>(&self, backend: Arc<B>, options: &DecoderOptions) -> Result<Decoder<B>> {
        let collective: Arc<dyn Collective<B>> = Arc::new(forge_net::Solo { epoch: options.epoch });
        Decoder::new(self, backend, options, collective)
    }
}
