//! The operations of a group of ranks, whatever carries them.

use std::ops::Range;
use std::sync::Arc;

use forge_kernels::Backend;
use forge_shared::ids::Epoch;

use crate::Result;

/// One rank's handle on its group.
///
/// All ranks call the same operations in the same order (but for [`send`](Collective::send) and
/// [`recv`](Collective::recv), which concern two of them); a rank that cannot go on calls [`Collective::abort`] so that
/// no peer waits for it. A handle may be used by several threads: operations on the whole group go one at a time,
/// sends and receives beside them.
///
/// Rows are f32 on the wire, so that nothing is rounded between ranks.
pub trait Collective<B: Backend>: Send + Sync {
    /// This rank, `0..size`.
    fn rank(&self) -> usize;

    /// Ranks in the group.
    fn size(&self) -> usize;

    /// The plan's epoch this group was formed for.
    fn epoch(&self) -> Epoch;

    /// Replaces the first `rows` rows of `buffer` by their sum over all ranks, in the tree's order, in f32.
    /// A rank without a share brings −0.0 everywhere.
    ///
    /// # Errors
    /// A group size that is no power of two; a peer that brought another operation or size, was too late, or aborted;
    /// the backend's own errors.
    fn all_reduce(&self, backend: &B, buffer: &mut B::Buffer, rows: usize) -> Result<()>;

    /// Joins columns: each rank brings [rows, width_r] (a rank without a share brings `None`), and `out`
    /// [rows, Σ width_r] receives them in rank order on every rank.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`], but for sizes; widths that do not add up to `out`'s.
    fn all_gather(&self, backend: &B, part: Option<&B::Buffer>, out: &mut B::Buffer, rows: usize) -> Result<()>;

    /// As [`Collective::all_reduce`], but each rank receives its share of the summed rows only ([`row_share`]), from row 0
    /// of `out` on. Returns which rows these are.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`].
    fn reduce_scatter(&self, backend: &B, buffer: &B::Buffer, rows: usize, out: &mut B::Buffer) -> Result<Range<usize>>;

    /// Copies the first `rows` rows of `root`'s buffer into every rank's.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`], but for sizes; a root outside the group.
    fn broadcast(&self, backend: &B, buffer: &mut B::Buffer, rows: usize, root: usize) -> Result<()>;

    /// Gives every rank rows of its own: those of `buffer` lie in the order of the ranks they go to, `counts[r]` for rank r;
    /// `out` receives from row 0 on what comes, in the order of the ranks it comes from. Returns how many rows came from
    /// each rank.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`], but for sizes; counts that are not one per rank.
    fn all_to_all(&self, backend: &B, buffer: &B::Buffer, counts: &[usize], out: &mut B::Buffer) -> Result<Vec<usize>>;

    /// Hands rows to another rank. Returns when they may be overwritten, perhaps before they were received; waits where
    /// the peer has too many bytes to receive yet. What one rank sends another arrives in order.
    ///
    /// # Errors
    /// A rank outside the group or this rank itself; a peer that was too late, is gone, or aborted; the backend's own.
    fn send(&self, backend: &B, buffer: &B::Buffer, rows: Range<usize>, to: usize) -> Result<()>;

    /// Waits for the next rows of another rank, which must be as many and as wide as the rows given here.
    ///
    /// # Errors
    /// As [`Collective::send`]; rows of another number or width.
    fn recv(&self, backend: &B, buffer: &mut B::Buffer, rows: Range<usize>, from: usize) -> Result<()>;

    /// Returns when every rank has come.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`], but for sizes.
    fn barrier(&self) -> Result<()>;

    /// Ends the group: every waiting and every later call of any rank fails with `reason`. Idempotent; the first
    /// reason is kept.
    fn abort(&self, reason: &str);

    /// Ends the group, if it has not ended, and forms it anew from the same ranks at a later epoch: returns when all have
    /// come. A group of other ranks is formed as the first one was.
    ///
    /// # Errors
    /// [`crate::NetError::OldEpoch`] for an epoch that is not later; ranks that do not come in time.
    fn rejoin(&self, epoch: Epoch) -> Result<Arc<dyn Collective<B>>>;
}

/// The rows of `rows` that [`Collective::reduce_scatter`] gives to `rank` of `size`: consecutive, as even as can be.
pub fn row_share(rows: usize, rank: usize, size: usize) -> Range<usize> {
    rows * rank / size..rows * (rank + 1) / size
}
