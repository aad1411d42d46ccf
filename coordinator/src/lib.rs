//! The coordinator: what the cluster agrees on, and what its leader decides.
//!
//! [`state`] is what all coordinators know after the same log, [`placement`] where replicas go, [`control`] what the leader
//! proposes and lends (leases, shares of budgets), [`raft`] how they agree. `forgectl serve` places with the same function.
//!
//! Invariant: `state`, `placement` and `control` have no clock, socket, disk or thread; time is an argument.

pub mod control;
pub mod placement;
pub mod raft;
pub mod state;
pub mod watch;
