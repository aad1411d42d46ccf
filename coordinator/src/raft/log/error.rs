//! Why a data directory is refused or cannot be written.

use std::io;

use crate::raft::convert::ConvertError;

/// Errors of the log and its folder.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// No space. Nothing of the attempt counts; it may be tried again.
    #[error("the disk is full: cannot {operation} {name}")]
    Full {
        /// What was tried.
        operation: &'static str,
        /// The file.
        name: String,
    },
    /// The system refused. What is on disk is not known any more: the process must start again.
    #[error("cannot {operation} {name}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The file.
        name: String,
        /// The system's word.
        source: io::Error,
    },
    /// Another process uses the folder.
    #[error("another process uses {folder}: one coordinator at a time; stop it, or give this one another data directory")]
    Locked {
        /// Which.
        folder: String,
    },
    /// The folder is another member's.
    #[error("{name} belongs to {what} {found:?}, and this is {expected:?}: give this coordinator its own data directory, or an empty one")]
    Foreign {
        /// The file.
        name: String,
        /// `cluster` or `member`.
        what: &'static str,
        /// As the file says.
        found: String,
        /// As the options say.
        expected: String,
    },
    /// A newer version wrote it.
    #[error("{name} has format {version}, and this version of Forge reads up to {known}: start the newer version that wrote it")]
    Newer {
        /// The file.
        name: String,
        /// Its format.
        version: u32,
        /// The newest known.
        known: u32,
    },
    /// Something that was on disk is not there any more.
    #[error(
        "{name} is damaged at byte {offset}: {why}. What it held may be lost: remove this member from the group, and add it again \
         under a new id with an empty data directory (a group of one: restore a backup)"
    )]
    Corrupt {
        /// The file.
        name: String,
        /// Where.
        offset: u64,
        /// What is seen there.
        why: String,
    },
    /// A record with a field that cannot be.
    #[error("{name} holds a record that cannot be: {source}")]
    Record {
        /// The file.
        name: String,
        /// Which field.
        source: ConvertError,
    },
}

impl LogError {
    pub(super) fn of(operation: &'static str, name: &str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { operation, name: name.into() },
            _ => Self::Io { operation, name: name.into(), source },
        }
    }

    /// Whether the attempt may be repeated when space returns.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }
}
