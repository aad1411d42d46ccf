//! One member of a raft group: elections, a log on disk, a state machine that every member applies alike.
//!
//! Layers, each knowing only the ones before it: [`convert`] (messages from peers, checked), [`core`] (raft-rs without
//! I/O), [`log`] (the data directory), [`member`] (core, log and state machine as one deterministic step function), `node`
//! (the thread that drives a member), [`transport`] (gRPC between members). A simulator drives [`member::Member`] with its
//! own disk, network and time.
//!
//! What it is not: it knows no command and no state; those belong to the [`StateMachine`].
//!
//! Invariant: what [`RaftHandle::propose`] answers with `Ok` is on the disks of a majority and survives any crash.

mod begin;
mod cache;
pub mod convert;
pub mod core;
mod error;
pub mod fuzz;
mod handle;
mod inbox;
pub mod log;
mod logger;
pub mod member;
mod node;
mod options;
pub mod snapshot;
pub mod transport;
mod types;

pub use begin::begin_from_snapshot;
pub use cache::Persisted;
pub use error::RaftError;
pub use handle::RaftHandle;
pub use log::BeforeSync;
pub use node::start;
pub use options::{RaftLimits, RaftOptions};
pub use types::{DiskState, Frozen, MemberChange, MemberProgress, PeerTransport, Proposed, RaftRole, RaftStatus, StateMachine};
