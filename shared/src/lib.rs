//! What every part of Forge shares: ids, specs, requests and events, configuration, metric names.
//!
//! What it is not: it has no policy and starts nothing. It may not depend on any other crate of the workspace.

pub mod cluster;
pub mod config;
pub mod generate;
pub mod ids;
pub mod link;
pub mod plan;
pub mod rollout;
pub mod spec;
pub mod telemetry;
pub mod tree;
pub mod version;
