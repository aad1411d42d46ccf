//! The local model store, and everything that brings weights into it.
//!
//! ```text
//! name ─parse→ ModelSource ─catalogue→ sources in order ─hub │ package index │ url→ files
//!      files ─download (resume, checksum)→ blobs by digest ─manifest→ snapshot folder ─→ loader
//! ```
//!
//! All calls block; progress comes by callback ([`PullProgress`]) and a pull is stopped by a flag
//! ([`CancelFlag`]). This crate does not look inside weights: what a file contains is the loader's
//! business.
//!
//! Invariants: a blob's name is the digest of its content; a manifest refers only to blobs that
//! were complete when it was written; no name from outside becomes a path unchecked; no token is
//! ever printed or sent to another host than its own.

mod catalogue;
mod clean;
mod digest;
mod disk;
mod download;
mod error;
mod gguf_choice;
mod home;
mod http;
mod hub;
mod layout;
mod local;
mod lock;
mod manifest;
mod names;
mod options;
mod package_index;
mod pip_config;
mod preview;
mod progress;
mod pull;
mod resolved;
mod snapshot;
mod source;
mod store;
mod verify;
mod wheel;

pub use catalogue::{Catalogue, CatalogueEntry, CatalogueSource};
pub use digest::{Digest, DigestError};
pub use disk::{Disk, SystemDisk};
pub use error::{Result, SourceFailure, StoreError};
pub use home::ForgeHome;
pub use manifest::{Manifest, ManifestFile};
pub use options::{PullOptions, Secret, Waits};
pub use preview::Preview;
pub use progress::{CancelFlag, PullEvent, PullProgress, Silent};
pub use resolved::{ContentDigest, ResolvedModel};
pub use source::{HubSource, ModelSource, PackageSource, Surroundings};
pub use store::{Removed, Store};
