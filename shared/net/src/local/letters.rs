//! Rows that one rank of a process has sent another: a queue per pair, bounded in bytes.

use std::collections::VecDeque;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::GroupOptions;
use crate::{NetError, Result};

/// Bytes that may lie in one queue; a single letter may be larger.
const MAX_BYTES: usize = 64 << 20;

#[derive(Debug)]
pub(super) struct Letters {
    options: GroupOptions,
    /// `from · size + to`.
    pairs: Vec<Pair>,
}

#[derive(Debug, Default)]
struct Pair {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    letters: VecDeque<Letter>,
    bytes: usize,
    aborted: Option<String>,
}

/// Rows on their way.
#[derive(Debug)]
pub(super) struct Letter {
    pub(super) width: usize,
    pub(super) values: Vec<f32>,
}

impl Letter {
    fn bytes(&self) -> usize {
        size_of_val(self.values.as_slice())
    }
}

impl Letters {
    pub(super) fn new(options: GroupOptions) -> Self {
        Letters { options, pairs: (0..options.size * options.size).map(|_| Pair::default()).collect() }
    }

    /// Puts a letter into the queue of a pair, once there is room.
    pub(super) fn put(&self, from: usize, to: usize, letter: Letter) -> Result<()> {
        let pair = &self.pairs[from * self.options.size + to];
        let room = |queue: &Queue| queue.letters.is_empty() || queue.bytes + letter.bytes() <= MAX_BYTES;
        let mut queue = self.wait(pair, "send", from, room)?;
        queue.bytes += letter.bytes();
        queue.letters.push_back(letter);
        pair.changed.notify_all();
        Ok(())
    }

    /// Takes the next letter of a pair.
    pub(super) fn take(&self, from: usize, to: usize) -> Result<Letter> {
        let pair = &self.pairs[from * self.options.size + to];
        loop {
            let mut queue = self.wait(pair, "recv", to, |queue| !queue.letters.is_empty())?;
            if let Some(letter) = queue.letters.pop_front() {
                queue.bytes -= letter.bytes();
                pair.changed.notify_all();
                return Ok(letter);
            }
        }
    }

    fn wait<'a>(
        &self,
        pair: &'a Pair,
        operation: &'static str,
        rank: usize,
        ready: impl Fn(&Queue) -> bool,
    ) -> Result<parking_lot::MutexGuard<'a, Queue>> {
        let GroupOptions { size, epoch, deadline } = self.options;
        let until = Instant::now() + deadline;
        let mut queue = pair.queue.lock();
        loop {
            if let Some(reason) = &queue.aborted {
                return Err(NetError::Aborted { epoch, reason: reason.clone() });
            }
            if ready(&queue) {
                return Ok(queue);
            }
            if pair.changed.wait_until(&mut queue, until).timed_out() && !ready(&queue) && queue.aborted.is_none() {
                return Err(NetError::Timeout { operation, rank, missing: 1, size, waited: deadline });
            }
        }
    }

    pub(super) fn abort(&self, reason: &str) {
        for pair in &self.pairs {
            let mut queue = pair.queue.lock();
            if queue.aborted.is_none() {
                queue.aborted = Some(reason.to_owned());
                queue.letters.clear();
                pair.changed.notify_all();
            }
        }
    }
}
