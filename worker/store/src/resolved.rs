//! A model that is ready to load: where its files are, and a lease that keeps them there.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::digest::Digest;
use crate::error::Result;
use crate::manifest::Manifest;
use crate::progress::CancelFlag;

/// What identifies a model's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ContentDigest {
    /// Over the digests of all files: [`Manifest::digest`].
    Full(Digest),
    /// Over name, size, modification time, inode and the first and last MiB of every file: what a local
    /// path gets without being read whole. It tells edited files apart, but is no proof against a forger;
    /// and a copy, on another machine say, has another one.
    Sampled(Digest),
}

impl fmt::Display for ContentDigest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full(digest) => write!(formatter, "sha256:{digest}"),
            Self::Sampled(digest) => write!(formatter, "sampled:{digest}"),
        }
    }
}

/// A model that is ready to load. While a value of this type (or a clone) lives, the store refuses
/// to remove the model.
#[derive(Debug, Clone)]
pub struct ResolvedModel {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) digest: ContentDigest,
    pub(crate) size_bytes: u64,
    pub(crate) manifest: Option<Manifest>,
    /// Shared lock on the snapshot; held, never read.
    pub(crate) _lease: Option<Arc<File>>,
}

impl ResolvedModel {
    /// The name by which it was asked for, in canonical form.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A folder in Hugging Face layout, or a single GGUF file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What identifies the content.
    pub fn digest(&self) -> ContentDigest {
        self.digest
    }

    /// Digest of the whole content, the same on every machine that has these files: the manifest's, or for a local path
    /// one for which every byte is read.
    ///
    /// # Errors
    /// A file that cannot be read, or a cancellation.
    pub fn whole_digest(&self, cancel: &CancelFlag) -> Result<Digest> {
        match self.digest {
            ContentDigest::Full(digest) => Ok(digest),
            ContentDigest::Sampled(_) => crate::local::whole_digest(&self.path, cancel),
        }
    }

    /// Size of all files in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// What the store knows of it; `None` for a local path.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }
}
