//! Errors of the worker: what keeps a replica from running, and whether trying again can help.

use forge_shared::plan::Refusal;

/// Why a replica does not run.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The checkpoint cannot be read or run.
    #[error(transparent)]
    Model(#[from] forge_model::ModelError),
    /// Its tokenizer cannot be built.
    #[error("tokenizer: {0}")]
    Text(#[from] forge_text::TextError),
    /// The device refused.
    #[error(transparent)]
    Kernel(#[from] forge_kernels::KernelError),
    /// The engine could not start.
    #[error(transparent)]
    Engine(#[from] forge_engine::EngineError),
    /// A file beside the model cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which file.
        path: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The plan cannot be carried out here.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A setting that this model or machine does not allow.
    #[error("{field}: {reason}")]
    Setting {
        /// Key of the specification.
        field: &'static str,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The family that the specification names is not that of the files.
    #[error("the model's files do not match family `{given}`")]
    Family {
        /// As it was given.
        given: String,
        /// What to do.
        remedy: String,
        /// What did not match.
        source: Box<forge_model::ModelError>,
    },
    /// The engine ended by itself.
    #[error("the engine died: {reason}")]
    EngineDied {
        /// What it said.
        reason: String,
    },
    /// The actor system would not start an actor.
    #[error("cannot start actor {actor}: {reason}")]
    Actor {
        /// Which.
        actor: &'static str,
        /// Why.
        reason: String,
    },
    /// The replica was given up: it died too often or cannot be loaded.
    #[error("{replica} was given up: {reason}")]
    GivenUp {
        /// Which.
        replica: String,
        /// The last reason.
        reason: String,
    },
}

impl WorkerError {
    /// Whether the same replica may run when it is started again: a death may be passing, a bad file is not.
    pub fn restartable(&self) -> bool {
        matches!(self, WorkerError::EngineDied { .. } | WorkerError::Actor { .. })
    }
}
