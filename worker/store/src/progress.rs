//! What a pull tells its caller while it runs, and how the caller stops it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::{Result, StoreError};

/// One thing that happened during a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PullEvent {
    /// A source is being tried.
    TryingSource {
        /// The source as the user would write it.
        source: String,
        /// Its position in the list, from 1.
        position: usize,
        /// Length of the list.
        of: usize,
    },
    /// A source did not deliver and the next one, if any, follows.
    SourceFailed {
        /// The source as in `TryingSource`.
        source: String,
        /// Why, in one sentence.
        reason: String,
    },
    /// Something was decided that the user should know, such as which of several files was chosen.
    Note {
        /// One sentence.
        text: String,
    },
    /// A file's transfer starts.
    FileStarted {
        /// File name within the model.
        name: String,
        /// Its whole size, where known.
        total_bytes: Option<u64>,
        /// Bytes already on disk from an earlier attempt.
        resumed_at_bytes: u64,
    },
    /// More of a file has arrived.
    FileBytes {
        /// File name within the model.
        name: String,
        /// Bytes of the file on disk now, those resumed included.
        bytes: u64,
        /// Its whole size, where known.
        total_bytes: Option<u64>,
    },
    /// A transfer broke and is resumed after a pause.
    Retrying {
        /// File name within the model.
        name: String,
        /// What broke.
        reason: String,
        /// Number of this retry, from 1.
        attempt: u32,
        /// The pause before it.
        pause: Duration,
    },
    /// A file is complete and its checksum agrees.
    FileDone {
        /// File name within the model.
        name: String,
        /// Its size.
        bytes: u64,
        /// Whether it was in the store already, so that nothing was transferred.
        already_present: bool,
    },
    /// A file is being taken out of the archive it came in.
    Unpacking {
        /// File name within the model.
        name: String,
        /// Bytes unpacked so far.
        bytes: u64,
        /// The file's size.
        total_bytes: u64,
    },
    /// A stored file is being read against its digest.
    Verifying {
        /// File name within the model.
        name: String,
        /// Bytes read so far.
        bytes: u64,
        /// The file's size.
        total_bytes: u64,
    },
    /// Another process works on the same thing; this one waits for it.
    Waiting {
        /// What is waited for.
        what: String,
    },
    /// The model is ready.
    Done {
        /// Model name.
        name: String,
        /// Size of all its files.
        bytes: u64,
    },
}

/// Receives the events of a pull, on the thread that pulls.
pub trait PullProgress: Sync {
    /// Called for each event; must return quickly.
    fn event(&self, event: PullEvent);
}

/// Progress that nobody watches.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl PullProgress for Silent {
    fn event(&self, _event: PullEvent) {}
}

impl<F: Fn(PullEvent) + Sync> PullProgress for F {
    fn event(&self, event: PullEvent) {
        self(event);
    }
}

/// A flag by which another thread (a Ctrl-C handler, say) stops a pull within a second.
#[derive(Debug, Clone, Default)]
pub struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    /// Asks the pull to stop. What has arrived is kept for the next one.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the pull was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(StoreError::Cancelled) } else { Ok(()) }
    }

    /// Sleeps, but no longer than until the flag is raised.
    pub(crate) fn sleep(&self, pause: Duration) -> Result<()> {
        let until = std::time::Instant::now() + pause;
        loop {
            self.check()?;
            let left = until.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(100)));
        }
    }
}
