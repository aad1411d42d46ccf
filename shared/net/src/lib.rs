//! How the ranks of one replica or job move matrices between each other.
//!
//! What it is: the [`Collective`] trait that decoders and trainers call, and its implementation for ranks of
//! one process ([`local`]); a group of one ([`Solo`]) needs no transport. What it is not: it decides nothing
//! about who the ranks are (the plan does) and knows no model.
//!
//! Invariant (DESIGN P2): a reduction adds neighbours first in the order of [`forge_kernels::tree`], so its
//! bits are those of one process that holds all leaves. Every wait is bounded, and an abort wakes all waiters.

mod collective;
mod error;
pub mod frame;
pub mod group;
pub mod hello;
pub mod local;
mod solo;
mod sum;

pub use collective::{Collective, row_share};
pub use error::{NetError, Result};
pub use hello::GroupId;
pub use local::{GroupOptions, LocalRank};
pub use solo::Solo;
