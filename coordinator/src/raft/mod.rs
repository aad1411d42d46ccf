//! One member of a raft group: elections, a log on disk, a state machine that every member applies alike.
//!
//! Layers, each knowing only the ones before it: [`convert`] (messages from peers, checked), the core (raft-rs without
//! I/O), the log (the data directory), the member (core, log and state machine as one deterministic step function),
//! the thread that drives a member, and the transport (gRPC between members). A simulator drives the member
//! with its own disk, network and time.
//!
//! What it is not: it knows no command and no state; those belong to the [`StateMachine`].
//!
//! Invariant: what [`RaftHandle::propose`] answers with `Ok` is on the disks of a majority and survives any crash.

pub mod convert;
mod error;
mod handle;
#[allow(dead_code)] // until the thread is there
mod inbox;
mod options;
mod types;

pub use error::RaftError;
pub use handle::{RaftHandle, start};
pub use options::{RaftLimits, RaftOptions};
pub use types::{DiskState, MemberChange, MemberProgress, PeerTransport, Proposed, RaftRole, RaftStatus, StateMachine};
