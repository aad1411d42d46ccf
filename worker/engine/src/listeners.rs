//! Listeners to the prefix cache: who is told which prompt blocks the engine can reuse.
//!
//! Each begins with everything that is known. One that falls behind is told to forget everything and begins anew when it
//! has room again: nothing queues for it here.
//!
//! Invariant: a listener that has read everything knows exactly the blocks that the block manager knew after the last step.

use std::collections::HashMap;

use forge_shared::link::PrefixUpdate;
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;

use crate::blocks::{BlockManager, PrefixChange};

/// Updates that may lie unread before a listener begins anew.
pub(crate) const LISTENER_DEPTH: usize = 64;

#[derive(Debug, Default)]
pub(crate) struct Listeners {
    all: Vec<Listener>,
}

#[derive(Debug)]
struct Listener {
    updates: Sender<PrefixUpdate>,
    /// It is new, or has missed something.
    behind: bool,
}

impl Listeners {
    /// Adds one; [`Self::tell`] sends it everything.
    pub(crate) fn add(&mut self, updates: Sender<PrefixUpdate>) {
        self.all.push(Listener { updates, behind: true });
    }

    /// Whether someone waits for room in its channel.
    pub(crate) fn any_behind(&self) -> bool {
        self.all.iter().any(|listener| listener.behind)
    }

    /// Hands out what changed since the last call. Costs nothing where nobody listens.
    pub(crate) fn tell(&mut self, blocks: &mut BlockManager) {
        if self.all.is_empty() {
            return;
        }
        self.all.retain(|listener| !listener.updates.is_closed());
        blocks.note_changes(!self.all.is_empty());
        let changes = net(blocks.take_changes());
        for listener in &mut self.all {
            let update = match listener.behind {
                // Looked at first, so that a whole index is not gathered for a channel without room.
                true if listener.updates.capacity() == 0 => continue,
                true => PrefixUpdate { reset: true, stored: blocks.known().map(|hash| hash.short()).collect(), removed: Vec::new() },
                false if changes == PrefixUpdate::default() => continue,
                false => changes.clone(),
            };
            listener.behind = matches!(listener.updates.try_send(update), Err(TrySendError::Full(_)));
        }
    }
}

/// The end of all changes: the last word on each block.
fn net(changes: Vec<PrefixChange>) -> PrefixUpdate {
    let last: HashMap<u64, bool> = changes
        .into_iter()
        .map(|change| match change {
            PrefixChange::Stored(hash) => (hash.short(), true),
            PrefixChange::Removed(hash) => (hash.short(), false),
        })
        .collect();
    let (stored, removed): (Vec<_>, Vec<_>) = last.into_iter().partition(|&(_, stored)| stored);
    let hashes = |of: Vec<(u64, bool)>| of.into_iter().map(|(hash, _)| hash).collect();
    PrefixUpdate { reset: false, stored: hashes(stored), removed: hashes(removed) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use forge_text::PrefixHasher;
    use proptest::prelude::*;
    use tokio::sync::mpsc;

    use super::*;
    use crate::blocks::BlockTable;

    fn apply(known: &mut BTreeSet<u64>, update: PrefixUpdate) {
        if update.reset {
            known.clear();
        }
        update.removed.iter().for_each(|hash| _ = known.remove(hash));
        known.extend(update.stored);
    }

    proptest! {
        /// Whatever the block manager does and however slowly a listener reads, in the end it knows what the manager knows.
        #[test]
        fn a_listener_that_reads_all_knows_all(
            uses in proptest::collection::vec((0u32..6, 1usize..5, any::<bool>()), 1..60),
            depth in 1usize..4,
        ) {
            let mut blocks = BlockManager::new(8, 2);
            let mut listeners = Listeners::default();
            let (sender, mut updates) = mpsc::channel(depth);
            let mut known = BTreeSet::new();
            let mut sender = Some(sender);
            let half = uses.len() / 2;
            for (step, (prompt, length, reads)) in uses.into_iter().enumerate() {
                // It comes in the middle of the engine's life.
                if step >= half && let Some(sender) = sender.take() {
                    listeners.add(sender);
                }
                let chain = PrefixHasher::chain(&PrefixHasher::root(b"t", "n"), &vec![prompt; length * 2], 2);
                let cached = blocks.lookup(&chain).blocks;
                let mut table = BlockTable::default();
                blocks.start(&mut table, &chain[..cached], length * 2).unwrap();
                for (index, &hash) in chain.iter().enumerate() {
                    blocks.register(&table, index, hash);
                }
                blocks.release(&mut table);
                listeners.tell(&mut blocks);
                while reads && let Ok(update) = updates.try_recv() {
                    apply(&mut known, update);
                }
            }
            for _ in 0..2 {
                while let Ok(update) = updates.try_recv() {
                    apply(&mut known, update);
                }
                listeners.tell(&mut blocks);
            }
            prop_assert!(!listeners.any_behind());
            prop_assert_eq!(known, blocks.known().map(|hash| hash.short()).collect::<BTreeSet<_>>());
        }
    }

    #[test]
    fn nothing_is_noted_once_the_last_listener_is_gone() {
        let mut blocks = BlockManager::new(2, 1);
        let mut listeners = Listeners::default();
        let (sender, updates) = mpsc::channel(1);
        listeners.add(sender);
        listeners.tell(&mut blocks);
        drop(updates);
        listeners.tell(&mut blocks);
        let mut table = BlockTable::default();
        blocks.start(&mut table, &[], 1).unwrap();
        blocks.register(&table, 0, PrefixHasher::root(b"", ""));
        assert_eq!(blocks.take_changes(), []);
        assert!(listeners.all.is_empty());
    }
}
