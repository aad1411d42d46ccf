//! Where the ranks of a process wait for each other.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::GroupOptions;
use crate::{NetError, Result};

/// Looks at the counter before a rank goes to sleep: some 20 µs, in which ranks of equal work come. Waking a sleeper
/// costs as much.
const SPINS: u32 = 2_000;

#[derive(Debug)]
pub(super) struct Meeting {
    options: GroupOptions,
    spins: u32,
    /// How often all have come; also in `State`, where it is waited for.
    generation: AtomicU64,
    state: Mutex<State>,
    woken: Condvar,
}

#[derive(Debug)]
struct State {
    arrived: Vec<bool>,
    aborted: Option<String>,
}

impl Meeting {
    pub(super) fn new(options: GroupOptions) -> Self {
        // Where ranks share a core, looking again only keeps the others from coming.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Meeting {
            options,
            spins: if cores >= options.size { SPINS } else { 0 },
            generation: AtomicU64::new(0),
            state: Mutex::new(State { arrived: vec![false; options.size], aborted: None }),
            woken: Condvar::new(),
        }
    }

    /// Waits until every rank has come to this rendezvous.
    pub(super) fn meet(&self, rank: usize, operation: &'static str) -> Result<()> {
        let GroupOptions { size, deadline, epoch } = self.options;
        let aborted = |reason: &str| NetError::Aborted { epoch, reason: reason.to_owned() };
        let until = Instant::now() + deadline;
        let mut state = self.state.lock();
        if let Some(reason) = &state.aborted {
            return Err(aborted(reason));
        }
        state.arrived[rank] = true;
        let generation = self.generation.load(Ordering::Relaxed);
        if state.arrived.iter().all(|&arrived| arrived) {
            state.arrived.fill(false);
            self.generation.store(generation + 1, Ordering::Release);
            self.woken.notify_all();
            return Ok(());
        }
        drop(state);
        let come = || self.generation.load(Ordering::Acquire) != generation;
        for _ in 0..self.spins {
            if come() {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        let mut state = self.state.lock();
        while !come() {
            if let Some(reason) = &state.aborted {
                return Err(aborted(reason));
            }
            if self.woken.wait_until(&mut state, until).timed_out() && !come() && state.aborted.is_none() {
                let missing = state.arrived.iter().filter(|&&arrived| !arrived).count();
                state.aborted = Some(format!("{operation}: {missing} of {size} ranks did not come within {deadline:?}"));
                self.woken.notify_all();
                return Err(NetError::Timeout { operation, rank, missing, size, waited: deadline });
            }
        }
        Ok(())
    }

    pub(super) fn abort(&self, reason: &str) {
        let mut state = self.state.lock();
        if state.aborted.is_none() {
            state.aborted = Some(reason.to_owned());
            self.woken.notify_all();
        }
    }
}
