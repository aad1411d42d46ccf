//! What a coordinator has of its machine beside files and sockets: the wall clock, and how long its disk takes.
//!
//! What it is not: leases and timeouts are not counted by this clock; they are by the monotonic one, which does not jump.
//!
//! Invariant: nothing in this crate reads the system's wall clock for a running coordinator but through this; certificates
//! have [`forge_cluster::tls::CertificateClock`].

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::raft::BeforeSync;

/// See the module. The default is the machine as it is; tests have clocks that jump and disks that are slow.
#[derive(Clone)]
pub struct Surroundings {
    wall_ms: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Called on raft's thread before each fsync.
    pub before_sync: Option<BeforeSync>,
}

impl Surroundings {
    /// With this clock, which gives milliseconds since 1970.
    #[must_use]
    pub fn with_clock(self, wall_ms: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Surroundings { wall_ms: Arc::new(wall_ms), ..self }
    }

    /// Milliseconds since 1970 by this machine's clock.
    pub fn wall_ms(&self) -> u64 {
        (self.wall_ms)()
    }
}

impl Default for Surroundings {
    fn default() -> Self {
        Surroundings { wall_ms: Arc::new(system_ms), before_sync: None }
    }
}

impl fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surroundings").field("wall_ms", &self.wall_ms()).finish_non_exhaustive()
    }
}

/// Milliseconds since 1970 by the system's clock.
pub(crate) fn system_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
