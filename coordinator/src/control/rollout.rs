//! What is to be done for one service's replicas: which are missing, which must go, which are to be replaced.
//!
//! A ready replica is replaced by making its successor ready elsewhere first. Where there is no room for both, one whose
//! wish was changed makes room for its successor, and one on a drained node serves on until there is room; if the node is
//! drained by force, it goes without a successor.
//!
//! Invariant: of a service at most one ready replica at a time is being replaced, and only while no other is coming.

use forge_shared::cluster::service::{Facts, ReplicaPhase, ReplicaRecord, ServiceRecord};
use forge_shared::ids::{Epoch, NodeId, ReplicaId, ServiceName};

use super::failures::Failures;
use super::{is_forced_off, is_on_draining};
use crate::state::{ClusterState, runs};

/// A service's work.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// Indices without a replica that runs.
    pub missing: Vec<u32>,
    /// Replicas that are replaced although they run: not ready yet, under an older wish or on a drained node.
    pub unready: Vec<Replaced>,
    /// Ready replicas of which one is to be replaced: the first that can be. Those on drained nodes are before the others.
    pub ready: Vec<Replaced>,
    /// Replicas that go one step further towards their end.
    pub removed: Vec<(ReplicaId, Epoch)>,
    /// Something waits for its time, or for a draining replica's memory: what was refused before is said on.
    pub waits: bool,
}

/// A replica and why it is replaced.
#[derive(Debug, Clone)]
pub(super) struct Replaced {
    pub index: u32,
    pub epoch: Epoch,
    pub nodes: Vec<NodeId>,
    pub is_on_draining: bool,
    /// It goes, with a successor or without.
    pub is_forced_off: bool,
}

impl Work {
    /// What a living service needs. `is_over` says of a draining replica whether its time is over.
    pub fn of(
        now_ms: u64,
        state: &ClusterState,
        (name, service): (&ServiceName, &ServiceRecord),
        failures: &Failures,
        is_over: impl Fn(&ReplicaRecord) -> bool,
    ) -> Work {
        let mut work = Work { removed: leaving(service, is_over), ..Work::default() };
        let wished = service.service.spec.replicas;
        let can_place = matches!(service.facts, Facts::Known { .. });
        let (mut ready, mut coming) = (0, 0);
        let mut replaceable: Vec<Replaced> = Vec::new();
        for replica in service.replicas.iter() {
            let ReplicaId { index, .. } = replica.plan.replica;
            if index >= wished {
                work.removed.push((replica.plan.replica.clone(), replica.plan.epoch));
                continue;
            }
            let is_ready = replica.status.phase == ReplicaPhase::Ready;
            ready += u32::from(is_ready);
            coming += u32::from(runs(replica) && !is_ready);
            let is_on_draining = is_on_draining(state, &replica.plan);
            if !runs(replica) || !(is_on_draining || replica.generation < service.generation) {
                continue;
            }
            let nodes = replica.plan.ranks.iter().map(|rank| rank.node.clone()).collect();
            let is_forced_off = is_forced_off(state, &replica.plan);
            let replaced = Replaced { index, epoch: replica.plan.epoch, nodes, is_on_draining, is_forced_off };
            if is_ready {
                replaceable.push(replaced);
            } else if can_place && replica.status.phase != ReplicaPhase::Draining {
                work.unready.push(replaced);
            }
        }
        for index in 0..wished {
            let known = service.replicas.iter().find(|replica| replica.plan.replica.index == index);
            if known.is_some_and(runs) || !can_place {
                continue;
            }
            if now_ms < failures.next_try_ms(name, index) {
                work.waits = true;
            } else {
                work.missing.push(index);
            }
        }
        let is_quiet = coming == 0 && service.leaving.iter().all(|leaving| leaving.is_draining);
        // Replicas that fit nowhere do not hold up a change of the others; ones that failed do.
        let gaps = (0..wished).filter(|index| service.replicas.iter().all(|replica| replica.plan.replica.index != *index)).count();
        let is_settled = is_quiet && (ready == wished || service.refusal.is_some() && ready + gaps as u32 == wished);
        // A drained node's replicas first; of equals the first. What cannot be replaced for want of facts waits for them,
        // unless the model is unusable and the node must be emptied.
        replaceable.sort_by_key(|replaced| (!replaced.is_on_draining, replaced.index));
        let is_hopeless = matches!(service.facts, Facts::Failed { .. });
        replaceable.retain(|replaced| match replaced.is_on_draining {
            true => is_hopeless && replaced.is_forced_off || can_place && is_quiet,
            false => can_place && is_settled,
        });
        work.ready = replaceable;
        work.waits |= service.leaving.iter().any(|leaving| leaving.is_draining);
        work
    }

    /// What a deleted service needs: its draining replicas' end.
    pub fn of_deleted(service: &ServiceRecord, is_over: impl Fn(&ReplicaRecord) -> bool) -> Work {
        Work { removed: leaving(service, is_over), ..Work::default() }
    }

    /// Whether anything is to be placed.
    pub fn places(&self) -> bool {
        !self.missing.is_empty() || !self.unready.is_empty() || !self.ready.is_empty()
    }
}

/// Leaving replicas whose next step has come: a successor is ready or none is wished, or the time to drain is over.
fn leaving(service: &ServiceRecord, is_over: impl Fn(&ReplicaRecord) -> bool) -> Vec<(ReplicaId, Epoch)> {
    let is_succeeded = |index: u32| {
        index >= service.service.spec.replicas
            || service.replicas.iter().any(|other| other.plan.replica.index == index && other.status.phase == ReplicaPhase::Ready)
    };
    let due = service
        .leaving
        .iter()
        .filter(|leaving| if leaving.is_draining { is_over(&leaving.replica) } else { is_succeeded(leaving.replica.plan.replica.index) });
    due.map(|leaving| (leaving.replica.plan.replica.clone(), leaving.replica.plan.epoch)).collect()
}
