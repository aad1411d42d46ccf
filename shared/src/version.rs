//! What a build of Forge is, beside the others of its cluster: a version for people, and a level for the processes.
//!
//! A **level** grows by one with every change that an older build could not read: a command, a field of a document, a
//! message. The cluster's level is the lowest of all its processes; what is newer is neither written nor sent before it is
//! raised. docs/upgrade.md says what that means to an operator, and has the table of what each level brought.
//!
//! Invariant: a document of level 1 is written as the first release writes it: what came later is left out.

use serde::{Deserialize, Serialize};

/// This build's.
pub const LEVEL: u32 = 2;
/// Of the first release, and of whoever says nothing.
pub const FIRST_LEVEL: u32 = 1;
/// The level of workers' data planes, and of replicas whose ranks are on several workers.
pub const DATA_PLANES: u32 = 2;
/// This build's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A build of Forge, as a process states it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Build {
    /// For people.
    pub version: String,
    /// For processes.
    pub level: u32,
}

impl Default for Build {
    /// This one.
    fn default() -> Self {
        Build { version: VERSION.to_owned(), level: LEVEL }
    }
}

impl std::fmt::Display for Build {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (level {})", if self.version.is_empty() { "an unknown version" } else { &self.version }, self.level)
    }
}

/// For fields that a record of the first release does not have.
pub fn first_level() -> u32 {
    FIRST_LEVEL
}

/// Whether a level is left out of a document.
pub fn is_first_level(level: &u32) -> bool {
    *level == FIRST_LEVEL
}
