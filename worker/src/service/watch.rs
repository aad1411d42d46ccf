//! What a replica serves and how it does, told at every change and at most every 100 ms.

use std::sync::Arc;
use std::time::Duration;

use forge_cluster::engine::reply::{ReplicaCard, card_to_wire, status_to_wire};
use forge_proto::engine as wire;
use forge_shared::link::{EngineLink, EngineStatus};
use tokio::sync::mpsc;
use tonic::Status;

use super::feed::{self, Merged};
use crate::agent::RunId;
use crate::link::{ReplicaBoard, ReplicaLink};

/// Shortest time between two updates.
const INTERVAL: Duration = Duration::from_millis(100);
/// Block hashes of one message: some hundred kilobytes.
const MAX_BLOCKS: usize = 32_768;
/// Messages that may lie unread before the watch waits for its reader.
const DEPTH: usize = 4;

pub(super) fn watch(board: Arc<ReplicaBoard>, run: RunId, link: Arc<ReplicaLink>) -> mpsc::Receiver<Result<wire::ReplicaUpdate, Status>> {
    let (updates, receiver) = mpsc::channel(DEPTH);
    tokio::spawn(async move {
        let mut prefixes = feed::prefixes(link.clone());
        let mut merged = Merged::default();
        let mut told: Option<(u64, EngineStatus)> = None;
        let mut interval = tokio::time::interval(INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = interval.tick() => {}
                () = updates.closed() => return,
            }
            while let Ok(update) = prefixes.try_recv() {
                merged.add(update);
            }
            // Read before the state it counts: a change in between is told next time.
            let now = (link.version(), link.status());
            let changed = told.as_ref() != Some(&now);
            if changed || !merged.is_empty() {
                let is_new_card = told.as_ref().is_none_or(|(version, _)| *version != now.0);
                let mut update = wire::ReplicaUpdate { status: Some(status_to_wire(&now.1)), ..wire::ReplicaUpdate::default() };
                if is_new_card {
                    update.card = Some(card(&link).await);
                }
                for piece in merged.take(MAX_BLOCKS) {
                    update.blocks_reset = piece.reset;
                    update.blocks_stored = piece.stored;
                    update.blocks_removed = piece.removed;
                    if updates.send(Ok(std::mem::take(&mut update))).await.is_err() {
                        return;
                    }
                }
                told = Some(now);
            }
            if board.get(&run).is_none() {
                // The reader hears of the end by the stream's, whether it is read now or later.
                let _ = updates.send(Err(Status::not_found(format!("{run} does not run here any more")))).await;
                return;
            }
        }
    });
    receiver
}

async fn card(link: &Arc<ReplicaLink>) -> wire::Card {
    let text_digest = portable(link).await.map(|text| text.digest.clone()).unwrap_or_default();
    card_to_wire(&ReplicaCard { card: link.card(), text_digest, block_size: link.block_size() })
}

/// The portable text of a run, made off the async threads; an error where there is none yet.
pub(super) async fn portable(link: &Arc<ReplicaLink>) -> Result<Arc<crate::link::PortableText>, String> {
    let text = link.text().ok_or("the model is not loaded yet")?;
    let made = tokio::task::spawn_blocking(move || text.portable()).await;
    made.unwrap_or_else(|failure| Err(failure.to_string()))
}
