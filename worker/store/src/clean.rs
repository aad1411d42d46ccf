//! Giving disk space back: files of a model that went, and what interrupted pulls left behind.
//!
//! Invariant: a blob some manifest refers to is never deleted here.

use std::collections::HashSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::error::{Result, StoreError};
use crate::lock;
use crate::manifest::Manifest;
use crate::snapshot;
use crate::store::Store;

impl Store {
    /// Deletes what nothing refers to: parts of interrupted pulls, and files of replaced models
    /// that were in use at the time. What is being fetched or served right now stays. Returns the
    /// bytes given back.
    ///
    /// # Errors
    /// If a file cannot be deleted.
    pub fn clean(&self) -> Result<u64> {
        let mut freed_bytes = 0;
        for path in entries(&self.layout.partial_folder())? {
            // Every name there begins with the digest its transfer lock is named by.
            let Some(key) = leading_digest(&path, "") else { continue };
            if let Some(_transfer) = lock::try_exclusive(&self.layout.transfer_lock(&key))? {
                freed_bytes += delete_file(&path)?;
            }
        }
        let _index = self.lock_index()?;
        let known = self.list()?;
        for path in entries(&self.layout.snapshots())? {
            let Some(digest) = leading_digest(&path, "") else { continue };
            if known.iter().all(|manifest| manifest.digest() != digest)
                && let Some(_use) = lock::try_exclusive(&self.layout.use_lock(&digest))?
            {
                snapshot::delete(&path)?;
            }
        }
        // A pull under way has blobs whose manifest is not written yet.
        let Some(_pulls) = self.hold_all_pulls()? else { return Ok(freed_bytes) };
        let kept = referred(&known);
        for path in entries(&self.layout.blobs())? {
            if leading_digest(&path, "sha256-").is_some_and(|digest| !kept.contains(&digest)) {
                freed_bytes += delete_file(&path)?;
            }
        }
        Ok(freed_bytes)
    }

    /// Deletes the snapshot and the blobs of a manifest that is gone, except what other manifests
    /// share. The caller holds the index lock and the model's use lock. Returns the bytes freed.
    pub(crate) fn release(&self, gone: &Manifest) -> Result<u64> {
        let others = self.list()?;
        let digest = gone.digest();
        if others.iter().all(|other| other.digest() != digest) {
            snapshot::delete(&self.layout.snapshot(&digest))?;
        }
        let kept = referred(&others);
        let unused = gone.files.iter().filter(|file| !kept.contains(&file.sha256));
        unused.map(|file| self.delete_blob(&file.sha256)).sum()
    }

    /// Deletes a blob and its note; returns its size.
    pub(crate) fn delete_blob(&self, digest: &Digest) -> Result<u64> {
        delete_file(&self.layout.verified_note(digest))?;
        delete_file(&self.layout.blob(digest))
    }

    /// The locks of all pulls, or `None` if one of them is under way.
    fn hold_all_pulls(&self) -> Result<Option<Vec<fs::File>>> {
        let is_pull = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pull-"));
        let locks = entries(&self.layout.locks())?;
        locks.iter().filter(|path| is_pull(path)).map(|path| lock::try_exclusive(path)).collect()
    }
}

fn referred(manifests: &[Manifest]) -> HashSet<Digest> {
    manifests.iter().flat_map(|manifest| &manifest.files).map(|file| file.sha256).collect()
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = || -> std::io::Result<Vec<PathBuf>> { fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect() };
    read().map_err(StoreError::io("read", folder))
}

/// The digest a file name begins with, after a prefix.
fn leading_digest(path: &Path, prefix: &str) -> Option<Digest> {
    path.file_name()?.to_str()?.strip_prefix(prefix)?.get(..64)?.parse().ok()
}

/// Deletes a file if it is there; returns its size.
fn delete_file(path: &Path) -> Result<u64> {
    let size = fs::metadata(path).map_or(0, |metadata| metadata.len());
    match fs::remove_file(path) {
        Ok(()) => Ok(size),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        Err(error) => Err(StoreError::io("delete", path)(error)),
    }
}
