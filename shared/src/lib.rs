//! What every part of Forge shares: ids, specs, requests and events, configuration, metric names.
//!
//! What it is not: it has no policy and starts nothing. Of the workspace it may depend only on forge-tree.

pub mod cluster;
pub mod config;
pub mod generate;
pub mod ids;
pub mod link;
pub mod plan;
pub mod rollout;
pub mod spec;
pub mod telemetry;
pub mod version;

pub use forge_tree as tree;
