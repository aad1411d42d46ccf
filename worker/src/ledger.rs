//! `Ledger`: which run uses how much of which of this node's devices, and on which cores it computes.
//!
//! What a device has is what the configuration declares or the probe found; what a run gets was decided by placement. The
//! ledger holds both to it: a run that would take more than its plan gave, or than is there, is refused before a weight is
//! read.
//!
//! Invariant: bytes of all live reservations of a device never exceed its memory, and no core beyond its own is used.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forge_shared::cluster::node::DeviceInfo;
use forge_shared::telemetry::{DeviceLabel, Metrics};
use parking_lot::Mutex;

use crate::WorkerError;

/// A device and how it is used.
#[derive(Debug, Clone)]
pub struct LedgerDevice {
    /// Number within the node.
    pub index: u32,
    /// Bytes it has for Forge.
    pub memory_bytes: u64,
    /// Cores that its kernels are pinned to; empty leaves it to the system.
    pub cores: Vec<usize>,
    /// How much lower the priority of its kernels is than that of everything else (`nice`), 0 to 19.
    pub niceness: u8,
}

impl LedgerDevice {
    /// What was told of a device, on these cores.
    pub fn of(info: &DeviceInfo, cores: Vec<usize>, niceness: u8) -> Self {
        LedgerDevice { index: info.index, memory_bytes: info.memory_bytes, cores, niceness }
    }
}

/// Bytes that can be had now without swapping.
pub type FreeBytes = Box<dyn Fn() -> u64 + Send + Sync>;

/// See the module documentation.
pub struct Ledger {
    devices: Vec<LedgerDevice>,
    /// Reserved bytes by position in `devices`, and of those, bytes whose run is still loading.
    reserved: Mutex<Vec<Reserved>>,
    free_bytes: FreeBytes,
}

#[derive(Debug, Clone, Copy, Default)]
struct Reserved {
    bytes: u64,
    loading_bytes: u64,
}

/// How long a shortage of the machine is watched before it is believed.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// In all.
    pub wait: Duration,
    /// Between two looks.
    pub pause: Duration,
}

/// A run's share of a device; given back when dropped.
pub struct Reservation {
    ledger: Arc<Ledger>,
    position: usize,
    bytes: u64,
    loading: bool,
}

impl std::fmt::Debug for Reservation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes of device {}", self.bytes, self.device().index)
    }
}

impl Ledger {
    /// A ledger over these devices. `free_bytes` is asked at each reservation.
    pub fn new(devices: Vec<LedgerDevice>, free_bytes: FreeBytes) -> Arc<Self> {
        let reserved = Mutex::new(vec![Reserved::default(); devices.len()]);
        Arc::new(Ledger { devices, reserved, free_bytes })
    }

    /// The devices.
    pub fn devices(&self) -> &[LedgerDevice] {
        &self.devices
    }

    /// Writes what the devices have and what is given out.
    pub fn observe(&self, metrics: &Metrics) {
        let gauge = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        for (device, reserved) in self.devices.iter().zip(self.reserved.lock().iter()) {
            let label = DeviceLabel { device: device.index };
            metrics.device_memory_bytes.get_or_create(&label).set(gauge(device.memory_bytes));
            metrics.device_memory_used_bytes.get_or_create(&label).set(gauge(reserved.bytes));
        }
    }

    /// Takes `bytes` of a device for a run that is about to load.
    ///
    /// # Errors
    /// [`WorkerError::Memory`] where the device or the machine has less; [`WorkerError::Setting`] for an unknown device.
    pub fn reserve(self: &Arc<Self>, device: u32, bytes: u64) -> Result<Reservation, WorkerError> {
        let position = self.devices.iter().position(|known| known.index == device);
        let Some(position) = position else {
            let reason = format!("the plan names device {device}, and this node has {}", self.devices.len());
            return Err(WorkerError::Setting { field: "plan.ranks.device", reason });
        };
        let mut reserved = self.reserved.lock();
        let declared = self.devices[position].memory_bytes;
        let taken = reserved[position].bytes;
        let left = declared.saturating_sub(taken);
        if bytes > left {
            return Err(WorkerError::Memory { device, needed_bytes: bytes, free_bytes: left, found_bytes: None });
        }
        // What loading runs will still take is not gone from the system's count yet.
        let loading: u64 = reserved.iter().map(|reserved| reserved.loading_bytes).sum();
        let free = (self.free_bytes)().saturating_sub(loading);
        if bytes > free {
            let found_bytes = Some(declared.min(taken.saturating_add(free)));
            return Err(WorkerError::Memory { device, needed_bytes: bytes, free_bytes: free, found_bytes });
        }
        reserved[position].bytes += bytes;
        reserved[position].loading_bytes += bytes;
        Ok(Reservation { ledger: self.clone(), position, bytes, loading: true })
    }

    /// As [`Ledger::reserve`], looking again while the machine has less than the device was said to have: another process
    /// may need memory for a moment, and what is reported as found is believed until this process starts anew. Blocking.
    ///
    /// # Errors
    /// As [`Ledger::reserve`]; with the most memory that was found in that time.
    pub fn reserve_patiently(
        self: &Arc<Self>,
        device: u32,
        bytes: u64,
        patience: Patience,
        is_cancelled: impl Fn() -> bool,
    ) -> Result<Reservation, WorkerError> {
        let until = Instant::now() + patience.wait;
        let mut best = self.reserve(device, bytes);
        while let Err(error) = &best
            && error.found_memory_bytes().is_some()
            && !is_cancelled()
            && Instant::now() < until
        {
            std::thread::sleep(patience.pause);
            let next = self.reserve(device, bytes);
            let found_bytes = next.as_ref().err().and_then(WorkerError::found_memory_bytes);
            if found_bytes.is_none() || found_bytes > error.found_memory_bytes() {
                best = next;
            }
        }
        best
    }
}

impl Reservation {
    /// The device it is of.
    pub fn device(&self) -> &LedgerDevice {
        &self.ledger.devices[self.position]
    }

    /// The run has loaded: the system counts its bytes from now on.
    pub fn loaded(&mut self) {
        if std::mem::take(&mut self.loading) {
            self.ledger.reserved.lock()[self.position].loading_bytes -= self.bytes;
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.loaded();
        self.ledger.reserved.lock()[self.position].bytes -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(memory_bytes: u64, free_bytes: u64) -> Arc<Ledger> {
        Ledger::new(vec![LedgerDevice { index: 3, memory_bytes, cores: vec![], niceness: 0 }], Box::new(move || free_bytes))
    }

    #[test]
    fn a_device_is_never_given_out_twice() {
        let ledger = ledger(100, 1000);
        let first = ledger.reserve(3, 60).expect("it has 100");
        let refused = ledger.reserve(3, 60).map(drop);
        assert!(matches!(refused, Err(WorkerError::Memory { free_bytes: 40, found_bytes: None, .. })), "{refused:?}");
        let metrics = Metrics::new();
        ledger.observe(&metrics);
        let page = metrics.encode();
        assert!(page.contains("forge_device_memory_bytes{device=\"3\"} 100"), "{page}");
        assert!(page.contains("forge_device_memory_used_bytes{device=\"3\"} 60"), "{page}");
        drop(first);
        assert!(ledger.reserve(3, 100).is_ok());
        assert!(matches!(ledger.reserve(4, 1), Err(WorkerError::Setting { .. })));
    }

    #[test]
    fn a_device_that_has_less_than_it_said_is_found_out() {
        let ledger = ledger(100, 70);
        let mut first = ledger.reserve(3, 50).expect("70 are free");
        // The first run's bytes are not yet gone from the system's count.
        let refused = ledger.reserve(3, 30).expect_err("20 are left");
        assert_eq!(refused.found_memory_bytes(), Some(70));
        first.loaded();
        assert!(ledger.reserve(3, 30).is_ok());
    }

    #[test]
    fn a_passing_shortage_is_waited_for_and_a_lasting_one_is_found() {
        let looks = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let seen = looks.clone();
        // 10, 20, 30, ... and from the seventh look on 60.
        let free_bytes = move || (seen.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1).min(6) * 10;
        let device = LedgerDevice { index: 3, memory_bytes: 100, cores: vec![], niceness: 0 };
        let ledger = Ledger::new(vec![device], Box::new(free_bytes));
        let patience = |wait_ms| Patience { wait: Duration::from_millis(wait_ms), pause: Duration::from_millis(1) };
        let held = ledger.reserve_patiently(3, 50, patience(60_000), || false).expect("50 are free at the fifth look");
        drop(held);
        let refused = ledger.reserve_patiently(3, 70, patience(20), || false).expect_err("60 at most");
        assert_eq!(refused.found_memory_bytes(), Some(60));
        let before = looks.load(std::sync::atomic::Ordering::SeqCst);
        assert!(ledger.reserve_patiently(3, 70, patience(60_000), || true).is_err());
        assert_eq!(looks.load(std::sync::atomic::Ordering::SeqCst), before + 1, "nobody waits for it any more");
        // What the device has not is not waited for.
        assert!(ledger.reserve_patiently(3, 101, patience(60_000), || false).is_err_and(|error| error.found_memory_bytes().is_none()));
    }
}
