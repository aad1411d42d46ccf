//! What the leader remembers of replicas that failed: where, how often, and when to try again.
//!
//! Invariant: a failure is counted once; the time between two tries of one replica doubles up to a bound; a node where a
//! service failed too often is left out until that is forgotten or its process began anew.

use std::collections::{BTreeMap, BTreeSet};

use forge_shared::cluster::node::NodePhase;
use forge_shared::cluster::service::{ReplicaRecord, ServiceRecord};
use forge_shared::ids::{Epoch, Incarnation, NodeId, ServiceName};

use crate::state::{ClusterState, runs};

/// Time before the first new try, and the most between two, milliseconds.
const BACKOFF_MS: (u64, u64) = (1_000, 300_000);
/// After so long without another a replica's failures are forgotten.
const FORGET_REPLICA_MS: u64 = 900_000;
/// And a node's.
const FORGET_NODE_MS: u64 = 1_800_000;
/// A node with so many failures of one service is left out.
const NODE_FAILURES: u32 = 3;

/// Failures of all services.
#[derive(Debug, Clone, Default)]
pub(super) struct Failures {
    services: BTreeMap<ServiceName, OfService>,
}

#[derive(Debug, Clone, Default)]
struct OfService {
    generation: u64,
    counted: BTreeSet<Epoch>,
    replicas: BTreeMap<u32, OfReplica>,
    nodes: BTreeMap<NodeId, OfNode>,
}

#[derive(Debug, Clone)]
struct OfReplica {
    count: u32,
    last_ms: u64,
    next_ms: u64,
    /// Of several nodes, the one by whose fault it failed last.
    culprit: Option<(NodeId, Incarnation)>,
}

#[derive(Debug, Clone, Copy)]
struct OfNode {
    incarnation: Incarnation,
    count: u32,
    last_ms: u64,
}

impl Failures {
    /// Counts what has failed since, and forgets what is old.
    pub fn follow(&mut self, now_ms: u64, state: &ClusterState) {
        self.services.retain(|name, _| state.services().contains_key(name));
        for (name, service) in state.services() {
            // What failed under an older wish says nothing of this one.
            let failed = service.replicas.iter().filter(|replica| !runs(replica) && replica.generation == service.generation);
            if failed.clone().next().is_none() && !self.services.contains_key(name) {
                continue;
            }
            let known = self.services.entry(name.clone()).or_default();
            if known.generation != service.generation {
                *known = OfService { generation: service.generation, ..OfService::default() };
            }
            failed.for_each(|replica| known.count(now_ms, state, replica));
            known.forget(now_ms, state, service);
        }
        self.services.retain(|_, known| !(known.counted.is_empty() && known.replicas.is_empty() && known.nodes.is_empty()));
    }

    /// When a replica may be placed again; at once where nothing failed.
    pub fn next_try_ms(&self, name: &ServiceName, index: u32) -> u64 {
        self.services.get(name).and_then(|known| known.replicas.get(&index)).map_or(0, |replica| replica.next_ms)
    }

    /// Nodes where the service has failed: all of them, and those where it did too often.
    pub fn nodes(&self, name: &ServiceName) -> (Vec<NodeId>, Vec<NodeId>) {
        let Some(known) = self.services.get(name) else { return (Vec::new(), Vec::new()) };
        let often = known.nodes.iter().filter(|(_, node)| node.count >= NODE_FAILURES);
        (known.nodes.keys().cloned().collect(), often.map(|(id, _)| id.clone()).collect())
    }
}

impl OfService {
    fn count(&mut self, now_ms: u64, state: &ClusterState, replica: &ReplicaRecord) {
        if !self.counted.insert(replica.plan.epoch) {
            return;
        }
        let index = replica.plan.replica.index;
        let count = self.replicas.get(&index).map_or(0, |known| known.count).saturating_add(1);
        let (first_ms, most_ms) = BACKOFF_MS;
        let wait_ms = first_ms.saturating_mul(1 << (count - 1).min(20)).min(most_ms);
        let culprit = replica.status.fault.as_ref().and_then(|id| Some((id.clone(), state.nodes().get(id)?.spec.incarnation)));
        self.replicas.insert(index, OfReplica { count, last_ms: now_ms, next_ms: now_ms.saturating_add(wait_ms), culprit });
        // Of several nodes one lets the others down, as they say: it is not the first choice from then on, and that is all.
        let plan = &replica.plan;
        let (culprits, counts) = if plan.is_divided() { (replica.status.fault.iter().collect(), 0) } else { (plan.nodes(), 1) };
        for id in culprits {
            let Some(node) = state.nodes().get(id) else { continue };
            let incarnation = node.spec.incarnation;
            let count = self.nodes.get(id).filter(|known| known.incarnation == incarnation).map_or(0, |known| known.count);
            self.nodes.insert(id.clone(), OfNode { incarnation, count: count.saturating_add(counts), last_ms: now_ms });
        }
    }

    fn forget(&mut self, now_ms: u64, state: &ClusterState, service: &ServiceRecord) {
        let failed: BTreeSet<Epoch> = service.replicas.iter().filter(|replica| !runs(replica)).map(|replica| replica.plan.epoch).collect();
        self.counted.retain(|epoch| failed.contains(epoch));
        let is_there = |(id, incarnation): &(NodeId, Incarnation)| {
            state.nodes().get(id).is_some_and(|known| known.phase == NodePhase::Ready && known.spec.incarnation == *incarnation)
        };
        self.replicas.retain(|index, replica| {
            // Whose loss was the reason is gone, or another process by now: nothing is waited for.
            let is_explained = replica.culprit.as_ref().is_some_and(|culprit| !is_there(culprit));
            *index < service.service.spec.replicas && !is_explained && now_ms < replica.last_ms.saturating_add(FORGET_REPLICA_MS)
        });
        self.nodes.retain(|id, node| {
            now_ms < node.last_ms.saturating_add(FORGET_NODE_MS)
                && state.nodes().get(id).is_some_and(|known| known.spec.incarnation == node.incarnation)
        });
    }
}
