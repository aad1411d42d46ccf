//! The store's front door: what is stored, and how it is opened and removed. Fetching is in
//! [`crate::pull`], giving disk space back in [`crate::clean`].
//!
//! Locks, in the order they are taken: a pull's name, a transfer's content, a model's use, the
//! index. The index lock is held only for moments; a model's use lock is held shared by everyone
//! who serves it, and exclusively by whoever removes it.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::catalogue::Catalogue;
use crate::digest::Digest;
use crate::disk::{Disk, SystemDisk};
use crate::error::{Result, StoreError};
use crate::home::ForgeHome;
use crate::layout::{Layout, write_atomically};
use crate::local;
use crate::lock::{self, LockWait};
use crate::manifest::{Manifest, ManifestFile};
use crate::progress::{CancelFlag, PullProgress};
use crate::resolved::{ContentDigest, ResolvedModel};
use crate::snapshot;
use crate::source::{ModelSource, Surroundings};
use crate::verify;

/// Longest wait for the index or for a removal under way; both take moments.
const SHORT_WAIT: Duration = Duration::from_secs(30);
/// A manifest is a few kilobytes; one of this size is no manifest.
const MAX_MANIFEST_BYTES: u64 = 16 << 20;

/// The local model store. Safe to use from several threads and processes at once.
pub struct Store {
    pub(crate) layout: Layout,
    pub(crate) catalogue: Catalogue,
    pub(crate) disk: Arc<dyn Disk>,
}

/// What a removal did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// The model's name.
    pub name: String,
    /// Bytes given back to the disk; files shared with other models stay.
    pub freed_bytes: u64,
}

impl Store {
    /// Opens the store under a home, making its folders where they are missing.
    ///
    /// # Errors
    /// If the folders cannot be made or the user's catalogue is wrong.
    pub fn open(home: &ForgeHome) -> Result<Self> {
        Self::open_on(home, Arc::new(SystemDisk))
    }

    /// As [`Self::open`], writing through a disk of the caller's own (a quota, a test).
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_on(home: &ForgeHome, disk: Arc<dyn Disk>) -> Result<Self> {
        Ok(Self { layout: Layout::create(home.models())?, catalogue: Catalogue::load(&home.catalogue_file())?, disk })
    }

    /// The catalogue, the user's own entries included.
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// The folder the store lives in.
    pub fn root(&self) -> &Path {
        self.layout.root()
    }

    /// Reads a text as a model source, with this store's catalogue and this process's folder.
    ///
    /// # Errors
    /// As [`ModelSource::parse`].
    pub fn parse(&self, name: &str) -> Result<ModelSource> {
        let surroundings = Surroundings {
            alias: &|text| self.catalogue.find(text).map(|(alias, _)| alias.to_owned()),
            path_exists: &|path| path.exists(),
        };
        ModelSource::parse(name, &surroundings).map_err(|error| match error {
            StoreError::UnknownModel { name, tried, mut remedy } => {
                let similar = self.catalogue.similar(&name);
                if !similar.is_empty() {
                    remedy.push_str(&format!(". The catalogue has {}", similar.join(", ")));
                }
                StoreError::UnknownModel { name, tried, remedy }
            }
            other => other,
        })
    }

    /// Resolves a model that is in the store, or a local path; never uses the network. `None` if
    /// the name is well-formed and would have to be pulled.
    ///
    /// # Errors
    /// If the name is malformed or the stored files are damaged.
    pub fn resolve(&self, name: &str, progress: &dyn PullProgress) -> Result<Option<ResolvedModel>> {
        match self.parse(name)? {
            ModelSource::Local(path) => local::resolve(name.to_owned(), &path).map(Some),
            source => self.open_stored(&source.to_string(), progress),
        }
    }

    /// All stored models by name. A manifest that cannot be read is left out, with a warning in
    /// the log.
    ///
    /// # Errors
    /// If the store's folder cannot be read.
    pub fn list(&self) -> Result<Vec<Manifest>> {
        let folder = self.layout.manifests();
        let mut manifests = Vec::new();
        for entry in fs::read_dir(&folder).map_err(StoreError::io("read", &folder))? {
            let path = entry.map_err(StoreError::io("read", &folder))?.path();
            if path.extension().is_none_or(|end| end != "json") {
                continue;
            }
            match read_manifest(&path) {
                Ok(Some(manifest)) => manifests.push(manifest),
                Ok(None) => {}
                Err(error) => tracing::warn!(path = %path.display(), %error, "a manifest is left out"),
            }
        }
        manifests.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(manifests)
    }

    /// What the store knows of one model.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if it is not stored.
    pub fn show(&self, name: &str) -> Result<Manifest> {
        let key = self.stored_key(name)?;
        self.manifest(&key)?.ok_or(StoreError::NotFound { name: key })
    }

    /// Reads every file of a model against its digest.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] names the first file that differs.
    pub fn verify(&self, name: &str, progress: &dyn PullProgress) -> Result<()> {
        verify::verify(&self.layout, &self.show(name)?, true, progress)
    }

    /// Removes a model, and every file no other model refers to.
    ///
    /// # Errors
    /// [`StoreError::InUse`] while a process serves it, [`StoreError::NotFound`].
    pub fn remove(&self, name: &str) -> Result<Removed> {
        let key = self.stored_key(name)?;
        let manifest = self.manifest(&key)?.ok_or_else(|| StoreError::NotFound { name: key.clone() })?;
        // Held to the end, so that nobody opens what is being deleted.
        let Some(_use) = lock::try_exclusive(&self.layout.use_lock(&manifest.digest()))? else {
            return Err(StoreError::InUse { name: key });
        };
        let _index = self.lock_index()?;
        let path = self.layout.manifest(&key);
        fs::remove_file(&path).map_err(StoreError::io("delete", &path))?;
        let freed_bytes = self.release(&manifest)?;
        Ok(Removed { name: key, freed_bytes })
    }

    /// The name under which a text's model is stored: its canonical form, or the text itself where
    /// the catalogue no longer knows an alias that was pulled.
    fn stored_key(&self, name: &str) -> Result<String> {
        match self.parse(name) {
            Ok(source) => Ok(source.to_string()),
            Err(_) if self.layout.manifest(name).exists() => Ok(name.to_owned()),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn manifest(&self, key: &str) -> Result<Option<Manifest>> {
        let manifest = read_manifest(&self.layout.manifest(key))?;
        // On a file system that ignores letter case another model may answer to this file name.
        Ok(manifest.filter(|manifest| manifest.name == key))
    }

    /// Opens a stored model: leases it, verifies it, and links its files into a folder.
    pub(crate) fn open_stored(&self, key: &str, progress: &dyn PullProgress) -> Result<Option<ResolvedModel>> {
        loop {
            let Some(manifest) = self.manifest(key)? else { return Ok(None) };
            let digest = manifest.digest();
            let lease = lock::shared(&self.layout.use_lock(&digest), SHORT_WAIT)?;
            // It may have been removed or updated before the lease was held.
            if self.manifest(key)?.is_none_or(|now| now.digest() != digest) {
                continue;
            }
            verify::verify(&self.layout, &manifest, false, progress)?;
            let index = self.lock_index()?;
            let path = snapshot::materialize(&self.layout, &manifest)?;
            drop(index);
            return Ok(Some(ResolvedModel {
                name: key.to_owned(),
                path,
                digest: ContentDigest::Full(digest),
                size_bytes: manifest.size_bytes(),
                manifest: Some(manifest),
                _lease: Some(Arc::new(lease)),
            }));
        }
    }

    /// Writes a manifest, if all its blobs are (still) there, and releases the files of the one it
    /// replaces. False if a blob has vanished since, to a removal that did not know of this model.
    pub(crate) fn commit(&self, manifest: &Manifest) -> Result<bool> {
        let _index = self.lock_index()?;
        if !manifest.files.iter().all(|file| self.layout.has_blob(&file.sha256, file.size_bytes)) {
            return Ok(false);
        }
        // One that cannot be read is replaced without being released.
        let replaced = self.manifest(&manifest.name).unwrap_or_default();
        let text = serde_json::to_vec_pretty(manifest).expect("a manifest is plain data");
        write_atomically(&self.layout.manifest(&manifest.name), &text)?;
        if let Some(old) = replaced.filter(|old| old.digest() != manifest.digest())
            && let Some(_use) = lock::try_exclusive(&self.layout.use_lock(&old.digest()))?
        {
            self.release(&old)?;
        }
        Ok(true)
    }

    /// A stored file of this digest, whatever model it belongs to, and the source that model came from.
    pub(crate) fn find_file(&self, digest: &Digest) -> Result<Option<(ManifestFile, String)>> {
        let found = self.list()?.into_iter().find_map(|manifest| {
            let file = manifest.files.into_iter().find(|file| file.sha256 == *digest)?;
            self.layout.has_blob(digest, file.size_bytes).then_some((file, manifest.source))
        });
        Ok(found)
    }

    pub(crate) fn lock_index(&self) -> Result<fs::File> {
        lock::exclusive(
            &self.layout.index_lock(),
            &LockWait { what: "the model store", limit: SHORT_WAIT, cancel: &CancelFlag::default(), on_wait: &|| {} },
        )
    }
}

/// `None` if there is no such file.
fn read_manifest(path: &Path) -> Result<Option<Manifest>> {
    let wrong = |reason: String| StoreError::Setting {
        name: format!("manifest {}", path.display()),
        reason: format!("{reason}; delete the file and pull the model again"),
    };
    match fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::io("read", path)(error)),
        Ok(metadata) if metadata.len() > MAX_MANIFEST_BYTES => return Err(wrong("is too large".into())),
        Ok(_) => {}
    }
    match fs::read_to_string(path) {
        Ok(text) => Manifest::parse(&text).map(Some).map_err(wrong),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io("read", path)(error)),
    }
}
