//! Reads stored files against their digests: whole on the first load after a pull, afterwards only
//! if size, time or inode changed since, or when asked to.

use std::fs::{self, File, Metadata};
use std::io;
use std::path::Path;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Result, StoreError};
use crate::layout::{Layout, write_atomically};
use crate::manifest::{Manifest, ManifestFile};
use crate::progress::{PullEvent, PullProgress};

/// Tells one state of a file from another without reading it: which one was verified, or sampled.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    pub(crate) size_bytes: u64,
    pub(crate) modified_ns: u64,
    pub(crate) inode: u64,
}

impl Stamp {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        let since = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Self { size_bytes: metadata.len(), modified_ns: since.map_or(0, |since| since.as_nanos() as u64), inode: inode(metadata) }
    }
}

#[cfg(unix)]
fn inode(metadata: &Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(metadata)
}

#[cfg(not(unix))]
fn inode(_metadata: &Metadata) -> u64 {
    0
}

/// Checks every file of a model; with `full` those verified before as well.
///
/// # Errors
/// [`StoreError::Corrupt`] names the first file that is missing or differs.
pub(crate) fn verify(layout: &Layout, manifest: &Manifest, full: bool, progress: &dyn PullProgress) -> Result<()> {
    manifest.files.iter().try_for_each(|file| verify_file(layout, &manifest.name, file, full, progress))
}

/// The files of a model that are missing or differ.
///
/// # Errors
/// Only if the disk cannot be read.
pub(crate) fn damaged<'a>(layout: &Layout, manifest: &'a Manifest, progress: &dyn PullProgress) -> Result<Vec<&'a ManifestFile>> {
    let mut found = Vec::new();
    for file in &manifest.files {
        match verify_file(layout, &manifest.name, file, true, progress) {
            Err(StoreError::Corrupt { .. }) => found.push(file),
            other => other?,
        }
    }
    Ok(found)
}

fn verify_file(layout: &Layout, model: &str, file: &ManifestFile, full: bool, progress: &dyn PullProgress) -> Result<()> {
    let corrupt = |reason: String| Err(StoreError::Corrupt { name: model.into(), file: file.path.clone(), reason });
    let path = layout.blob(&file.sha256);
    let metadata = match fs::metadata(&path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return corrupt("is missing".into()),
        Err(error) => return Err(StoreError::io("read", path)(error)),
    };
    if metadata.len() != file.size_bytes {
        return corrupt(format!("has {} bytes instead of {}", metadata.len(), file.size_bytes));
    }
    let stamp = Stamp::of(&metadata);
    let note = layout.verified_note(&file.sha256);
    if !full && read_stamp(&note).as_ref() == Some(&stamp) {
        return Ok(());
    }
    let mut reader = File::open(&path).map_err(StoreError::io("open", &path))?;
    let mut tell = |bytes| {
        let name = file.path.clone();
        progress.event(PullEvent::Verifying { name, bytes, total_bytes: file.size_bytes });
        Ok(())
    };
    let (found, _) = Digest::of_reader(&mut reader, &mut tell).map_err(StoreError::io("read", &path))?;
    if found != file.sha256 {
        return corrupt(format!("has sha256 {found} instead of {}", file.sha256));
    }
    // The note only saves time: a store on a read-only disk works without it.
    if let Ok(text) = serde_json::to_vec(&stamp)
        && let Err(error) = write_atomically(&note, &text)
    {
        tracing::debug!(%error, "the verification note was not written");
    }
    Ok(())
}

fn read_stamp(note: &Path) -> Option<Stamp> {
    serde_json::from_slice(&fs::read(note).ok()?).ok()
}
