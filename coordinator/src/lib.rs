//! The coordinator's decisions. Today: placement on one node, embedded in `forgectl serve`.
//!
//! What it is not: it keeps no state and talks to nobody; the raft group that will own these decisions calls
//! the same functions.

mod placement;
pub mod raft;
pub mod state;
pub mod watch;

pub use placement::{Wish, plan};
