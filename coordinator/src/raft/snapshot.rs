//! A snapshot from the decision to the disk, of which a member does only the beginning and the end itself.
//!
//! What it is not: a thread. Whoever drives the member runs [`SnapshotWork`] where it holds nobody up, and hands back what
//! comes of it.

use super::Frozen;
use super::log::{Draft, Written};

/// Encoding and writing a snapshot: as much as the state is large, so not on the member's thread.
pub struct SnapshotWork {
    pub(super) frozen: Frozen,
    pub(super) draft: Draft,
}

impl SnapshotWork {
    /// Does it. For [`super::member::Member::snapshot_made`].
    pub fn run(self) -> SnapshotMade {
        SnapshotMade(self.draft.write(&(self.frozen)()))
    }
}

/// What came of it.
#[must_use]
pub struct SnapshotMade(pub(super) Written);

/// Where a member's snapshot stands.
pub(super) enum Making {
    /// None is being made.
    No,
    /// It waits to be taken by [`super::member::Member::take_snapshot_work`].
    Begun(Box<SnapshotWork>),
    /// It is being encoded and written.
    Away,
    /// It came back, and the next turn finishes it.
    Made(SnapshotMade),
}
