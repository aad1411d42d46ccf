//! The cluster's language: nodes, services, placements, the commands that change them and the events that tell of it.
//!
//! Plain data, the same in the raft log, on the wire, in `forgectl get -o json` and in tests. What it is not: it decides
//! nothing; `forge-coordinator` applies commands, `forge-cluster` carries them.
//!
//! Invariant: everything here survives serde's round trip unchanged, and unknown keys are refused by name.

pub mod certificate;
pub mod command;
pub mod event;
pub mod node;
pub mod service;
pub mod session;

use serde::{Deserialize, Serialize};

/// Position in the cluster's history: the raft index of the last applied entry that changed something. Grows, never
/// returns; a watch resumes after one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Revision(pub u64);

impl std::fmt::Display for Revision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}
