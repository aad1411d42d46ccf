//! The leader's memory of who lives: one lease per node, renewed by heartbeats.
//!
//! What it is not: nothing of it is in the log. A new leader gives every known node two leases' time first, so that a
//! change of leaders loses nobody: a node may need the whole of one to notice that its leader is gone, and has to find the
//! new one then.
//!
//! Invariants: a lease belongs to one incarnation; a heartbeat of an older one renews nothing; no lease runs out because the
//! leader itself stood still and took no heartbeats. Times are the leader's own monotonic clock and compared with no other.

use std::collections::BTreeMap;

use forge_shared::cluster::Revision;
use forge_shared::cluster::node::NodePhase;
use forge_shared::ids::{Incarnation, NodeId};

use crate::state::ClusterState;

/// A leader that was not heard of by itself for so long was frozen, or had no share of its machine.
const STILL_MS: u64 = 1_000;

#[derive(Debug, Clone, Copy)]
struct Lease {
    incarnation: Incarnation,
    ends_ms: u64,
}

/// Leases of all ready nodes.
#[derive(Debug, Clone)]
pub struct LeaseTable {
    lease_ms: u64,
    leases: BTreeMap<NodeId, Lease>,
    /// Nothing was taken over yet.
    is_new: bool,
    /// The last [`LeaseTable::pulse`].
    pulse_ms: Option<u64>,
    /// The state's revision of nodes and placement that was taken over.
    followed: Option<Revision>,
}

impl LeaseTable {
    /// An empty table, as a new leader begins with.
    pub fn new(lease_ms: u64) -> Self {
        LeaseTable { lease_ms, leases: BTreeMap::new(), is_new: true, pulse_ms: None, followed: None }
    }

    /// Length of a lease, milliseconds.
    pub fn lease_ms(&self) -> u64 {
        self.lease_ms
    }

    /// Takes over what the state says: ready nodes that are new here, or in a newer incarnation, get a full lease, at
    /// the first call two; others are forgotten. To be called after every change of the state and before
    /// [`LeaseTable::expired`].
    pub fn follow(&mut self, now_ms: u64, state: &ClusterState) {
        // No node changes without it.
        let revision = state.placement_revision();
        if self.followed.replace(revision) == Some(revision) {
            return;
        }
        let nodes = state.nodes();
        self.leases.retain(|id, lease| {
            nodes.get(id).is_some_and(|node| node.phase == NodePhase::Ready && node.spec.incarnation == lease.incarnation)
        });
        let leases = if std::mem::take(&mut self.is_new) { 2 } else { 1 };
        let ends_ms = now_ms.saturating_add(self.lease_ms.saturating_mul(leases));
        for (id, node) in nodes.iter().filter(|(_, node)| node.phase == NodePhase::Ready) {
            self.leases.entry(id.clone()).or_insert(Lease { incarnation: node.spec.incarnation, ends_ms });
        }
    }

    /// A heartbeat came. Says whether it renewed anything: it does not if the node is not ready in this incarnation.
    pub fn renew(&mut self, node: &NodeId, incarnation: Incarnation, now_ms: u64) -> bool {
        let ends_ms = now_ms.saturating_add(self.lease_ms);
        match self.leases.get_mut(node) {
            Some(lease) if lease.incarnation == incarnation => {
                // Also where that is less than a new leader gave at first: now it is known that the node found it.
                lease.ends_ms = ends_ms;
                true
            }
            _ => false,
        }
    }

    /// The leader runs. To be called all the time, and before [`LeaseTable::expired`]: where it was not for a while, heartbeats
    /// lie unread, and every node has a full lease to send another. Says for how long it was not, if so.
    pub fn pulse(&mut self, now_ms: u64) -> Option<u64> {
        let still_ms = now_ms.saturating_sub(self.pulse_ms.replace(now_ms).unwrap_or(now_ms));
        if still_ms <= STILL_MS {
            return None;
        }
        self.begin_anew(now_ms);
        Some(still_ms)
    }

    /// Heartbeats could not be taken for a while: every node has a full lease to send another.
    pub fn begin_anew(&mut self, now_ms: u64) {
        let ends_ms = now_ms.saturating_add(self.lease_ms);
        self.leases.values_mut().for_each(|lease| lease.ends_ms = lease.ends_ms.max(ends_ms));
    }

    /// A node said good-bye: its lease need not be waited for.
    pub fn end(&mut self, node: &NodeId, incarnation: Incarnation) {
        if let Some(lease) = self.leases.get_mut(node).filter(|lease| lease.incarnation == incarnation) {
            lease.ends_ms = 0;
        }
    }

    /// Nodes whose lease has run out.
    pub fn expired(&self, now_ms: u64) -> Vec<(NodeId, Incarnation)> {
        let over = self.leases.iter().filter(|(_, lease)| lease.ends_ms <= now_ms);
        over.map(|(id, lease)| (id.clone(), lease.incarnation)).collect()
    }

    /// When the next lease runs out, if none is renewed.
    pub fn next_end_ms(&self) -> Option<u64> {
        self.leases.values().map(|lease| lease.ends_ms).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::test_support::World;

    #[test]
    fn leases_are_kept_by_heartbeats_of_the_present_incarnation() {
        let mut world = World::new();
        world.join("a", 2, &[10]).expect("joins");
        world.join("b", 1, &[10]).expect("joins");
        let mut leases = LeaseTable::new(3_000);
        leases.follow(1_000, &world.state);
        assert!(leases.expired(6_999).is_empty(), "a new leader gives two leases");
        let (a, b) = (NodeId::from("a"), NodeId::from("b"));
        assert!(leases.renew(&a, Incarnation(2), 6_000));
        assert!(!leases.renew(&b, Incarnation(7), 6_000));
        assert!(!leases.renew(&NodeId::from("c"), Incarnation(1), 6_000));
        assert_eq!(leases.expired(7_000), [(b, Incarnation(1))]);
        leases.begin_anew(7_500);
        assert!(leases.expired(10_499).is_empty());
        assert_eq!(leases.expired(10_500).len(), 2);
        leases.end(&a, Incarnation(1));
        assert!(leases.expired(7_000).is_empty(), "an older process says good-bye for itself only");
        world.join("b", 2, &[10]).expect("anew");
        world.lose("a", 2).expect("lost");
        leases.follow(7_000, &world.state);
        assert!(leases.expired(9_999).is_empty(), "one lease from then on");
        leases.end(&NodeId::from("b"), Incarnation(2));
        assert_eq!(leases.expired(7_000), [(NodeId::from("b"), Incarnation(2))]);
    }

    #[test]
    fn a_leader_that_was_frozen_gives_nobody_up() {
        let mut world = World::new();
        world.join("a", 1, &[10]).expect("joins");
        let mut leases = LeaseTable::new(3_000);
        leases.follow(0, &world.state);
        assert!(leases.renew(&NodeId::from("a"), Incarnation(1), 0));
        for now_ms in (0..=2_000).step_by(100) {
            assert_eq!(leases.pulse(now_ms), None);
        }
        assert_eq!(leases.pulse(7_000), Some(5_000));
        assert!(leases.expired(9_999).is_empty(), "it has a lease's time to be heard again");
        for now_ms in (7_100..=10_000).step_by(100) {
            assert_eq!(leases.pulse(now_ms), None);
        }
        assert_eq!(leases.expired(10_000).len(), 1);
    }
}
