//! Messages between the members of a group: step plans, hidden states, results.
//!
//! What it is: framed bytes in order between any two members, within the group's epoch and bounds. What it is not: it knows
//! nothing of what the bytes mean.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forge_shared::ids::Epoch;

use crate::frame::{Head, Kind, MAX_BODY_BYTES};
use crate::hello::Lane;
use crate::mesh::{Call, Mesh};
use crate::{NetError, Result};

/// One member's links to all others. May be used by several threads; each pair of members has its own order.
#[derive(Debug, Clone)]
pub struct MessageLinks {
    mesh: Arc<Mesh>,
}

impl MessageLinks {
    pub(crate) fn new(mesh: Arc<Mesh>) -> Self {
        MessageLinks { mesh }
    }

    /// This member.
    pub fn rank(&self) -> usize {
        self.mesh.spec().rank
    }

    /// Members in the group.
    pub fn size(&self) -> usize {
        self.mesh.spec().members.len()
    }

    /// The plan's epoch this group was formed for.
    pub fn epoch(&self) -> Epoch {
        self.mesh.spec().id.epoch
    }

    /// Hands a message to another member: at most [`MAX_BODY_BYTES`]. Waits where the member has too many bytes
    /// to receive yet, up to the group's deadline.
    ///
    /// # Errors
    /// Another member than there is; a message that is too long; one that is gone, too late, or aborted. All but the first
    /// two end the group.
    pub fn send(&self, to: usize, message: &[u8]) -> Result<()> {
        if message.len() > MAX_BODY_BYTES {
            return Err(NetError::TooLong { bytes: message.len(), limit_bytes: MAX_BODY_BYTES });
        }
        let sent = self.mesh.send(call("send", self.mesh.until()), to, Head::bytes(Kind::Message), message);
        self.ended(sent)
    }

    /// The next message of another member; `None` if none came within `timeout`, which ends nothing.
    ///
    /// # Errors
    /// As [`MessageLinks::send`].
    pub fn recv(&self, from: usize, timeout: Duration) -> Result<Option<Vec<u8>>> {
        match self.mesh.recv(call("recv", Instant::now() + timeout), from) {
            Ok(frame) if frame.head.kind == Kind::Message => Ok(Some(frame.body)),
            Ok(frame) => self.ended(Err(NetError::Mismatch {
                operation: "recv",
                rank: self.rank(),
                actual: "a message".to_owned(),
                expected: format!("{:?}", frame.head.kind),
            })),
            Err(NetError::Timeout { .. }) => Ok(None),
            Err(error) => self.ended(Err(error)),
        }
    }

    /// Fails once the group is over.
    ///
    /// # Errors
    /// [`NetError::Aborted`] with the reason.
    pub fn check_open(&self) -> Result<()> {
        self.mesh.check_open()
    }

    /// Ends the group for all members: every waiting and every later call fails with `reason`.
    pub fn abort(&self, reason: &str) {
        self.mesh.abort(reason);
    }

    fn ended<T>(&self, done: Result<T>) -> Result<T> {
        match done {
            Err(NetError::NotAPeer { .. }) => done,
            done => self.mesh.or_abort(done),
        }
    }
}

fn call(operation: &'static str, until: Instant) -> Call {
    Call { operation, lane: Lane::Pair, until }
}
