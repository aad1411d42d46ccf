//! Names of everything below the store's folder, and the few steps by which files get there:
//! written aside, synced, then renamed, so that a name never stands for half a file.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::error::{Result, StoreError};
use crate::names::escape_model_name;

/// The store's folder.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Makes the folders that are missing.
    pub(crate) fn create(root: PathBuf) -> Result<Self> {
        for name in ["blobs", "manifests", "snapshots", "partial", "locks"] {
            let folder = root.join(name);
            fs::create_dir_all(&folder).map_err(StoreError::io("make folder", folder))?;
        }
        Ok(Self { root })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join(format!("blobs/sha256-{digest}"))
    }

    /// Note that a blob was read against its digest.
    pub(crate) fn verified_note(&self, digest: &Digest) -> PathBuf {
        self.root.join(format!("blobs/sha256-{digest}.verified"))
    }

    pub(crate) fn manifests(&self) -> PathBuf {
        self.root.join("manifests")
    }

    pub(crate) fn manifest(&self, name: &str) -> PathBuf {
        self.manifests().join(format!("{}.json", escape_model_name(name)))
    }

    pub(crate) fn snapshot(&self, digest: &Digest) -> PathBuf {
        self.root.join(format!("snapshots/{digest}"))
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    pub(crate) fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    pub(crate) fn locks(&self) -> PathBuf {
        self.root.join("locks")
    }

    pub(crate) fn partial_folder(&self) -> PathBuf {
        self.root.join("partial")
    }

    /// A file while it arrives; `key` is a digest of what identifies it.
    pub(crate) fn partial(&self, key: &Digest) -> PathBuf {
        self.root.join(format!("partial/{key}"))
    }

    /// Deletes what unpacking a wheel left behind when its process was killed. The wheel's
    /// transfer lock is held by the caller.
    pub(crate) fn delete_leftovers(&self, wheel: &Digest) -> Result<()> {
        let folder = self.partial_folder();
        let prefix = extract_prefix(wheel);
        for entry in fs::read_dir(&folder).map_err(StoreError::io("read", &folder))? {
            let path = entry.map_err(StoreError::io("read", &folder))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(&prefix) {
                fs::remove_file(&path).map_err(StoreError::io("delete", &path))?;
            }
        }
        Ok(())
    }

    /// What a package's wheel was found to hold.
    pub(crate) fn wheel_note(&self, wheel: &Digest) -> PathBuf {
        self.root.join(format!("partial/{wheel}.wheel.json"))
    }

    pub(crate) fn pull_lock(&self, name: &str) -> PathBuf {
        self.root.join(format!("locks/pull-{}.lock", escape_model_name(name)))
    }

    pub(crate) fn transfer_lock(&self, key: &Digest) -> PathBuf {
        self.root.join(format!("locks/transfer-{key}.lock"))
    }

    pub(crate) fn use_lock(&self, digest: &Digest) -> PathBuf {
        self.root.join(format!("locks/use-{digest}.lock"))
    }

    /// Held for the short moments in which manifests, snapshots and blobs change together.
    pub(crate) fn index_lock(&self) -> PathBuf {
        self.root.join("locks/index.lock")
    }

    /// Whether a blob of this size is present. Its content is the loader's moment to check.
    pub(crate) fn has_blob(&self, digest: &Digest, size_bytes: u64) -> bool {
        fs::metadata(self.blob(digest)).is_ok_and(|meta| meta.is_file() && meta.len() == size_bytes)
    }

    /// Moves a complete, synced file to its place among the blobs, read-only.
    pub(crate) fn install_blob(&self, from: &Path, digest: &Digest) -> Result<()> {
        let to = self.blob(digest);
        protect(from).map_err(StoreError::io("protect", from))?;
        fs::rename(from, &to).map_err(StoreError::io("rename", from))?;
        sync_parent(&to)
    }
}

/// Start of the names of files being unpacked from a wheel.
pub(crate) fn extract_prefix(wheel: &Digest) -> String {
    format!("{wheel}.extract-")
}

/// Everybody may read a blob and nobody may write it: its name says what it contains.
fn protect(path: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o444);
    #[cfg(not(unix))]
    let permissions = {
        let mut permissions = fs::metadata(path)?.permissions();
        permissions.set_readonly(true);
        permissions
    };
    fs::set_permissions(path, permissions)
}

/// Writes a small file so that readers see the old content or the new, never a part.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{}-{:?}.tmp", std::process::id(), std::thread::current().id()));
    let aside = PathBuf::from(aside);
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&aside)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&aside, path)
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&aside);
        crate::disk::write_error(error, path, content.len() as u64, false)
    })?;
    sync_parent(path)
}

/// Makes a rename durable. Only Unix can sync a folder; elsewhere the file system decides.
fn sync_parent(path: &Path) -> Result<()> {
    #[cfg(unix)]
    if let Some(parent) = path.parent() {
        File::open(parent).and_then(|folder| folder.sync_all()).map_err(StoreError::io("sync", parent))?;
    }
    Ok(())
}
