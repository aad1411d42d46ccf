//! What can go wrong between ranks.

use std::net::SocketAddr;
use std::time::Duration;

use forge_kernels::KernelError;
use forge_shared::ids::{Epoch, NodeId};

use crate::frame::FrameError;
use crate::group::GroupError;

/// Errors of the net crate. After any of them the group is of no more use: form another at the next epoch.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A group size whose ranks cannot walk the reduction tree.
    #[error("{size} ranks cannot add: the size must be a power of two; the nearest is {nearest}")]
    GroupSize {
        /// Ranks of the group.
        size: usize,
        /// Nearest size that can be had.
        nearest: usize,
    },
    /// A group without ranks.
    #[error("a group needs at least one rank")]
    NoRanks,
    /// A rank that is not in the group, or the caller itself where it must be another.
    #[error("{operation}: rank {rank} named rank {named}; name another rank of the group of {size}")]
    NotAPeer {
        /// The operation called.
        operation: &'static str,
        /// The rank that called.
        rank: usize,
        /// The rank it named.
        named: usize,
        /// Ranks of the group.
        size: usize,
    },
    /// An epoch that is over, or one that is not later than the one it should follow.
    #[error("epoch {asked} is over: the group is at epoch {current}; ask for a later one")]
    OldEpoch {
        /// What was asked for.
        asked: Epoch,
        /// Where the group is.
        current: Epoch,
    },
    /// A peer did not come in time; the group is aborted.
    #[error("{operation}: rank {rank} waited {waited:?} and {missing} of {size} ranks did not come; the group is aborted")]
    Timeout {
        /// The operation waited in.
        operation: &'static str,
        /// The rank that waited.
        rank: usize,
        /// Ranks that had not come.
        missing: usize,
        /// Ranks of the group.
        size: usize,
        /// How long the wait was.
        waited: Duration,
    },
    /// The group was aborted by a rank or its supervisor.
    #[error("the group of epoch {epoch} was aborted: {reason}")]
    Aborted {
        /// Epoch of the group.
        epoch: Epoch,
        /// Why.
        reason: String,
    },
    /// Ranks disagree on what is being done: a defect of the callers.
    #[error("{operation}: rank {rank} brought {actual}, the others {expected}")]
    Mismatch {
        /// The operation this rank called.
        operation: &'static str,
        /// This rank.
        rank: usize,
        /// What this rank brought.
        actual: String,
        /// What was expected.
        expected: String,
    },
    /// The data plane's port cannot be had.
    #[error("cannot listen on {address} for the data plane: {reason}; choose another address or port")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// Something the data plane needs cannot be had.
    #[error("cannot set up the data plane: {what}: {reason}")]
    Setup {
        /// What.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// A node that does not answer, or is not the one it should be.
    #[error("cannot reach the data plane of node {node} at {address}: {reason}")]
    Unreachable {
        /// The node.
        node: NodeId,
        /// Where it should be.
        address: SocketAddr,
        /// Why not.
        reason: String,
    },
    /// A peer that was there and is not heard any more, or has left.
    #[error("{operation}: node {node} (rank {rank}) is lost: {reason}")]
    PeerLost {
        /// The operation it was needed in.
        operation: &'static str,
        /// The node.
        node: NodeId,
        /// Its rank.
        rank: usize,
        /// What was seen.
        reason: String,
    },
    /// A peer that does not take this rank as a member.
    #[error("node {node} (rank {rank}) refuses: {reason}")]
    Refused {
        /// The node.
        node: NodeId,
        /// Its rank.
        rank: usize,
        /// Why, in its words.
        reason: String,
    },
    /// A peer sent what is no frame, or not the next one.
    #[error("{operation}: node {node} (rank {rank}) sent a frame that cannot be: {error}")]
    Frame {
        /// The operation.
        operation: &'static str,
        /// The node.
        node: NodeId,
        /// Its rank.
        rank: usize,
        /// What is wrong with it.
        error: FrameError,
    },
    /// A message that does not fit a frame.
    #[error("a message of {bytes} bytes; at most {limit_bytes} fit: send it in parts")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The longest.
        limit_bytes: usize,
    },
    /// The group cannot be, or not with these members.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// The backend refused to read or write a buffer.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// Result of a collective.
pub type Result<T> = std::result::Result<T, NetError>;
