//! How far loading is: two numbers that the loader moves and anybody may read meanwhile.
//!
//! It is not a report: it calls nobody, so that watching costs the loader nothing and cannot hold it up.
//! Invariant: the share only grows within one load, and is whole when it ends well.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A handle to the numbers; clones see the same.
#[derive(Debug, Clone, Default)]
pub struct LoadProgress(Arc<Load>);

/// A load, by one or in parts.
#[derive(Debug, Default)]
struct Load {
    own: Counts,
    /// Loads of ranks, of which this one is the sum; empty where it is one.
    parts: Mutex<Vec<LoadProgress>>,
}

#[derive(Debug, Default)]
struct Counts {
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

impl LoadProgress {
    /// Bytes of weights that were gone through, and those to go through in all. Each byte counts once when it is copied
    /// and once when it is looked through; 0 of 0 before a load, and where nothing has to be read for it.
    pub fn bytes(&self) -> (u64, u64) {
        let parts = self.parts();
        if !parts.is_empty() {
            let bytes = parts.iter().map(LoadProgress::bytes);
            return bytes.fold((0, 0), |(done, total), part| (done + part.0, total + part.1));
        }
        let total = self.0.own.total_bytes.load(Ordering::Relaxed);
        (self.0.own.done_bytes.load(Ordering::Relaxed).min(total), total)
    }

    /// Handles for the loads of so many ranks. This one shows their sum from now on, until a load of its own begins.
    #[must_use]
    pub fn divided(&self, ranks: usize) -> Vec<LoadProgress> {
        let parts: Vec<LoadProgress> = (0..ranks).map(|_| LoadProgress::default()).collect();
        self.parts().clone_from(&parts);
        parts
    }

    /// Whatever a thread that panicked left there is whole: it is only ever replaced.
    fn parts(&self) -> MutexGuard<'_, Vec<LoadProgress>> {
        self.0.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A load of so many bytes begins.
    pub(crate) fn begin(&self, total_bytes: usize) {
        self.parts().clear();
        self.0.own.done_bytes.store(0, Ordering::Relaxed);
        self.0.own.total_bytes.store(total_bytes as u64, Ordering::Relaxed);
    }

    /// So many bytes more are done.
    pub(crate) fn add(&self, bytes: usize) {
        self.0.own.done_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// All is done.
    pub(crate) fn end(&self) {
        self.0.own.done_bytes.store(self.0.own.total_bytes.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use forge_kernels::{CpuBackend, CpuOptions};

    use super::*;
    use crate::{DecoderOptions, LoadMode, Model};

    #[test]
    fn a_load_ends_with_all_that_was_to_be_copied_and_looked_through() {
        for (name, copies) in [("llama", false), ("gpt2", true)] {
            let model = Model::open(format!("../../tests/fixtures/model/{name}"), LoadMode::Mmap).unwrap();
            let mut options = DecoderOptions::single_sequence(16);
            let memory = model.memory(&options).unwrap();
            let mut load = |scan_values| {
                options.scan_values = scan_values;
                let backend = CpuBackend::new(CpuOptions { threads: 1, ..CpuOptions::default() }).unwrap();
                model.decoder(Arc::new(backend), &options).unwrap();
                options.progress.bytes()
            };
            let (weights, copied) = (memory.weights_bytes as u64, memory.copied_bytes as u64);
            assert_eq!(load(false), (copied, copied), "{name}");
            assert_eq!(load(true), (weights + 2 * copied, weights + 2 * copied), "{name}");
            assert_eq!(copied > weights, copies, "{name}");
        }
    }

    #[test]
    fn clones_see_the_same_and_the_share_is_at_most_all() {
        let progress = LoadProgress::default();
        let seen = progress.clone();
        assert_eq!(seen.bytes(), (0, 0));
        progress.begin(10);
        progress.add(4);
        assert_eq!(seen.bytes(), (4, 10));
        progress.add(7);
        assert_eq!(seen.bytes(), (10, 10));
        progress.begin(5);
        progress.end();
        assert_eq!(seen.bytes(), (5, 5));
        let parts = seen.divided(2);
        parts[0].begin(6);
        parts[1].begin(4);
        parts[1].add(3);
        assert_eq!(progress.bytes(), (3, 10));
        seen.begin(8);
        assert_eq!(progress.bytes(), (0, 8));
    }
}
