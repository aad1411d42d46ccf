//! Watches of the cluster at a coordinator: production's `Watcher`s, asked whenever something was published.

use std::collections::BTreeMap;
use std::sync::Arc;

use forge_coordinator::replicated::Replicated;
use forge_coordinator::watch::{AHEAD, KindSet, Watcher};
use forge_shared::cluster::Revision;
use forge_shared::cluster::event::Kind;

use crate::host::Host;
use crate::message::{Message, StreamId};
use crate::world::World;

/// After so long without a leader its watches end, so that clients go to another coordinator: two of the longest election
/// timeouts, milliseconds.
const PATIENCE_MS: u64 = 2 * 2 * 500;

/// The watches at a coordinator.
#[derive(Debug, Default)]
pub struct Watches {
    open: BTreeMap<StreamId, (Watcher, u64)>,
    /// What was published when they were last asked.
    seen: Option<Revision>,
    heard_ms: u64,
}

impl Watches {
    /// A gateway watches.
    pub fn begin(&mut self, now_ms: u64, replicated: &Arc<Replicated>, stream: StreamId, after: Option<Revision>) {
        let kinds = KindSet::of(&[Kind::Node, Kind::Service, Kind::Key]);
        self.open.insert(stream, (replicated.hub.watch(replicated.clone(), kinds, after), now_ms));
        self.seen = None;
    }

    /// The stream of a watch is gone.
    pub fn end(&mut self, stream: StreamId) {
        self.open.remove(&stream);
    }

    /// Sends what watches have not read; ends them where this coordinator has heard of no leader for long.
    pub fn go_on(&mut self, world: &mut World, host: Host, replicated: &Replicated, has_leader: bool) {
        if has_leader {
            self.heard_ms = world.now_ms;
        }
        if self.open.is_empty() {
            return;
        }
        if world.now_ms >= self.heard_ms + PATIENCE_MS {
            for (stream, _) in std::mem::take(&mut self.open) {
                world.close(stream, host);
            }
            return;
        }
        let ahead_ms = AHEAD.as_millis() as u64;
        for (watcher, _) in self.open.values_mut().filter(|(watcher, begun_ms)| watcher.is_ahead() && world.now_ms >= begun_ms + ahead_ms) {
            watcher.begin_again();
            self.seen = None;
        }
        let head = Some(replicated.hub.revision());
        if std::mem::replace(&mut self.seen, head) == head {
            return;
        }
        for (&stream, (watcher, _)) in &mut self.open {
            while let Some(batch) = watcher.poll() {
                world.stream(stream, host, Message::Batch(batch.into()));
            }
        }
    }
}
