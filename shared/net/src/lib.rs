//! How the ranks of one replica or job move matrices between each other.
//!
//! What it is: the [`Collective`] trait that decoders and trainers call, and its implementations for ranks of one process
//! ([`local`]) and of several ([`Fabric`]); a group of one ([`Solo`]) needs no transport. Members of a group send each
//! other messages too ([`MessageLinks`]). What it is not: it decides nothing about who the ranks are (the plan does), knows
//! no model, and no certificates' policy ([`PeerVerifier`]).
//!
//! Invariant (DESIGN P2): a reduction adds neighbours first in the order of [`forge_kernels::tree`], so its
//! bits are those of one process that holds all leaves. Every wait is bounded, and an abort wakes all waiters.

mod collective;
mod error;
mod fabric;
pub mod frame;
pub mod fuzz;
pub mod group;
pub mod hello;
mod links;
pub mod local;
mod memory;
mod mesh;
mod quic;
mod solo;
mod stream;
mod sum;
mod tcp;
mod tls;
mod transport;
mod wired;

pub use collective::{Collective, row_share};
pub use error::{NetError, Result};
pub use fabric::{Fabric, FabricOptions, GroupSpec, Member, SILENCE};
pub use hello::GroupId;
pub use links::MessageLinks;
pub use local::{GroupOptions, LocalRank};
pub use solo::Solo;
pub use tls::PeerVerifier;
pub use transport::Transport;
