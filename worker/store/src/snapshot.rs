//! A model's files under their own names: a folder of links to the blobs, so that a loader gets an
//! ordinary path. It is made aside and renamed, and made anew if anything in it is not its blob.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Result, StoreError};
use crate::layout::Layout;
use crate::manifest::{Manifest, ManifestFile};

/// Makes (or finds) the folder and returns the path a loader takes: the single weight file of a
/// model that has only one file, else the folder. The index lock is held by the caller.
pub(crate) fn materialize(layout: &Layout, manifest: &Manifest) -> Result<PathBuf> {
    let folder = layout.snapshot(&manifest.digest());
    if !is_whole(layout, &folder, &manifest.files) {
        build(layout, &folder, &manifest.files)?;
    }
    Ok(match &manifest.files[..] {
        [only] => folder.join(&only.path),
        _ => folder,
    })
}

/// Deletes a snapshot folder if there is one.
pub(crate) fn delete(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(StoreError::io("delete", folder)(error)),
        _ => Ok(()),
    }
}

fn is_whole(layout: &Layout, folder: &Path, files: &[ManifestFile]) -> bool {
    files.iter().all(|file| is_same_file(&folder.join(&file.path), &layout.blob(&file.sha256)))
}

#[cfg(unix)]
fn is_same_file(one: &Path, other: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_same_file(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => one.len() == other.len(),
        _ => false,
    }
}

fn build(layout: &Layout, folder: &Path, files: &[ManifestFile]) -> Result<()> {
    let aside = folder.with_extension("new");
    delete(&aside)?;
    for file in files {
        let link = aside.join(&file.path);
        let parent = link.parent().unwrap_or(&aside);
        fs::create_dir_all(parent).map_err(StoreError::io("make folder", parent))?;
        link_to(&layout.blob(&file.sha256), &link).map_err(StoreError::io("link", &link))?;
    }
    delete(folder)?;
    fs::rename(&aside, folder).map_err(StoreError::io("rename", &aside))
}

/// A hard link, or a symbolic one where the file system has none.
fn link_to(blob: &Path, link: &Path) -> std::io::Result<()> {
    fs::hard_link(blob, link).or_else(|error| {
        #[cfg(unix)]
        return std::os::unix::fs::symlink(blob, link).map_err(|_| error);
        #[cfg(not(unix))]
        return Err(error);
    })
}
