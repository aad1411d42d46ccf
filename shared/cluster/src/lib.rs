//! How Forge's processes find, trust and speak to each other: identities, mTLS, the coordinators' API and its wire.
//!
//! What it is not: it decides nothing about the cluster (`forge-coordinator` does) and runs no model. [`api::ClusterApi`]
//! is the one seam: `forgectl serve` has a coordinator behind it in the same process, everything else a wire.

pub mod api;
pub mod build;
pub mod client;
pub mod config;
pub mod engine;
pub mod incarnation;
pub mod probes;
mod resident;
pub mod session;
pub mod signals;
pub mod status;
pub mod tls;
pub mod tracing;

pub use resident::resident_bytes;
