//! Ranks of one process: they exchange rows through shared memory.
//!
//! Each operation on the whole group is one rendezvous (`meeting`). A rank puts its rows into its slot, waits until all
//! have come, and then reads the slots. There are two sets of slots, used in turn: a set is written again only after the
//! next rendezvous, which nobody reaches before having read, so one wait per operation is enough. Rows sent from one rank
//! to another lie in a queue of that pair (`letters`).
//!
//! Invariant: the sum is taken by every rank from the same slots in the same order, so all hold the same bits.

mod letters;
mod meeting;
mod operations;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forge_shared::ids::Epoch;
use parking_lot::{Mutex, RwLock};

use crate::{NetError, Result};
use letters::Letters;
use meeting::Meeting;

/// How a group of one process is formed.
#[derive(Debug, Clone, Copy)]
pub struct GroupOptions {
    /// Ranks, at least one; to add, they must be a power of two.
    pub size: usize,
    /// Epoch of the plan.
    pub epoch: Epoch,
    /// The longest a rank waits for its peers in one operation.
    pub deadline: Duration,
}

impl GroupOptions {
    /// A group of `size` ranks at `epoch` that waits half a minute at most.
    pub fn new(size: usize, epoch: Epoch) -> Self {
        GroupOptions { size, epoch, deadline: Duration::from_secs(30) }
    }
}

/// Forms a group and returns one handle per rank, in rank order.
///
/// # Errors
/// [`NetError::NoRanks`].
pub fn group(options: GroupOptions) -> Result<Vec<LocalRank>> {
    if options.size == 0 {
        return Err(NetError::NoRanks);
    }
    let lineage = Arc::new(Lineage::default());
    let shared = Arc::new(Shared::new(options));
    Ok((0..options.size).map(|rank| LocalRank::new(rank, &shared, &lineage)).collect())
}

/// A rank's handle on its in-process group.
#[derive(Debug)]
pub struct LocalRank {
    rank: usize,
    shared: Arc<Shared>,
    lineage: Arc<Lineage>,
    /// Which set of slots the next operation uses; held for a whole operation, so one at a time per rank.
    turn: Mutex<usize>,
}

/// The group at later epochs: the first rank that asks for one makes it, the others find it.
#[derive(Debug, Default)]
struct Lineage(Mutex<BTreeMap<Epoch, Arc<Shared>>>);

/// What the ranks of a group share.
#[derive(Debug)]
struct Shared {
    options: GroupOptions,
    meeting: Meeting,
    letters: Letters,
    slots: [Vec<RwLock<Slot>>; 2],
}

/// What a rank brought: the operation, for the check that all do the same, and its rows.
#[derive(Debug, Default)]
struct Slot {
    operation: &'static str,
    rows: usize,
    width: usize,
    values: Vec<f32>,
    /// Rows for each rank, where each gets its own.
    counts: Vec<usize>,
}

impl Shared {
    fn new(options: GroupOptions) -> Self {
        let slots = || (0..options.size).map(|_| RwLock::new(Slot::default())).collect();
        Shared { options, meeting: Meeting::new(options), letters: Letters::new(options), slots: [slots(), slots()] }
    }

    fn abort(&self, reason: &str) {
        self.meeting.abort(reason);
        self.letters.abort(reason);
    }
}

impl LocalRank {
    fn new(rank: usize, shared: &Arc<Shared>, lineage: &Arc<Lineage>) -> Self {
        LocalRank { rank, shared: Arc::clone(shared), lineage: Arc::clone(lineage), turn: Mutex::new(0) }
    }

    /// This rank at a later epoch, once all have come.
    fn at_epoch(&self, epoch: Epoch) -> Result<LocalRank> {
        let options = self.shared.options;
        if epoch <= options.epoch {
            return Err(NetError::OldEpoch { asked: epoch, current: options.epoch });
        }
        self.shared.abort(&format!("rank {} left for epoch {epoch}", self.rank));
        let shared = {
            let mut epochs = self.lineage.0.lock();
            if let Some((&current, _)) = epochs.last_key_value().filter(|&(&current, _)| current > epoch) {
                return Err(NetError::OldEpoch { asked: epoch, current });
            }
            let fresh = || Arc::new(Shared::new(GroupOptions { epoch, ..options }));
            let shared = Arc::clone(epochs.entry(epoch).or_insert_with(fresh));
            // Whoever still waits at an epoch in between waits in vain.
            let later = epochs.split_off(&epoch);
            for (_, left) in std::mem::replace(&mut *epochs, later) {
                left.abort(&format!("rank {} left for epoch {epoch}", self.rank));
            }
            shared
        };
        let joined = LocalRank::new(self.rank, &shared, &self.lineage);
        joined.meet("rejoin")?;
        Ok(joined)
    }
}

impl Drop for LocalRank {
    /// A rank that is gone (also by a panic) must not keep its peers waiting for the deadline.
    fn drop(&mut self) {
        self.shared.abort(&format!("rank {} has left the group", self.rank));
    }
}

#[cfg(test)]
mod tests;
