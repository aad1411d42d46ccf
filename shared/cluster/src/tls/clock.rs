//! The time by which certificates begin and end.
//!
//! What it is not: the clock of leases, tokens or records; those have their own. Tests move this one ahead, so that ninety
//! days pass in a second.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;

/// The machine's clock, moved ahead by as much as it was told to. Clones are one clock.
#[derive(Debug, Clone, Default)]
pub struct CertificateClock {
    ahead_s: Arc<AtomicU64>,
}

impl CertificateClock {
    /// Seconds since 1970.
    pub fn now_s(&self) -> u64 {
        clock_s().saturating_add(self.ahead_s.load(Ordering::Relaxed))
    }

    /// Moves it ahead.
    pub fn advance(&self, by: Duration) {
        self.ahead_s.fetch_add(by.as_secs(), Ordering::Relaxed);
    }
}

impl TimeProvider for CertificateClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.now_s())))
    }
}

/// Seconds since 1970 by this machine's clock.
pub(crate) fn clock_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
