//! What waits for the raft thread: one bounded queue per kind, taken all at once.
//!
//! Invariant: putting never blocks; what is over a bound is refused (proposals, reads) or dropped (messages).

use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use raft::eraftpb::Message;
use tokio::sync::oneshot;

use super::snapshot::SnapshotMade;
use super::{MemberChange, Proposed, RaftError, RaftLimits};

/// Where an answer goes.
pub(super) type Reply<T> = oneshot::Sender<Result<T, RaftError>>;

/// A snapshot that a peer sent, complete and checked.
pub(super) struct Arrived {
    pub message: Message,
    pub done: Reply<()>,
}

/// Everything that waits, in the order in which it is handled.
#[derive(Default)]
pub(super) struct Waiting {
    pub messages: Vec<Message>,
    pub snapshots: Vec<Arrived>,
    pub sent_snapshots: Vec<(u64, bool)>,
    /// What came of the member's own snapshot; the error is a defect's text.
    pub made_snapshot: Option<Result<SnapshotMade, String>>,
    pub unreachable: Vec<u64>,
    pub changes: Vec<(MemberChange, Reply<()>)>,
    pub transfers: Vec<(u64, Reply<()>)>,
    pub reads: Vec<Reply<u64>>,
    pub proposals: Vec<(Bytes, Reply<Proposed>)>,
    message_bytes: usize,
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.messages.is_empty()
            && self.snapshots.is_empty()
            && self.sent_snapshots.is_empty()
            && self.made_snapshot.is_none()
            && self.unreachable.is_empty()
            && self.changes.is_empty()
            && self.transfers.is_empty()
            && self.reads.is_empty()
            && self.proposals.is_empty()
    }
}

#[derive(Default)]
struct State {
    waiting: Waiting,
    /// Proposals that the member took and has not answered: they count against the same bound.
    open_proposals: usize,
    is_stopping: bool,
    /// Since when the thread has been at work on what it took; `None` while it waits here.
    busy_since: Option<Instant>,
    /// Set when the thread has ended, with the reason unless it was asked to.
    ended: Option<Option<String>>,
}

/// The queues and the bell.
pub(super) struct Inbox {
    state: Mutex<State>,
    bell: Condvar,
    limits: RaftLimits,
}

impl Inbox {
    pub fn new(limits: RaftLimits) -> Self {
        Self { state: Mutex::default(), bell: Condvar::new(), limits }
    }

    /// Puts one thing, unless the thread has ended or `put` refuses.
    fn put(&self, put: impl FnOnce(&mut State, &RaftLimits) -> Result<(), RaftError>) -> Result<(), RaftError> {
        let mut state = self.state.lock();
        if let Some(why) = &state.ended {
            return Err(RaftError::Stopped { why: why.clone() });
        }
        if state.is_stopping {
            return Err(RaftError::Stopped { why: None });
        }
        put(&mut state, &self.limits)?;
        drop(state);
        self.bell.notify_one();
        Ok(())
    }

    pub fn propose(&self, data: Bytes, reply: Reply<Proposed>) -> Result<(), RaftError> {
        self.put(|state, limits| {
            if state.waiting.proposals.len() + state.open_proposals >= limits.pending_proposals {
                return Err(RaftError::Busy { what: format!("{} proposals wait already", limits.pending_proposals) });
            }
            state.waiting.proposals.push((data, reply));
            Ok(())
        })
    }

    pub fn read(&self, reply: Reply<u64>) -> Result<(), RaftError> {
        self.put(|state, limits| {
            if state.waiting.reads.len() >= limits.pending_reads {
                return Err(RaftError::Busy { what: format!("{} reads wait already", limits.pending_reads) });
            }
            state.waiting.reads.push(reply);
            Ok(())
        })
    }

    pub fn change(&self, change: MemberChange, reply: Reply<()>) -> Result<(), RaftError> {
        self.put(|state, _| {
            if state.waiting.changes.len() >= 64 {
                return Err(RaftError::Busy { what: "64 changes of members wait already".into() });
            }
            state.waiting.changes.push((change, reply));
            Ok(())
        })
    }

    pub fn transfer(&self, to: u64, reply: Reply<()>) -> Result<(), RaftError> {
        self.put(|state, _| {
            if state.waiting.transfers.len() >= 64 {
                return Err(RaftError::Busy { what: "64 transfers of leadership wait already".into() });
            }
            state.waiting.transfers.push((to, reply));
            Ok(())
        })
    }

    /// Messages from peers; those beyond the bounds are dropped.
    pub fn messages(&self, messages: Vec<Message>) -> Result<(), RaftError> {
        self.put(|state, limits| {
            let waiting = &mut state.waiting;
            for message in messages {
                let bytes = 64 + message.entries.iter().map(|entry| 64 + entry.data.len()).sum::<usize>();
                if waiting.messages.len() >= limits.queued_messages || waiting.message_bytes + bytes > limits.queued_message_bytes {
                    break;
                }
                waiting.message_bytes += bytes;
                waiting.messages.push(message);
            }
            Ok(())
        })
    }

    pub fn snapshot(&self, arrived: Arrived) -> Result<(), RaftError> {
        self.put(|state, _| {
            // One at a time: each may be as large as a snapshot may be.
            if !state.waiting.snapshots.is_empty() {
                return Err(RaftError::Busy { what: "a snapshot waits already".into() });
            }
            state.waiting.snapshots.push(arrived);
            Ok(())
        })
    }

    pub fn sent_snapshot(&self, to: u64, is_ok: bool) {
        // A member that has stopped has nobody to tell.
        let _ = self.put(|state, _| {
            if state.waiting.sent_snapshots.len() < 1024 {
                state.waiting.sent_snapshots.push((to, is_ok));
            }
            Ok(())
        });
    }

    pub fn made_snapshot(&self, made: Result<SnapshotMade, String>) {
        // A member that has stopped makes none; the temporary file goes at its next start.
        let _ = self.put(|state, _| {
            state.waiting.made_snapshot = Some(made);
            Ok(())
        });
    }

    pub fn unreachable(&self, id: u64) {
        let _ = self.put(|state, _| {
            if !state.waiting.unreachable.contains(&id) && state.waiting.unreachable.len() < 1024 {
                state.waiting.unreachable.push(id);
            }
            Ok(())
        });
    }

    pub fn stop(&self) {
        self.state.lock().is_stopping = true;
        self.bell.notify_one();
    }

    /// Takes all that waits, at the latest at `until`; `None` once the member is to stop.
    pub fn take(&self, until: Instant, open_proposals: usize) -> Option<Waiting> {
        let mut state = self.state.lock();
        state.open_proposals = open_proposals;
        state.busy_since = None;
        while state.waiting.is_empty() && !state.is_stopping {
            if self.bell.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        if state.is_stopping {
            return None;
        }
        let waiting = std::mem::take(&mut state.waiting);
        state.open_proposals += waiting.proposals.len();
        state.busy_since = Some(Instant::now());
        Some(waiting)
    }

    /// How long the thread has been at work on what it took last.
    pub fn busy_for(&self) -> Duration {
        self.state.lock().busy_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// The thread has ended: everything that waits is dropped, and its askers learn so.
    pub fn end(&self, why: Option<String>) {
        let mut state = self.state.lock();
        state.ended = Some(why);
        state.waiting = Waiting::default();
    }

    /// Why the thread has ended; `None` while it runs.
    pub fn ended(&self) -> Option<Option<String>> {
        self.state.lock().ended.clone()
    }
}
