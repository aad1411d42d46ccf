//! Every way the store can refuse, worded for the person at the terminal: what happened, why, and
//! what to do about it. Nothing here ever contains a token or the user part of a URL.

use std::path::PathBuf;

/// Result of a store operation.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// Why one source of a model was left for the next one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFailure {
    /// The source as the user would write it, for example `hf:org/name`.
    pub source: String,
    /// One sentence that says why it did not deliver.
    pub reason: String,
}

/// An error of the model store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The text names no model source.
    #[error("'{name}' names no model. Tried: {}. {remedy}", .tried.join("; "))]
    UnknownModel {
        /// What the user wrote.
        name: String,
        /// Each reading that was tried, with the reason it did not fit.
        tried: Vec<String>,
        /// What to write instead.
        remedy: String,
    },
    /// The text can be read in two ways.
    #[error("'{name}' is ambiguous: it may be {}. Write {remedy}", .readings.join(" or "))]
    AmbiguousModel {
        /// What the user wrote.
        name: String,
        /// The readings that fit.
        readings: Vec<String>,
        /// How to write each of them without doubt.
        remedy: String,
    },
    /// The text is of a known form but breaks one of its rules.
    #[error("'{name}' is not a valid model name: {reason}")]
    InvalidName {
        /// What the user wrote.
        name: String,
        /// The rule and the remedy.
        reason: String,
    },
    /// The model is not in the local store.
    #[error("model '{name}' is not in the local store; fetch it with `forgectl pull {name}`")]
    NotFound {
        /// The model's name.
        name: String,
    },
    /// Every source of a model failed.
    #[error("could not fetch '{name}': {}", list_failures(.failures))]
    AllSourcesFailed {
        /// The model's name.
        name: String,
        /// Each source in the order tried.
        failures: Vec<SourceFailure>,
    },
    /// The network is needed but switched off.
    #[error("{what} needs the network, and FORGE_OFFLINE is set; unset it, or pull the model while online")]
    Offline {
        /// What would have been fetched.
        what: String,
    },
    /// A host could not be reached or broke off.
    #[error("{host} {reason}")]
    Network {
        /// Host name, without credentials.
        host: String,
        /// What went wrong and what to check.
        reason: String,
    },
    /// A host answered with an error status.
    #[error("{host} answered {status} for {what}: {hint}")]
    Http {
        /// Host name, without credentials.
        host: String,
        /// HTTP status code.
        status: u16,
        /// What was asked for.
        what: String,
        /// What the status means here and what to do.
        hint: String,
    },
    /// A host answered with something that does not follow its protocol, or with an unsafe name.
    #[error("{host} sent an answer that cannot be used: {reason}")]
    BadAnswer {
        /// Host name, without credentials.
        host: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A repository or package has no weights Forge can load.
    #[error("{place} has no usable weights: {reason}")]
    NoUsableWeights {
        /// Repository, package or folder.
        place: String,
        /// What is there instead and what to do.
        reason: String,
    },
    /// Downloaded bytes differ from the published digest or size.
    #[error(
        "{file} does not match its published {what} (expected {expected}, got {found}); \
         the download was discarded, pull again, and if it happens twice the source is damaged"
    )]
    Mismatch {
        /// File name.
        file: String,
        /// `sha256` or `size`.
        what: &'static str,
        /// Published value.
        expected: String,
        /// Value of what arrived.
        found: String,
    },
    /// A stored file is damaged.
    #[error("model '{name}' is damaged on disk: {file} {reason}; `forgectl pull {name}` fetches it again")]
    Corrupt {
        /// Model name.
        name: String,
        /// File within the model.
        file: String,
        /// What differs.
        reason: String,
    },
    /// The disk is full or would be.
    #[error(
        "not enough disk space in {}: {} more are needed{}; {}",
        .path.display(),
        in_units(*.needed_bytes),
        .available_bytes.map(|bytes| format!(", {} are free", in_units(bytes))).unwrap_or_default(),
        if *.partial_kept {
            "what has arrived is kept, free some space (`forgectl rm`) and pull again to resume"
        } else {
            "free some space (`forgectl rm`) or set FORGE_HOME to a larger disk"
        }
    )]
    DiskFull {
        /// Folder on the full disk.
        path: PathBuf,
        /// Bytes still to be written.
        needed_bytes: u64,
        /// Bytes the file system reports as free, where known.
        available_bytes: Option<u64>,
        /// Whether a partial file stays behind from which the next pull resumes.
        partial_kept: bool,
    },
    /// The model is being used by a running process.
    #[error("model '{name}' is in use by a running Forge process; stop it first, then remove")]
    InUse {
        /// Model name.
        name: String,
    },
    /// Another process held a lock for longer than this one may wait.
    #[error("{what} is locked by another Forge process for more than {waited_s} s; try again later")]
    Busy {
        /// What is locked.
        what: String,
        /// Seconds waited.
        waited_s: u64,
    },
    /// The caller's cancel flag was raised.
    #[error("cancelled; what has arrived is kept, pull again to resume")]
    Cancelled,
    /// The address of the package index is not known.
    #[error(
        "the address of the Python package index is unknown: {reason}; \
         set PIP_INDEX_URL, or index-url in pip's configuration"
    )]
    NoPackageIndex {
        /// What was looked at.
        reason: String,
    },
    /// The catalogue file is wrong.
    #[error("catalogue {origin}: {reason}")]
    Catalogue {
        /// `built in` or the user's file.
        origin: String,
        /// The field and the remedy.
        reason: String,
    },
    /// A setting is wrong.
    #[error("{name}: {reason}")]
    Setting {
        /// Name of the environment variable or option.
        name: String,
        /// What is wrong and what to write.
        reason: String,
    },
    /// The local file system refused.
    #[error("cannot {action} {}: {error}", .path.display())]
    Io {
        /// What was being done, for example `write`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        #[source]
        error: std::io::Error,
    },
}

impl StoreError {
    /// Whether another source of the same model is worth trying after this error.
    ///
    /// A full disk, a cancelled pull or a broken local store would fail the next one just so.
    pub(crate) fn is_about_source(&self) -> bool {
        matches!(
            self,
            Self::Offline { .. }
                | Self::Network { .. }
                | Self::Http { .. }
                | Self::BadAnswer { .. }
                | Self::NoUsableWeights { .. }
                | Self::Mismatch { .. }
                | Self::NoPackageIndex { .. }
        )
    }

    /// Maps an I/O error on a local path.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |error| Self::Io { action, path, error }
    }
}

/// A number of bytes as people read it, in powers of ten.
fn in_units(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{bytes} bytes"),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

fn list_failures(failures: &[SourceFailure]) -> String {
    failures.iter().map(|failure| format!("{}: {}", failure.source, failure.reason)).collect::<Vec<_>>().join("; ")
}
