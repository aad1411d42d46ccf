//! What is to be done for one service's replicas: which are missing, which must go, which are to be replaced.
//!
//! A ready replica is replaced by making its successor ready elsewhere first, as many at a time as `maxSurge` says. Where
//! there is no room for both, one whose wish was changed makes room for its successor, as many at a time as
//! `maxUnavailable` says, and one on a drained node serves on until there is room; if the node is drained by force, it goes
//! without a successor.
//!
//! Invariants: a change takes a ready replica away only while more than `replicas - maxUnavailable` take requests; replicas
//! that fit nowhere, changed or not, are not counted as wished. A drained node's replicas are replaced one at a time, and
//! only while no other is coming.

use std::collections::BTreeSet;

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
    /// Ready replicas that are to be replaced, in this order: those on drained nodes, of which only the first that can be, and
    /// then those whose wish was changed.
    pub ready: Vec<Replaced>,
    /// How many of the changed ones.
    pub budget: Budget,
    /// Replicas that go one step further towards their end.
    pub removed: Vec<(ReplicaId, Epoch)>,
    /// Something waits for its time, or for a draining replica's memory: what was refused before is said on.
    pub waits: bool,
}

/// How much of a change may be under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Budget {
    /// Successors that may still be placed beside those they replace.
    pub surge: usize,
    /// Whether successors are coming beside those they replace: then nobody makes room.
    pub is_surging: bool,
    /// Replicas that take requests.
    pub available: usize,
    /// And so many must.
    pub floor: usize,
}

impl Budget {
    fn of(service: &ServiceRecord) -> Budget {
        let wished = service.service.spec.replicas;
        let rollout = &service.service.spec.rollout;
        let is_ready = |replica: &ReplicaRecord| replica.status.phase == ReplicaPhase::Ready && replica.plan.replica.index < wished;
        let succeeded = || service.leaving.iter().filter(|leaving| !leaving.is_draining && is_ready(&leaving.replica));
        let serving: BTreeSet<u32> = service
            .replicas
            .iter()
            .filter(|replica| is_ready(replica))
            .chain(succeeded().map(|leaving| &leaving.replica))
            .map(|replica| replica.plan.replica.index)
            .collect();
        let surging = succeeded().count();
        Budget {
            surge: (rollout.surge(wished) as usize).saturating_sub(surging),
            is_surging: surging > 0,
            available: serving.len(),
            floor: wished.saturating_sub(rollout.unavailable(wished)) as usize,
        }
    }

    /// Whether one more may go before its successor is there, where `homeless` of those wished fit nowhere.
    pub fn may_take_away(&self, homeless: usize) -> bool {
        !self.is_surging && self.available > self.floor.saturating_sub(homeless)
    }
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

impl Replaced {
    /// Who serves in the place of a replica that is not there yet, of an older wish than the present one. Nobody where what
    /// was there instead failed under the present wish: that one may be bad.
    pub fn predecessor(service: &ServiceRecord, index: u32) -> Option<Replaced> {
        let has_failed =
            service.replicas.iter().any(|replica| replica.plan.replica.index == index && replica.generation == service.generation);
        let of_index = |replica: &&ReplicaRecord| replica.plan.replica.index == index && replica.generation < service.generation;
        let mut serving = service.leaving.iter().filter(|leaving| !leaving.is_draining).map(|leaving| &leaving.replica);
        let old = serving.find(of_index).filter(|_| !has_failed)?;
        let nodes = old.plan.ranks.iter().map(|rank| rank.node.clone()).collect();
        Some(Replaced { index, epoch: old.plan.epoch, nodes, is_on_draining: false, is_forced_off: false })
    }
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
        let mut coming = 0;
        let mut replaceable: Vec<Replaced> = Vec::new();
        for replica in service.replicas.iter() {
            let ReplicaId { index, .. } = replica.plan.replica;
            if index >= wished {
                work.removed.push((replica.plan.replica.clone(), replica.plan.epoch));
                continue;
            }
            let is_ready = replica.status.phase == ReplicaPhase::Ready;
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
        let is_hopeless = matches!(service.facts, Facts::Failed { .. });
        // A drained node's replicas first; of equals the first. What cannot be replaced for want of facts waits for them,
        // unless the model is unusable and the node must be emptied.
        replaceable.sort_by_key(|replaced| (!replaced.is_on_draining, replaced.index));
        replaceable.retain(|replaced| match replaced.is_on_draining {
            true => is_hopeless && replaced.is_forced_off || can_place && is_quiet,
            false => can_place,
        });
        work.ready = replaceable;
        work.budget = Budget::of(service);
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
