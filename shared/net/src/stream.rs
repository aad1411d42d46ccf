//! One stream of frames to one peer, whatever carries it.
//!
//! What it is: the queue of frames that came ([`Inbox`]), bounded in bytes, and the way out ([`Wire`]). A transport feeds the
//! one and implements the other.
//!
//! Invariant: a stream that has failed stays failed, with its first reason, and wakes whoever waits.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use forge_shared::ids::{Epoch, NodeId};
use parking_lot::{Condvar, Mutex};

use crate::frame::{Frame, FrameError, FrameReader, HEAD_BYTES, Head};

/// Bytes that may wait in an inbox, each frame counted with its head and what keeping it takes; then its transport stops reading, and the peer learns of it by flow control.
pub(crate) const INBOX_BYTES: usize = 8 << 20;

/// What a frame counts in an inbox: one without a body is not free.
fn weight(body: &[u8]) -> usize {
    HEAD_BYTES + size_of::<Frame>() + body.len()
}

/// Why a stream is of no more use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The peer cannot be heard any more.
    Lost(String),
    /// The peer left the group or the stream.
    Left,
    /// The peer's frames are none.
    Frame(FrameError),
    /// The group was aborted.
    Aborted(String),
    /// Nothing in time.
    Timeout,
}

/// Frames that came.
#[derive(Debug)]
pub(crate) struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    reader: FrameReader,
    frames: VecDeque<Frame>,
    bytes: usize,
    failure: Option<Failure>,
    /// The transport has stopped reading and wants to be told when there is room.
    paused: bool,
}

impl Inbox {
    pub(crate) fn new(reader: FrameReader) -> Arc<Self> {
        let state = State { reader, frames: VecDeque::new(), bytes: 0, failure: None, paused: false };
        Arc::new(Inbox { state: Mutex::new(state), changed: Condvar::new() })
    }

    /// Takes in bytes that came; after an error the transport ends the stream.
    pub(crate) fn push(&self, bytes: &[u8]) -> Result<(), FrameError> {
        let mut state = self.state.lock();
        let State { reader, frames, bytes: held, .. } = &mut *state;
        let before = frames.len();
        let pushed = reader.push(bytes, |frame| {
            *held += weight(&frame.body);
            frames.push_back(frame);
        });
        if frames.len() > before {
            self.changed.notify_all();
        }
        drop(state);
        pushed.inspect_err(|error| self.fail(Failure::Frame(error.clone())))
    }

    /// Whether the transport may read on. If not, the wire's `resume` is called once there is room.
    pub(crate) fn has_room(&self) -> bool {
        let mut state = self.state.lock();
        state.paused = state.bytes >= INBOX_BYTES;
        !state.paused
    }

    /// Waits for room, for transports whose readers are threads; false when the stream has failed.
    pub(crate) fn wait_for_room(&self) -> bool {
        let mut state = self.state.lock();
        while state.bytes >= INBOX_BYTES && state.failure.is_none() {
            self.changed.wait(&mut state);
        }
        state.failure.is_none()
    }

    /// The stream has ended in an orderly way: what came can still be read.
    pub(crate) fn end(&self) {
        let cut = self.state.lock().reader.end();
        self.fail(cut.map_or_else(Failure::Frame, |()| Failure::Left));
    }

    /// The stream is of no more use. Frames that came before can still be read, but for those of an aborted group.
    pub(crate) fn fail(&self, failure: Failure) {
        let mut state = self.state.lock();
        if matches!(failure, Failure::Aborted(_)) {
            state.frames.clear();
            state.bytes = 0;
        }
        if state.failure.is_none() {
            state.failure = Some(failure);
        }
        self.changed.notify_all();
    }

    pub(crate) fn failure(&self) -> Option<Failure> {
        self.state.lock().failure.clone()
    }

    /// Whether a receiver has something to look at.
    fn is_ready(&self) -> bool {
        let state = self.state.lock();
        !state.frames.is_empty() || state.failure.is_some()
    }

    /// The next frame, if one is there, and whether the transport wants to be told that there is room.
    pub(crate) fn take(&self) -> Option<Result<(Frame, bool), Failure>> {
        let mut state = self.state.lock();
        match state.frames.pop_front() {
            Some(frame) => {
                let was_full = state.bytes >= INBOX_BYTES;
                state.bytes -= weight(&frame.body);
                if was_full {
                    self.changed.notify_all();
                }
                // Half of it free, so that the transport does not start for every frame.
                let resume = state.paused && state.bytes < INBOX_BYTES / 2;
                state.paused &= !resume;
                Some(Ok((frame, resume)))
            }
            None => state.failure.clone().map(Err),
        }
    }

    /// Sleeps until there is something to look at, or `until`.
    fn wait(&self, until: Instant) {
        let mut state = self.state.lock();
        if state.frames.is_empty() && state.failure.is_none() {
            self.changed.wait_until(&mut state, until);
        }
    }

    /// A sender in this process waits for room.
    pub(crate) fn deliver(&self, head: Head, epoch: Epoch, body: Vec<u8>, until: Instant) -> Result<(), Failure> {
        let mut state = self.state.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if state.bytes < INBOX_BYTES {
                state.bytes += weight(&body);
                state.frames.push_back(Frame { head, epoch, body });
                self.changed.notify_all();
                return Ok(());
            }
            if self.changed.wait_until(&mut state, until).timed_out() {
                return Err(Failure::Timeout);
            }
        }
    }
}

/// The way out of a stream.
pub(crate) trait Wire: Send + Sync {
    /// Hands over a frame in order; waits until `until` where the peer does not read. After an error the stream is of no
    /// more use.
    fn write(&self, head: Head, body: &[u8], until: Instant) -> Result<(), Failure>;

    /// There is room in the inbox again.
    fn resume(&self);

    /// Waits until `ready` or `until`, perhaps less. A transport may do its own work in this thread meanwhile, which
    /// saves handing over what comes; if another thread does it, this one calls `sleep`, which that thread wakes.
    fn wait(&self, until: Instant, ready: &dyn Fn() -> bool, sleep: &dyn Fn());

    /// Whether the peer has given up a stream that nobody reads yet, as far as the transport knows.
    fn is_over(&self) -> bool {
        false
    }

    /// Ends it because its group was aborted: what is not sent yet need not go out, and who waits to send is woken. The
    /// inbox has failed before.
    fn abort(&self, reason: &str);

    /// Ends the stream: nothing more is read or written.
    fn close(&self);
}

/// A stream: frames in and out.
pub(crate) struct Stream {
    /// Node at the other end.
    pub(crate) node: NodeId,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) wire: Arc<dyn Wire>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Stream {
    pub(crate) fn send(&self, head: Head, body: &[u8], until: Instant) -> Result<(), Failure> {
        if let Some(failure) = self.inbox.failure() {
            return Err(failure);
        }
        // Where the stream failed meanwhile, that is why nothing could be written.
        self.wire.write(head, body, until).map_err(|failure| self.inbox.failure().unwrap_or(failure))
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.inbox.failure().is_some()
    }

    /// The peer has given it up.
    pub(crate) fn is_over(&self) -> bool {
        self.has_failed() || self.wire.is_over()
    }

    /// The next frame.
    pub(crate) fn recv(&self, until: Instant) -> Result<Frame, Failure> {
        loop {
            if let Some(taken) = self.inbox.take() {
                let (frame, resume) = taken?;
                if resume {
                    self.wire.resume();
                }
                return Ok(frame);
            }
            if Instant::now() >= until {
                return Err(Failure::Timeout);
            }
            self.wire.wait(until, &|| self.inbox.is_ready(), &|| self.inbox.wait(until));
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // A reader that waits for room waits in vain.
        self.inbox.fail(Failure::Left);
        self.wire.close();
    }
}

#[cfg(test)]
mod tests;
