//! How the ranks of one replica or job move matrices between each other.
//!
//! What it is: the [`Collective`] trait that decoders and trainers call, and its implementation for ranks of
//! one process ([`local`]); a group of one ([`Solo`]) needs no transport. What it is not: it decides nothing
//! about who the ranks are (the plan does) and knows no model.
//!
//! Invariant (DESIGN P2): a reduction adds neighbours first in the order of [`forge_kernels::tree`], so its
//! bits are those of one process that holds all leaves. Every wait is bounded, and an abort wakes all waiters.

mod error;
pub mod local;
mod solo;

use forge_kernels::Backend;
use forge_shared::ids::Epoch;

pub use error::{NetError, Result};
pub use local::{GroupOptions, LocalRank};
pub use solo::Solo;

/// One rank's handle on its group. All ranks call the same operations in the same order, each with operands of
/// the same rows; a rank that cannot go on calls [`Collective::abort`] so that no peer waits for it.
pub trait Collective<B: Backend>: Send + Sync {
    /// This rank, `0..size`.
    fn rank(&self) -> usize;

    /// Ranks in the group: a power of two.
    fn size(&self) -> usize;

    /// The plan's epoch this group was formed for.
    fn epoch(&self) -> Epoch;

    /// Replaces the first `rows` rows of `buffer` by their sum over all ranks, in the tree's order, in f32.
    /// A rank without a share brings −0.0 everywhere.
    ///
    /// # Errors
    /// A peer that brought another operation or size, was too late, or aborted; the backend's own errors.
    fn all_reduce(&self, backend: &B, buffer: &mut B::Buffer, rows: usize) -> Result<()>;

    /// Joins columns: each rank brings [rows, width_r] (a rank without a share brings `None`), and `out`
    /// [rows, Σ width_r] receives them in rank order on every rank.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`]; widths that do not add up to `out`'s.
    fn all_gather(&self, backend: &B, part: Option<&B::Buffer>, out: &mut B::Buffer, rows: usize) -> Result<()>;

    /// Copies the first `rows` rows of `root`'s buffer into every rank's.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`]; a root outside the group.
    fn broadcast(&self, backend: &B, buffer: &mut B::Buffer, rows: usize, root: usize) -> Result<()>;

    /// Returns when every rank has come.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`].
    fn barrier(&self) -> Result<()>;

    /// Ends the group: every waiting and every later call of any rank fails with `reason`. Idempotent; the first
    /// reason is kept. Ranks rejoin as a new group at the next epoch.
    fn abort(&self, reason: &str);
}
