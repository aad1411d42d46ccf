//! The store's front door.

use std::path::PathBuf;

use crate::catalogue::Catalogue;
use crate::error::Result;
use crate::home::ForgeHome;
use crate::manifest::Manifest;
use crate::options::PullOptions;
use crate::progress::PullProgress;
use crate::resolved::ResolvedModel;

/// The local model store.
pub struct Store {
    pub(crate) root: PathBuf,
    pub(crate) catalogue: Catalogue,
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
        Ok(Self {
            root: home.models(),
            catalogue: Catalogue::load(&home.catalogue_file())?,
        })
    }

    /// The catalogue, the user's own entries included.
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// Brings a model into the store (or finds it there, or on a local path) and resolves it.
    ///
    /// # Errors
    /// See [`crate::StoreError`]; every source tried is listed with its reason.
    pub fn pull(
        &self,
        _name: &str,
        _options: &PullOptions,
        _progress: &dyn PullProgress,
    ) -> Result<ResolvedModel> {
        unimplemented!()
    }

    /// Resolves a model that is in the store, or a local path; never uses the network. `None` if
    /// the name is well-formed and would have to be pulled.
    ///
    /// # Errors
    /// If the name is malformed or the stored files are damaged.
    pub fn resolve(
        &self,
        _name: &str,
        _progress: &dyn PullProgress,
    ) -> Result<Option<ResolvedModel>> {
        unimplemented!()
    }

    /// All stored models by name.
    ///
    /// # Errors
    /// If the store's folder cannot be read.
    pub fn list(&self) -> Result<Vec<Manifest>> {
        unimplemented!()
    }

    /// What the store knows of one model.
    ///
    /// # Errors
    /// [`crate::StoreError::NotFound`] if it is not stored.
    pub fn show(&self, _name: &str) -> Result<Manifest> {
        unimplemented!()
    }

    /// Reads every file of a model against its digest.
    ///
    /// # Errors
    /// [`crate::StoreError::Corrupt`] names the first file that differs.
    pub fn verify(&self, _name: &str, _progress: &dyn PullProgress) -> Result<()> {
        unimplemented!()
    }

    /// Removes a model, and every file no other model refers to.
    ///
    /// # Errors
    /// [`crate::StoreError::InUse`] while a process serves it.
    pub fn remove(&self, _name: &str) -> Result<Removed> {
        unimplemented!()
    }
}
