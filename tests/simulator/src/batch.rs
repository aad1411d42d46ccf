//! Many seeds, divided among threads.
//!
//! What it is not: part of a run. Each is alone in its thread, and knows nothing of the others.
//!
//! Invariant: what comes out does not depend on the threads: sums over all seeds, or the lowest seed that fails.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::report::Totals;
use crate::simulation::{Outcome, Plan, run};

/// What a batch came to.
#[derive(Debug, Default)]
pub struct Batch {
    /// Of all runs, if none failed.
    pub totals: Totals,
    /// The lowest seed that failed: its plan and what came of it.
    pub failed: Option<(Plan, Outcome)>,
}

/// Runs these seeds, as `plan_of` says, in so many threads. Seeds above one that failed are left out.
pub fn run_batch(seeds: Range<u64>, threads: usize, plan_of: impl Fn(u64) -> Plan + Sync) -> Batch {
    let (next, batch) = (AtomicU64::new(seeds.start), Mutex::new(Batch::default()));
    // The lowest failed seed: nothing above it is begun.
    let end = AtomicU64::new(seeds.end);
    let work = || loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= end.load(Ordering::Relaxed) {
            return;
        }
        let plan = plan_of(seed);
        let outcome = run(&plan);
        let mut batch = batch.lock();
        batch.totals.add(&outcome);
        if outcome.violation.is_some() && seed < end.fetch_min(seed, Ordering::Relaxed) {
            batch.failed = Some((plan, outcome));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    batch.into_inner()
}
