//! How the rest of a coordinator speaks to its raft member.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{oneshot, watch};

use super::inbox::{Arrived, Inbox, Reply};
use super::{MemberChange, Proposed, RaftError, RaftLimits, RaftStatus, convert};

/// Between two attempts at what another change of members or an election holds up.
const RETRY_AFTER: Duration = Duration::from_millis(20);

/// A raft member that runs in its own thread. Cheap to clone; the member goes on when handles are dropped, until
/// [`RaftHandle::stop`].
#[derive(Clone)]
pub struct RaftHandle {
    pub(super) inbox: Arc<Inbox>,
    pub(super) status: watch::Receiver<RaftStatus>,
    pub(super) limits: RaftLimits,
    pub(super) member_id: u64,
}

impl RaftHandle {
    /// Appends `data` to the log. `Ok` when it is on a majority's disks and applied here.
    ///
    /// # Errors
    /// [`RaftError::NotLeader`], [`RaftError::Busy`], [`RaftError::TooLarge`] and [`RaftError::DiskFull`]: it was not
    /// taken. [`RaftError::Unknown`]: it was, and what became of it is not known (leadership was lost, or `timeout`
    /// passed).
    pub async fn propose(&self, data: Bytes, timeout: Duration) -> Result<Proposed, RaftError> {
        if data.len() > self.limits.entry_bytes {
            return Err(RaftError::TooLarge { bytes: data.len(), limit_bytes: self.limits.entry_bytes });
        }
        let (reply, answer) = oneshot::channel();
        self.inbox.propose(data, reply)?;
        match tokio::time::timeout(timeout, answer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(RaftError::Unknown { why: "the member stopped".into() }),
            Err(_) => Err(RaftError::Unknown { why: format!("no majority answered within {} ms", timeout.as_millis()) }),
        }
    }

    /// Waits until the state machine here has applied all that was acknowledged anywhere before this call; the index up
    /// to which it has. Works at every member that reaches the leader.
    ///
    /// # Errors
    /// [`RaftError::Timeout`] when no leader with a majority answers.
    pub async fn read_index(&self, timeout: Duration) -> Result<u64, RaftError> {
        self.ask(timeout, |reply| self.inbox.read(reply)).await
    }

    /// Changes the group; `Ok` when the change is applied here. Waits for another change to end.
    ///
    /// # Errors
    /// [`RaftError::Members`] where it makes no sense, [`RaftError::NotLeader`] at other members, and also when the
    /// leader is to remove itself: it hands over first, and the caller asks the next leader.
    pub async fn change_members(&self, change: MemberChange, timeout: Duration) -> Result<(), RaftError> {
        let ends = tokio::time::Instant::now() + timeout;
        loop {
            let left = ends.saturating_duration_since(tokio::time::Instant::now());
            match self.ask(left, |reply| self.inbox.change(change, reply)).await {
                Err(RaftError::Busy { .. }) if left > RETRY_AFTER => tokio::time::sleep(RETRY_AFTER).await,
                Err(RaftError::Timeout { .. }) => {
                    return Err(RaftError::Unknown { why: format!("no majority answered within {} ms", timeout.as_millis()) });
                }
                outcome => return outcome,
            }
        }
    }

    /// Hands leadership to the voter `to`; `Ok` when it leads.
    ///
    /// # Errors
    /// As [`RaftHandle::change_members`].
    pub async fn transfer_leadership(&self, to: u64, timeout: Duration) -> Result<(), RaftError> {
        let ends = tokio::time::Instant::now() + timeout;
        let mut status = self.status.clone();
        if status.borrow_and_update().leader == Some(to) {
            return Ok(());
        }
        self.ask(timeout, |reply| self.inbox.transfer(to, reply)).await?;
        let arrived = tokio::time::timeout_at(ends, status.wait_for(|status| status.leader == Some(to))).await;
        match arrived {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(RaftError::Stopped { why: None }),
            Err(_) => Err(RaftError::Timeout { after: timeout }),
        }
    }

    async fn ask<T>(&self, timeout: Duration, put: impl FnOnce(Reply<T>) -> Result<(), RaftError>) -> Result<T, RaftError> {
        let (reply, answer) = oneshot::channel();
        put(reply)?;
        match tokio::time::timeout(timeout, answer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(RaftError::Stopped { why: self.inbox.ended().flatten() }),
            Err(_) => Err(RaftError::Timeout { after: timeout }),
        }
    }

    /// The member's view of the group, as it changes.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<RaftStatus> {
        self.status.clone()
    }

    /// How long the member's thread has been at one turn: next to nothing, unless the disk stands still. What
    /// [`RaftHandle::status`] says is as old as that, and others have heard nothing of this member since.
    #[must_use]
    pub fn busy_for(&self) -> Duration {
        self.inbox.busy_for()
    }

    /// This member's id.
    #[must_use]
    pub fn member_id(&self) -> u64 {
        self.member_id
    }

    /// Takes messages from the wire; checks them all first. Beyond the queue's bound they are dropped.
    ///
    /// # Errors
    /// [`RaftError::Message`] names what is wrong; none of the messages is taken then.
    pub fn receive(&self, messages: Vec<forge_proto::raft::Message>) -> Result<(), RaftError> {
        let messages: Result<Vec<_>, _> = messages.into_iter().map(|message| convert::message_in(message, self.member_id)).collect();
        self.inbox.messages(messages?)
    }

    /// Takes a snapshot from the wire; `Ok` when it is on disk and applied, or not needed.
    ///
    /// # Errors
    /// [`RaftError::Message`] for a bad one, [`RaftError::TooLarge`], [`RaftError::Timeout`].
    pub async fn receive_snapshot(&self, message: forge_proto::raft::Message, data: Bytes) -> Result<(), RaftError> {
        if data.len() as u64 > self.limits.max_snapshot_bytes {
            return Err(RaftError::TooLarge {
                bytes: data.len(),
                limit_bytes: usize::try_from(self.limits.max_snapshot_bytes).unwrap_or(usize::MAX),
            });
        }
        let message = convert::snapshot_in(message, data, self.member_id)?;
        self.ask(Duration::from_secs(60), |done| self.inbox.snapshot(Arrived { message, done })).await
    }

    /// The transport's report about a snapshot for the member `to`.
    pub fn snapshot_sent(&self, to: u64, is_ok: bool) {
        self.inbox.sent_snapshot(to, is_ok);
    }

    /// The transport's report that the member `id` cannot be reached.
    pub fn unreachable(&self, id: u64) {
        self.inbox.unreachable(id);
    }

    /// Stops the member; returns when its thread has ended, or after ten seconds.
    pub async fn stop(&self) {
        self.inbox.stop();
        let ends = tokio::time::Instant::now() + Duration::from_secs(10);
        while self.inbox.ended().is_none() && tokio::time::Instant::now() < ends {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
