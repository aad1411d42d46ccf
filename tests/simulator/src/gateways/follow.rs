//! A gateway's watch of the cluster: from one coordinator after the other, for ever.

use forge_cluster::client::route::{Next, Route};
use forge_cluster::client::{Position, watch_items};
use forge_gateway::cluster::epochs;
use forge_proto::cluster::WatchBatch;
use forge_shared::cluster::Revision;

use super::{BEAT_MS, GatewayTimer, Process, SILENT_MS};
use crate::host::Host;
use crate::message::{Message, StreamId};
use crate::streams::Wire;
use crate::world::World;

/// Between two tries, the first and the longest, milliseconds.
const PAUSE_MS: (u64, u64) = (100, 2_000);

/// Where the watch stands.
#[derive(Debug, Default)]
pub(super) struct Watching {
    position: Position,
    stream: Option<StreamId>,
    asked: String,
    heard_ms: u64,
    pause_ms: u64,
    number: u64,
}

impl Watching {
    /// Whether it is on this stream.
    pub(super) fn is(&self, stream: StreamId) -> bool {
        self.stream == Some(stream)
    }

    /// Whether it is to be tried again by this timer.
    pub(super) fn is_due(&self, number: u64) -> bool {
        self.stream.is_none() && self.number == number
    }

    /// A sign of its coordinator.
    pub(super) fn heard(&mut self, world: &World, stream: StreamId) {
        if self.is(stream) {
            self.heard_ms = world.now_ms;
        }
    }
}

impl Process {
    /// Looks for a coordinator that takes a watch.
    pub(super) fn look(&mut self, world: &mut World) {
        let Next::Ask(address) = Route::new(&self.addresses).next_step() else { return };
        let Some(to) = Host::coordinator_at(&address) else { return };
        let stream = world.open(self.host, to);
        let after = Some(Revision(self.watching.position.after)).filter(|after| after.0 > 0);
        self.watching.position.in_listing = false;
        (self.watching.stream, self.watching.asked, self.watching.heard_ms) = (Some(stream), address, world.now_ms);
        world.stream(stream, self.host, Message::Watch { after });
    }

    /// The watch broke off; it is resumed after a pause.
    pub(super) fn watch_over(&mut self, world: &mut World) {
        self.watching.stream = None;
        let asked = std::mem::take(&mut self.watching.asked);
        self.addresses.demote(&asked);
        self.watching.pause_ms = (self.watching.pause_ms * 2).clamp(PAUSE_MS.0, PAUSE_MS.1);
        self.watching.number = world.number();
        let pause_ms = self.random.between(self.watching.pause_ms / 2, self.watching.pause_ms);
        self.remind(world, pause_ms, GatewayTimer::Watch(self.watching.number));
    }

    pub(super) fn look_after_watch(&mut self, world: &mut World) {
        let Some(stream) = self.watching.stream else { return };
        if self.watching.heard_ms + SILENT_MS <= world.now_ms {
            world.close(stream, self.host);
            self.watch_over(world);
        } else if self.watching.heard_ms + BEAT_MS <= world.now_ms {
            world.stream(stream, self.host, Message::Wire(Box::new(Wire::Ping)));
        }
    }

    /// The watched coordinator tells something.
    pub(super) fn told(&mut self, world: &mut World, stream: StreamId, batch: WatchBatch) {
        if !self.watching.is(stream) {
            return;
        }
        (self.watching.heard_ms, self.watching.pause_ms) = (world.now_ms, 0);
        let items = match watch_items(batch, &mut self.watching.position) {
            Ok(items) => items,
            Err(error) => return world.violate("a watch can be read", error.to_string()),
        };
        let mut is_changed = false;
        for item in items {
            is_changed |= self.directory.apply(item);
        }
        if is_changed && self.directory.is_known() {
            self.reconcile(world);
            self.publish(world);
        }
    }

    /// Publishes what is served now.
    pub(super) fn publish(&mut self, world: &mut World) {
        let served = self.roster.served();
        let clashes = self.models.publish(&served, &self.directory.services());
        if let Some(clash) = clashes.first() {
            // Services of the simulation have names of their own.
            world.violate("a name belongs to one service", clash.to_string());
        }
        self.serves = epochs(&served);
    }
}
