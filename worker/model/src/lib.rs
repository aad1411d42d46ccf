//! Models: reading them, describing them as data, and running them over a [`forge_kernels::Backend`].
//!
//! What it is: loaders for GGUF files and Hugging Face folders, the table of model families, and one generic
//! decoder for all of them. What it is not: it schedules nothing, samples nothing and knows no text.
//!
//! Invariant: what a file does not say clearly is refused with an error that names the tensor or key; nothing is
//! guessed, and nothing in the file is left out in silence.

pub mod arch;
pub mod checkpoint;
pub mod decoder;
pub mod error;
pub mod generation;
pub mod gguf;
mod json;
pub mod memory;
pub mod model;
mod progress;
pub mod routing;
pub mod safetensors;
mod scan;
pub mod session;
pub mod sharded;
mod source;
pub mod step;
pub mod torch;
mod weights;

pub use arch::{Architecture, Overrides, RopeScalingOverride};
pub use checkpoint::{Checkpoint, Format, LoadMode};
pub use decoder::options::{DecoderOptions, Shard};
pub use decoder::{Decoder, Groups};
pub use error::{ModelError, Result};
pub use generation::GenerationDefaults;
pub use gguf::GgufTokenizerData;
pub use memory::{ModelMemory, ModelParts, Quantization, TypeCount};
pub use model::{Model, ModelSummary};
pub use progress::LoadProgress;
pub use session::Session;
pub use sharded::ShardedModel;
pub use step::{StageInput, StageModel, StageOutput, StepModel, StepModelInfo, StepPlan};
