//! What a remote replica has in its prefix cache, for readers that come and go.
//!
//! Invariant: a reader's updates, applied in order from its first reset, give the same set as the worker's; a reader that
//! falls behind gets a reset and never a gap.

use std::collections::HashSet;

use tokio::sync::mpsc;

use super::{PrefixUpdate, WireError};

/// Updates that may lie unread before a reader counts as behind.
const DEPTH: usize = 64;
/// Most blocks a replica can have: 64 million token slots at 16 a block.
const MAX_BLOCKS: usize = 4 << 20;

#[derive(Debug, Default)]
pub(super) struct PrefixBoard {
    blocks: HashSet<u64>,
    readers: Vec<Reader>,
}

#[derive(Debug)]
struct Reader {
    updates: mpsc::Sender<PrefixUpdate>,
    is_behind: bool,
}

impl PrefixBoard {
    /// A new reader; its first update is a reset with everything there is.
    pub(super) fn subscribe(&mut self) -> mpsc::Receiver<PrefixUpdate> {
        let (updates, received) = mpsc::channel(DEPTH);
        self.readers.push(Reader { updates, is_behind: true });
        self.catch_up();
        received
    }

    /// Takes an update and gives it on.
    pub(super) fn apply(&mut self, update: PrefixUpdate) -> Result<(), WireError> {
        self.catch_up();
        if update.reset {
            self.blocks.clear();
        }
        for block in &update.removed {
            self.blocks.remove(block);
        }
        self.blocks.extend(&update.stored);
        for reader in &mut self.readers {
            reader.is_behind |= reader.updates.try_send(update.clone()).is_err();
        }
        if self.blocks.len() > MAX_BLOCKS {
            let count = self.blocks.len();
            self.apply(PrefixUpdate { reset: true, ..PrefixUpdate::default() })?;
            return Err(WireError::TooLarge { field: "blocks_stored", count, limit: MAX_BLOCKS });
        }
        Ok(())
    }

    /// Tells readers that were behind everything, once they read again.
    pub(super) fn catch_up(&mut self) {
        self.readers.retain(|reader| !reader.updates.is_closed());
        for reader in self.readers.iter_mut().filter(|reader| reader.is_behind) {
            if let Ok(place) = reader.updates.try_reserve() {
                place.send(PrefixUpdate { reset: true, stored: self.blocks.iter().copied().collect(), removed: Vec::new() });
                reader.is_behind = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn follow(known: &mut Option<HashSet<u64>>, update: PrefixUpdate) {
        if update.reset {
            *known = Some(HashSet::new());
        }
        let known = known.as_mut().expect("a reset comes first");
        for block in update.removed {
            known.remove(&block);
        }
        known.extend(update.stored);
    }

    proptest! {
        #[test]
        fn readers_end_up_with_what_the_worker_has(
            updates in prop::collection::vec((prop::bool::weighted(0.1), prop::collection::vec(0u64..50, 0..5), prop::collection::vec(0u64..50, 0..5)), 0..200),
            reads in prop::collection::vec(0usize..4, 200),
        ) {
            let mut board = PrefixBoard::default();
            let mut reader = board.subscribe();
            let (mut known, mut truth) = (None, Some(HashSet::new()));
            for ((reset, stored, removed), reads) in updates.into_iter().zip(reads) {
                // A block that is removed and stored at once is there: the worker reuses it.
                let update = PrefixUpdate { reset, stored, removed };
                board.apply(update.clone()).unwrap();
                follow(&mut truth, update);
                for _ in 0..reads {
                    if let Ok(update) = reader.try_recv() {
                        follow(&mut known, update);
                    }
                }
            }
            while let Ok(update) = reader.try_recv() {
                follow(&mut known, update);
            }
            board.catch_up();
            while let Ok(update) = reader.try_recv() {
                follow(&mut known, update);
            }
            prop_assert_eq!(known, truth);
        }
    }
}
