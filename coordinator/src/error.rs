//! Everything that can go wrong in a coordinator, for callers in this process and for the wire.
//!
//! Invariant: [`CoordinatorError::Unknown`] is the only one after which a command may have been applied.

use std::path::PathBuf;

use forge_cluster::api::ClusterError;
use forge_shared::cluster::command::CommandError;
use forge_shared::plan::Refusal;

use crate::raft::RaftError;
use crate::state::StateError;

/// Why a coordinator did not start, or did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// The log or the group.
    #[error(transparent)]
    Raft(RaftError),
    /// A snapshot or backup that is no state of this version.
    #[error(transparent)]
    State(#[from] StateError),
    /// A file or folder.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A port that cannot be opened, credentials that cannot be used, a configuration that contradicts itself.
    #[error("{reason}")]
    Start {
        /// Which, and what to do.
        reason: String,
    },
    /// An operator took this coordinator out of the group.
    #[error(
        "coordinator {name} was removed from the group (`forgectl cluster members remove`): it takes no part any more. To come back it \
         joins anew with a token of `forgectl cluster members add`; remove {} and its certificate first",
        data_dir.display()
    )]
    Removed {
        /// Its name.
        name: String,
        /// Folder of its data, which is of no use any more.
        data_dir: PathBuf,
    },
    /// A backup that cannot be restored from.
    #[error("backup: {reason}")]
    Backup {
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// The command was refused; nothing changed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// It fits nowhere.
    #[error(transparent)]
    NotPlaceable(Box<Refusal>),
    /// Another coordinator leads, or none does. Nothing was proposed.
    #[error("this coordinator does not lead{}", match .leader { Some(leader) => format!("; {leader} does"), None => String::from(", and it knows none that does") })]
    NotLeader {
        /// `host:port` of the leader, if known.
        leader: Option<String>,
    },
    /// Bounds of work are reached; nothing was proposed.
    #[error("{reason}")]
    Busy {
        /// Which bound, and when to try again.
        reason: String,
    },
    /// Not done in time, and nothing was proposed.
    #[error("not done within {waited_ms} ms: {reason}")]
    Late {
        /// Milliseconds.
        waited_ms: u64,
        /// What was being waited for.
        reason: String,
    },
    /// A worker is still at it, and nothing was proposed.
    #[error("not finished within {waited_ms} ms: {reason}")]
    Unfinished {
        /// Milliseconds.
        waited_ms: u64,
        /// Which worker is at what, since when, and what to do.
        reason: String,
    },
    /// A node that would have to do it is lost, or does not answer.
    #[error("{reason}")]
    Away {
        /// Which, and what to do.
        reason: String,
    },
    /// It was proposed and its end is not known: ask again under the same request id.
    #[error("the command's outcome is not known: {reason}")]
    Unknown {
        /// What was lost.
        reason: String,
    },
    /// The caller shows no certificate.
    #[error("no certificate: {reason}")]
    Unauthenticated {
        /// Which one it takes.
        reason: String,
    },
    /// The caller may not.
    #[error("not allowed: {reason}")]
    Forbidden {
        /// Which role it takes.
        reason: String,
    },
    /// A field of a request that is no command is wrong.
    #[error("{field}: {reason}")]
    Message {
        /// Of the request.
        field: &'static str,
        /// What is wrong and what to send.
        reason: String,
    },
}

impl CoordinatorError {
    /// A wrong field of a request.
    pub(crate) fn message(field: &'static str, reason: impl ToString) -> Self {
        CoordinatorError::Message { field, reason: reason.to_string() }
    }
}

impl From<CoordinatorError> for ClusterError {
    fn from(error: CoordinatorError) -> Self {
        match error {
            CoordinatorError::Command(error) => ClusterError::Command(error),
            CoordinatorError::NotPlaceable(refusal) => ClusterError::NotPlaceable(refusal),
            CoordinatorError::Unknown { reason } => ClusterError::Unknown { reason },
            CoordinatorError::Late { waited_ms, reason } => ClusterError::Unavailable { waited_ms, reason },
            CoordinatorError::Unfinished { waited_ms, reason } => ClusterError::Unfinished { waited_ms, reason },
            CoordinatorError::Away { reason } => ClusterError::Away { reason },
            error @ (CoordinatorError::Forbidden { .. } | CoordinatorError::Unauthenticated { .. }) => {
                ClusterError::Forbidden { reason: error.to_string() }
            }
            CoordinatorError::Message { field, reason } => ClusterError::Command(CommandError::Invalid { field: field.into(), reason }),
            error => ClusterError::Unavailable { waited_ms: 0, reason: error.to_string() },
        }
    }
}
