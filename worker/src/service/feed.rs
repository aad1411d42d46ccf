//! Changes of a run's prefix cache over its engine's restarts, as one stream.

use std::sync::Arc;
use std::time::Duration;

use forge_shared::link::PrefixUpdate;
use tokio::sync::mpsc;

use crate::link::ReplicaLink;

/// Updates that may lie unread; behind them the engine begins anew.
const DEPTH: usize = 16;
/// How often an absent engine is looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Begins with a reset; another one follows whenever an engine comes or goes. Ends when the receiver is dropped.
pub(super) fn prefixes(link: Arc<ReplicaLink>) -> mpsc::Receiver<PrefixUpdate> {
    let (sender, receiver) = mpsc::channel(DEPTH);
    tokio::spawn(async move {
        loop {
            let version = link.version();
            if sender.send(PrefixUpdate { reset: true, ..PrefixUpdate::default() }).await.is_err() {
                return;
            }
            if let Some(mut updates) = link.prefixes() {
                loop {
                    let update = tokio::select! {
                        update = updates.recv() => update,
                        () = sender.closed() => return,
                    };
                    let Some(update) = update else { break };
                    if sender.send(update).await.is_err() {
                        return;
                    }
                }
            }
            // An engine whose inbox was full closes the channel too: it is asked again after a while.
            let mut looks = 0;
            while link.version() == version && !(looks > 1 && link.has_engine()) {
                looks += 1;
                tokio::select! {
                    () = tokio::time::sleep(LOOK_INTERVAL) => {}
                    () = sender.closed() => return,
                }
            }
        }
    });
    receiver
}

/// One update for several in a row.
#[derive(Debug, Default)]
pub(super) struct Merged {
    pub(super) reset: bool,
    /// The last word on each block.
    blocks: std::collections::HashMap<u64, bool>,
}

impl Merged {
    pub(super) fn add(&mut self, update: PrefixUpdate) {
        if update.reset {
            self.reset = true;
            self.blocks.clear();
        }
        self.blocks.extend(update.removed.into_iter().map(|block| (block, false)));
        self.blocks.extend(update.stored.into_iter().map(|block| (block, true)));
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.reset && self.blocks.is_empty()
    }

    /// Takes it in pieces of at most `limit` blocks; only the first says reset.
    pub(super) fn take(&mut self, limit: usize) -> Vec<PrefixUpdate> {
        let mut pieces = vec![PrefixUpdate { reset: std::mem::take(&mut self.reset), ..PrefixUpdate::default() }];
        for (count, (block, is_stored)) in std::mem::take(&mut self.blocks).into_iter().enumerate() {
            if count > 0 && count % limit == 0 {
                pieces.push(PrefixUpdate::default());
            }
            let Some(piece) = pieces.last_mut() else { break };
            if is_stored { piece.stored.push(block) } else { piece.removed.push(block) }
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_on_a_block_counts_and_pieces_are_bounded() {
        let mut merged = Merged::default();
        assert!(merged.is_empty());
        merged.add(PrefixUpdate { reset: false, stored: vec![1, 2], removed: vec![9] });
        merged.add(PrefixUpdate { reset: true, stored: vec![3, 4, 5], removed: vec![] });
        merged.add(PrefixUpdate { reset: false, stored: vec![6], removed: vec![3] });
        let pieces = merged.take(3);
        assert_eq!(pieces.iter().map(|piece| piece.reset).collect::<Vec<_>>(), [true, false]);
        let mut stored: Vec<u64> = pieces.iter().flat_map(|piece| piece.stored.clone()).collect();
        stored.sort_unstable();
        assert_eq!((stored, pieces[0].removed.len() + pieces[1].removed.len()), (vec![4, 5, 6], 1));
        assert!(merged.is_empty());
    }
}
