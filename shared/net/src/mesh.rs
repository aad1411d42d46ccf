//! A formed group: a rank's streams to all others, and how it ends.
//!
//! Invariants: once it is over, every wait and every call fails; whoever ends it tells all others.

use std::sync::Arc;
use std::sync::Weak;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::fabric::{GroupSpec, Shared};
use crate::frame::{Frame, Head};
use crate::group::Group;
use crate::hello::{Hello, Lane, MAX_AGREEMENT_BYTES};
use crate::stream::{Failure, Stream};
use crate::transport::Carrier;
use crate::{NetError, Result};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Mesh {
    fabric: Weak<Shared>,
    parts: Parts<Mutex<Group>>,
}

/// What is being done, on which streams, and until when it must be done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) operation: &'static str,
    pub(crate) lane: Lane,
    pub(crate) until: Instant,
}

/// What a group is made of.
pub(crate) struct Parts<G = Group> {
    pub(crate) spec: GroupSpec,
    pub(crate) group: G,
    pub(crate) lanes: &'static [Lane],
    /// Per rank, its streams in the order of lanes; none for this rank.
    pub(crate) streams: Vec<Vec<Stream>>,
    /// Per rank, the connection that carries them; none for ranks of this process.
    pub(crate) carriers: Vec<Option<Carrier>>,
}

impl<G> std::fmt::Debug for Parts<G> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").field("spec", &self.spec).finish_non_exhaustive()
    }
}

impl Mesh {
    pub(crate) fn new(fabric: Weak<Shared>, parts: Parts) -> Arc<Self> {
        let Parts { spec, group, lanes, streams, carriers } = parts;
        Arc::new(Mesh { fabric, parts: Parts { spec, group: Mutex::new(group), lanes, streams, carriers } })
    }

    pub(crate) fn spec(&self) -> &GroupSpec {
        &self.parts.spec
    }

    pub(crate) fn fabric(&self) -> Option<Arc<Shared>> {
        self.fabric.upgrade()
    }

    pub(crate) fn carriers(&self) -> impl Iterator<Item = &Carrier> {
        self.parts.carriers.iter().flatten()
    }

    pub(crate) fn runs_over(&self, carrier: &Carrier) -> bool {
        self.carriers().any(|own| own.is_same(carrier))
    }

    /// Fails once the group is over.
    pub(crate) fn check_open(&self) -> Result<()> {
        self.parts.group.lock().check_open().map_err(|error| match error {
            crate::group::GroupError::Over { reason, .. } => NetError::Aborted { epoch: self.spec().id.epoch, reason },
            other => other.into(),
        })
    }

    fn stream(&self, operation: &'static str, lane: Lane, peer: usize) -> Result<&Stream> {
        let at = self.parts.lanes.iter().position(|&own| own == lane);
        let stream = at.and_then(|at| self.parts.streams.get(peer)?.get(at));
        let GroupSpec { rank, members, .. } = self.spec();
        stream.ok_or(NetError::NotAPeer { operation, rank: *rank, named: peer, size: members.len() })
    }

    /// Hands a frame over, waiting for room.
    pub(crate) fn send(&self, call: Call, peer: usize, head: Head, body: &[u8]) -> Result<()> {
        let stream = self.stream(call.operation, call.lane, peer)?;
        self.check_open()?;
        stream.send(head, body, call.until).map_err(|failure| describe(failure, call.operation, self.spec(), peer))
    }

    /// The next frame of a peer.
    pub(crate) fn recv(&self, call: Call, peer: usize) -> Result<Frame> {
        let stream = self.stream(call.operation, call.lane, peer)?;
        self.check_open()?;
        stream.recv(call.until).map_err(|failure| describe(failure, call.operation, self.spec(), peer))
    }

    /// As [`Mesh::recv`], for one of several frames: a peer that always has one more does not keep this rank beyond its time.
    pub(crate) fn recv_in_time(&self, call: Call, peer: usize) -> Result<Frame> {
        if Instant::now() >= call.until {
            return Err(describe(Failure::Timeout, call.operation, self.spec(), peer));
        }
        self.recv(call, peer)
    }

    /// When an operation that begins now must be done.
    pub(crate) fn until(&self) -> Instant {
        Instant::now() + self.spec().deadline
    }

    /// Ends the group for all. The first reason is kept.
    pub(crate) fn abort(&self, reason: &str) {
        if !self.parts.group.lock().end(reason) {
            return;
        }
        for stream in self.parts.streams.iter().flatten() {
            stream.inbox.fail(Failure::Aborted(reason.to_owned()));
        }
        // Peers are told before their streams end, so that they hear why.
        if let Some(fabric) = self.fabric.upgrade() {
            fabric.ended(self, reason);
        }
        for stream in self.parts.streams.iter().flatten() {
            stream.wire.abort(reason);
        }
    }

    /// Does it, and ends the group where it fails: peers must not wait for a rank that has given up.
    pub(crate) fn or_abort<T>(&self, done: Result<T>) -> Result<T> {
        done.inspect_err(|error| self.abort(&format!("rank {}: {error}", self.spec().rank)))
    }

    /// What tells a peer that the group is over.
    pub(crate) fn notice(&self, to: usize, reason: &str) -> Hello {
        let GroupSpec { id, rank, members, .. } = self.spec();
        let mut end = reason.len().min(MAX_AGREEMENT_BYTES);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        Hello { group: id.clone(), lane: Lane::Group, from: *rank, to, size: members.len(), agreement: reason[..end].to_owned() }
    }
}

impl Drop for Mesh {
    /// A rank that is gone (also by a panic) must not keep its peers waiting for their deadline. Its streams end in order, so
    /// that they still get what it sent before: to leave after the last operation is no abort.
    fn drop(&mut self) {
        if self.parts.group.lock().end("this rank has left the group")
            && let Some(fabric) = self.fabric.upgrade()
        {
            fabric.close_epoch(&self.spec().id);
        }
    }
}

/// A stream's failure as an error of the operation that met it.
pub(crate) fn describe(failure: Failure, operation: &'static str, spec: &GroupSpec, peer: usize) -> NetError {
    let (node, rank) = (spec.members[peer].node.clone(), peer);
    match failure {
        Failure::Lost(reason) => NetError::PeerLost { operation, node, rank, reason },
        Failure::Left => NetError::PeerLost { operation, node, rank, reason: "it has left the group".to_owned() },
        Failure::Frame(error) => NetError::Frame { operation, node, rank, error },
        Failure::Aborted(reason) => NetError::Aborted { epoch: spec.id.epoch, reason },
        Failure::Timeout => {
            let waited: Duration = if operation == "form" { spec.form_timeout } else { spec.deadline };
            NetError::Timeout { operation, rank: spec.rank, missing: 1, size: spec.members.len(), waited }
        }
    }
}
