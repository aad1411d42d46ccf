//! Errors of the worker: what keeps a replica from running, and whether trying again can help.

use forge_shared::ids::NodeId;
use forge_shared::plan::Refusal;
use forge_shared::spec::ByteSize;

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
    /// The model cannot be brought here.
    #[error(transparent)]
    Store(#[from] forge_store::StoreError),
    /// Other weights than those that were planned for.
    #[error(
        "{model} has the digest {found}, and {expected} was planned for: bring the same files to every worker, or apply the service again"
    )]
    Digest {
        /// By what name it was asked for.
        model: String,
        /// Of the assignment.
        expected: String,
        /// What is here.
        found: String,
    },
    /// The device has less memory than the plan takes.
    #[error("device {device} has {} free, and the replica takes {}", ByteSize(*free_bytes), ByteSize(*needed_bytes))]
    Memory {
        /// Number within the node.
        device: u32,
        /// Bytes of the replica.
        needed_bytes: u64,
        /// Bytes that are free.
        free_bytes: u64,
        /// Bytes Forge can use of the device in all, where that is fewer than was said.
        found_bytes: Option<u64>,
    },
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
    /// The cluster does not have this node.
    #[error("the cluster refuses this node: {reason}")]
    Cluster {
        /// Why, and what to do.
        reason: String,
    },
    /// The engine service cannot be served.
    #[error("the engine service: {reason}")]
    Service {
        /// What is wrong.
        reason: String,
    },
    /// The data plane, between the workers of a replica.
    #[error(transparent)]
    Net(#[from] forge_net::NetError),
    /// A replica whose ranks are on several workers has ended: it is not started again under its plan.
    #[error("{source}")]
    Several {
        /// By whose fault, where that is known.
        node: Option<NodeId>,
        /// What happened.
        source: Box<WorkerError>,
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

    /// The node by whose fault a replica of several workers has ended.
    pub fn fault(&self) -> Option<&NodeId> {
        match self {
            WorkerError::Several { node, .. } => node.as_ref(),
            _ => None,
        }
    }

    /// What the device really has, where it is less than the node had said.
    pub fn found_memory_bytes(&self) -> Option<u64> {
        match self {
            WorkerError::Memory { found_bytes, .. } => *found_bytes,
            WorkerError::Several { source, .. } => source.found_memory_bytes(),
            _ => None,
        }
    }
}
