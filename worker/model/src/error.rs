//! What can go wrong between a file and its logits. Every message names the file, key, tensor or field at fault
//! and, where there is one, the remedy.

use std::path::PathBuf;
use std::time::Duration;

use forge_kernels::KernelError;
use forge_net::NetError;
use forge_shared::ids::{Epoch, NodeId};

/// Errors of the model crate.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The path holds nothing this crate can load.
    #[error("{} is not a model: {reason}", path.display())]
    NotAModel {
        /// What was given.
        path: PathBuf,
        /// What was found, and what is needed.
        reason: String,
    },
    /// A file of a known format is truncated, damaged or hostile.
    #[error("invalid {format}: {reason}")]
    Malformed {
        /// "GGUF" or "safetensors" or a file's name.
        format: String,
        /// What is wrong, and where.
        reason: String,
    },
    /// A pickle names something that is no part of a tensor: what reads it with Python would run it.
    #[error(
        "the {format} names {name} (byte {offset} of its pickle), which no weights need: Python would run code on reading it. Do not load \
         it elsewhere either; take safetensors from a source you trust"
    )]
    ForeignCode {
        /// The format.
        format: String,
        /// The name, with its module.
        name: String,
        /// Where in the pickle.
        offset: usize,
    },
    /// A tensor's storage type is not implemented.
    #[error("tensor {tensor} has type {found}, which is not supported: {remedy}")]
    UnsupportedType {
        /// Tensor name.
        tensor: String,
        /// The type's name.
        found: String,
        /// What to do instead.
        remedy: String,
    },
    /// A configuration key is missing or has a value that makes no sense.
    #[error("{file}: {key}: {reason}")]
    Config {
        /// config.json, generation_config.json or "GGUF metadata".
        file: String,
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The model's family has no row in the table.
    #[error("model family `{found}` is not supported; supported families: {supported}{nearest}")]
    UnknownFamily {
        /// `model_type` or `general.architecture` as found.
        found: String,
        /// Supported names.
        supported: String,
        /// Which of them the tensors are like, and what does not match; empty where no tensors were seen.
        nearest: String,
    },
    /// The family is known, but this variant is not implemented.
    #[error("{what} is not supported: {remedy}")]
    Unsupported {
        /// What was found.
        what: String,
        /// What to do instead.
        remedy: String,
    },
    /// Tensors the architecture needs are not in the file.
    #[error("the checkpoint lacks {}: it is incomplete or its configuration is another model's", list(names))]
    MissingTensors {
        /// Their names.
        names: Vec<String>,
    },
    /// The file has tensors the architecture does not know, so its output would be wrong without a word.
    #[error("the checkpoint has tensors that this architecture does not use: {}; is the configuration another model's?", list(names))]
    UnexpectedTensors {
        /// Their names.
        names: Vec<String>,
    },
    /// The family that the operator names is not this model's.
    #[error("--arch {name} does not fit this model: {misfit}. By the names of its tensors it is like: {like}")]
    OverriddenFamily {
        /// The name given.
        name: String,
        /// What did not fit.
        misfit: String,
        /// The families that its tensors are like, and what does not match.
        like: String,
    },
    /// A tensor's shape is not the one the configuration gives.
    #[error("tensor {name} has shape {actual:?}, the configuration needs {expected:?}")]
    TensorShape {
        /// Tensor name.
        name: String,
        /// Computed from the configuration.
        expected: Vec<usize>,
        /// In the file.
        actual: Vec<usize>,
    },
    /// A weight is NaN or infinite.
    #[error(
        "{}: tensor {tensor} holds a NaN or an infinity (element or block {index}): the file is damaged or training diverged; download it \
         again, or take another checkpoint of this model",
        path.display()
    )]
    NonFinite {
        /// The file or folder.
        path: PathBuf,
        /// Tensor name.
        tensor: String,
        /// First element, or first block of a quantized type.
        index: usize,
    },
    /// Tensor parallelism or a pipeline cut that this model cannot have.
    #[error("{requested} cannot be had: {reason}; nearest that can: {nearest}")]
    Layout {
        /// What was asked for.
        requested: String,
        /// Why not.
        reason: String,
        /// Nearest valid value.
        nearest: String,
    },
    /// An option of the decoder is out of range.
    #[error("{option} = {value}: {reason}")]
    Option {
        /// Option name.
        option: &'static str,
        /// Its value.
        value: String,
        /// What is wrong, and what would do.
        reason: String,
    },
    /// A step plan does not fit the model: a defect of the engine, caught before anything is touched.
    #[error("step plan: {field}: {reason}")]
    Plan {
        /// Field of the plan.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A plan of an epoch that has been closed.
    #[error("step plan of epoch {plan} refused: this rank is at epoch {current}")]
    StaleEpoch {
        /// The plan's epoch.
        plan: Epoch,
        /// This rank's epoch.
        current: Epoch,
    },
    /// A rank of a sharded model failed; the replica is of no more use.
    #[error("rank {rank}: {source}")]
    Rank {
        /// Its number in the plan.
        rank: usize,
        /// What it met.
        source: Box<ModelError>,
    },
    /// A rank's thread panicked.
    #[error("it panicked: {reason}")]
    RankPanicked {
        /// With what.
        reason: String,
    },
    /// A rank ended before one that waits for it.
    #[error("{whom} has ended")]
    RankGone {
        /// Which.
        whom: &'static str,
    },
    /// A rank was not there in time; its replica is of no more use.
    #[error("{what} did not come within {waited:?}: the replica is given up")]
    RankLate {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// A rank of another worker has failed.
    #[error("worker {node}: {reason}")]
    FarRank {
        /// The worker by whose fault.
        node: NodeId,
        /// What it said.
        reason: String,
    },
    /// What another worker sent is none of what ranks say to each other.
    #[error("a message of another worker's ranks cannot be read: {reason}; run one version of Forge on all workers")]
    Message {
        /// What is wrong with it.
        reason: String,
    },
    /// Ranks of one replica are not alike.
    #[error("rank {rank} has {field} = {actual}, rank 0 has {expected}: all ranks need the same files and the same kind of device")]
    RanksDiffer {
        /// Which.
        rank: usize,
        /// In what.
        field: &'static str,
        /// What it has.
        actual: String,
        /// What the first has.
        expected: String,
    },
    /// A sharded model that has failed was asked to go on.
    #[error("the replica has ended: {reason}")]
    Ended {
        /// With what.
        reason: String,
    },
    /// A backend operation failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A collective failed.
    #[error(transparent)]
    Net(#[from] NetError),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ModelError>;

/// The first few names, and how many more there are.
pub(crate) fn list(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let mut text = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}
