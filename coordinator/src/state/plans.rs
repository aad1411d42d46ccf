//! The leader's placement becomes the cluster's: checked once more, since a leader may be an old one, or wrong.
//!
//! Invariant: a commit is taken whole or not at all, on the state it was computed from; a plan stands only on ready nodes
//! that take replicas, within the memory they are believed to have, with every layer and expert placed once, under an
//! epoch larger than any before.

use std::collections::{BTreeMap, BTreeSet};

use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{CommandError, PlannedReplica};
use forge_shared::cluster::node::{DataTransport, NodePhase, Role};
use forge_shared::cluster::service::{Facts, LeavingReplica, ReplicaPhase, ReplicaRecord, ReplicaStatus, ServiceRecord};
use forge_shared::ids::{Epoch, NodeId, ReplicaId, ServiceName};
use forge_shared::plan::{ModelFacts, Plan, Refusal};
use forge_shared::spec::{ByteSize, ModelServiceSpec};
use forge_shared::tree::share;

use super::checks::{bounded, invalid};
use super::level::KEPT;
use super::notices::Weight;
use super::services::leave;
use super::{ClusterState, Effect, MAX_COMMIT, Step, checks, standing};

/// What a leader wants of the services; see [`forge_shared::cluster::command::Command::CommitPlans`].
#[derive(Clone, Copy)]
pub(super) struct Commit<'a> {
    pub plans: &'a [PlannedReplica],
    pub removed: &'a [(ReplicaId, Epoch)],
    pub refusals: &'a [Refusal],
    pub settled: &'a [ServiceName],
}

/// Services as they would be, and what is to be said of it.
#[derive(Default)]
struct Draft {
    services: BTreeMap<ServiceName, ServiceRecord>,
    /// Devices that get something.
    devices: BTreeSet<(NodeId, u32)>,
    notices: Vec<(Weight, &'static str, String, String)>,
}

impl ClusterState {
    pub(super) fn commit_plans(
        &mut self,
        basis: Revision,
        Commit { plans, removed, refusals, settled }: Commit<'_>,
        step: &mut Step,
    ) -> Result<Effect, CommandError> {
        if basis < self.placement_revision || basis > self.revision {
            let reason = format!("the placement is for revision {basis}, and the state has changed at {}", self.placement_revision);
            return Err(CommandError::Stale { reason });
        }
        let counts = [("plans", plans.len()), ("removed", removed.len()), ("refusals", refusals.len()), ("settled", settled.len())];
        for (field, count) in counts {
            bounded(field, count, MAX_COMMIT + 1)?;
        }
        let mut draft = Draft::default();
        for (id, epoch) in removed {
            self.draft_removal(&mut draft, id, *epoch)?;
        }
        for planned in plans {
            self.draft_plan(&mut draft, planned)?;
        }
        self.draft_refusals(&mut draft, refusals, settled)?;
        self.check_memory(&draft)?;
        let changed: Vec<_> = draft.services.into_iter().filter(|(name, record)| self.services.get(name) != Some(record)).collect();
        if changed.is_empty() {
            return Ok(Effect::NONE);
        }
        for (name, record) in changed {
            self.put_service(name, record, step);
        }
        for (weight, reason, about, message) in draft.notices {
            self.notice(step, weight, reason, about, message);
        }
        Ok(Effect::CHANGED)
    }

    fn drafted<'a>(&self, draft: &'a mut Draft, name: &ServiceName) -> Result<&'a mut ServiceRecord, CommandError> {
        if !draft.services.contains_key(name) {
            let known = self.services.get(name).ok_or_else(|| CommandError::Stale { reason: format!("service {name} is gone") })?;
            draft.services.insert(name.clone(), known.clone());
        }
        draft.services.get_mut(name).ok_or_else(|| CommandError::Stale { reason: format!("service {name} is gone") })
    }

    fn draft_removal(&self, draft: &mut Draft, id: &ReplicaId, epoch: Epoch) -> Result<(), CommandError> {
        let service = self.drafted(draft, &id.service)?;
        let is_meant = |replica: &ReplicaRecord| replica.plan.replica == *id && replica.plan.epoch == epoch;
        if let Some(position) = service.replicas.iter().position(is_meant) {
            let replica = service.replicas.remove(position);
            leave(service, replica, true);
        } else if let Some(position) = service.leaving.iter().position(|leaving| is_meant(&leaving.replica)) {
            if service.leaving[position].is_draining {
                service.leaving.remove(position);
            } else {
                service.leaving[position].is_draining = true;
            }
        } else {
            return Err(CommandError::Stale { reason: format!("replica {id} has no epoch {epoch}") });
        }
        Ok(())
    }

    fn draft_plan(&self, draft: &mut Draft, planned: &PlannedReplica) -> Result<(), CommandError> {
        let PlannedReplica { plan, generation } = planned;
        let id = &plan.replica;
        let stale = |reason: String| Err(CommandError::Stale { reason });
        let service = self.drafted(draft, &id.service)?;
        if service.is_deleted || service.generation != *generation {
            return stale(format!("service {} is at generation {}, the plan at {generation}", id.service, service.generation));
        }
        if plan.epoch <= service.last_epoch {
            return stale(format!("service {} has given out epoch {}, the plan's is {}", id.service, service.last_epoch, plan.epoch));
        }
        if id.index >= service.service.spec.replicas {
            return invalid("plans.replica", format!("{id} is beyond the {} replicas wished", service.service.spec.replicas));
        }
        let Facts::Known { facts } = &service.facts else {
            return stale(format!("the model of {} is not known", id.service));
        };
        check_plan(plan, &service.service.spec, facts)?;
        for rank in &plan.ranks {
            let node = self.nodes.get(&rank.node);
            let Some(node) = node.filter(|node| node.phase == NodePhase::Ready && node.spec.role == Role::Worker && !node.cordoned) else {
                return stale(format!("node {} takes no replicas", rank.node));
            };
            let Some(device) = node.spec.devices.iter().find(|device| device.index == rank.device) else {
                return stale(format!("node {} has no device {}", rank.node, rank.device));
            };
            if let Some(reason) = &device.cannot_run {
                return stale(format!("nothing runs on device {}/{}: {reason}", rank.node, rank.device));
            }
        }
        let transports: BTreeSet<Option<DataTransport>> = plan.nodes().into_iter().map(|node| self.transport_of(node)).collect();
        if plan.is_divided() && (transports.len() > 1 || transports.contains(&None)) {
            return stale(format!("the workers of {id} do not reach each other: all need a data plane of one transport"));
        }
        service.last_epoch = plan.epoch;
        if self.level >= KEPT {
            service.longest_len = service.longest_len.max(Some(plan.max_model_len));
        }
        if let Some(position) = service.replicas.iter().position(|replica| replica.plan.replica.index == id.index) {
            let old = service.replicas.remove(position);
            let serves = old.status.phase == ReplicaPhase::Ready;
            if serves {
                service.leaving.push(LeavingReplica { replica: old, is_draining: false });
            }
        }
        let position = service.replicas.partition_point(|replica| replica.plan.replica.index < id.index);
        let record = ReplicaRecord { plan: plan.clone(), generation: *generation, status: ReplicaStatus::placed() };
        service.replicas.insert(position, record);
        draft.devices.extend(plan.ranks.iter().map(|rank| (rank.node.clone(), rank.device)));
        let places: Vec<String> = plan.ranks.iter().map(|rank| format!("{}/{}", rank.node, rank.device)).collect();
        let message = format!("replica {id} was placed on {} under epoch {}", places.join(", "), plan.epoch);
        draft.notices.push((Weight::Normal, "ReplicaPlaced", format!("replica/{id}"), message));
        Ok(())
    }

    /// How a worker reaches others.
    fn transport_of(&self, node: &NodeId) -> Option<DataTransport> {
        Some(self.nodes.get(node)?.spec.data_plane.as_ref()?.transport)
    }

    fn draft_refusals(&self, draft: &mut Draft, refusals: &[Refusal], settled: &[ServiceName]) -> Result<(), CommandError> {
        let mut seen: BTreeSet<&ServiceName> = BTreeSet::new();
        for name in refusals.iter().map(|refusal| &refusal.replica.service).chain(settled) {
            if !seen.insert(name) {
                return invalid("refusals", format!("service {name} is there twice"));
            }
        }
        for name in settled {
            self.drafted(draft, name)?.refusal = None;
        }
        for refusal in refusals {
            check_refusal(refusal)?;
            let name = &refusal.replica.service;
            let said = self.drafted(draft, name)?.refusal.replace(refusal.clone());
            if said.is_none() {
                draft.notices.push((Weight::Warning, "NotPlaceable", format!("service/{name}"), refusal.to_string()));
            }
        }
        Ok(())
    }

    /// No device that gets something is given more than it is believed to have.
    fn check_memory(&self, draft: &Draft) -> Result<(), CommandError> {
        let mut given: BTreeMap<(&NodeId, u32), u64> = BTreeMap::new();
        let untouched = self.services.iter().filter(|(name, _)| !draft.services.contains_key(*name)).map(|(_, service)| service);
        for replica in untouched.chain(draft.services.values()).flat_map(standing) {
            for rank in &replica.plan.ranks {
                let bytes = given.entry((&rank.node, rank.device)).or_default();
                *bytes = bytes.saturating_add(rank.memory.total_bytes());
            }
        }
        for (node, device) in &draft.devices {
            let has = self.nodes.get(node).and_then(|known| known.spec.devices.iter().find(|info| info.index == *device));
            let has_bytes = has.map_or(0, |info| info.memory_bytes);
            let given_bytes = given.get(&(node, *device)).copied().unwrap_or(0);
            if given_bytes > has_bytes {
                return invalid(
                    "plans.memory",
                    format!("device {node}/{device} has {} and would be given {}", ByteSize(has_bytes), ByteSize(given_bytes)),
                );
            }
        }
        Ok(())
    }
}

/// Whether a plan is one of this wish: sizes as wished, every layer once per tensor and expert rank, every expert once.
pub(crate) fn check_plan(plan: &Plan, spec: &ModelServiceSpec, facts: &ModelFacts) -> Result<(), CommandError> {
    let layout = spec.layout;
    if layout.ranks() != plan.ranks.len() || !layout.expert.is_power_of_two() {
        return invalid("plans.ranks", format!("{} ranks for a layout of {layout}", plan.ranks.len()));
    }
    let mut next_layer = 0;
    for stage in plan.ranks.chunks(layout.stage_ranks().max(1)) {
        let layers = stage.first().map_or(0..0, |rank| rank.layers.clone());
        let is_alike = stage.iter().enumerate().all(|(place, rank)| {
            let (expert_rank, tensor_rank) = (place / layout.tensor, place % layout.tensor);
            (rank.tensor_rank, rank.tensor_size) == (tensor_rank, layout.tensor)
                && (rank.expert_rank, rank.expert_size) == (expert_rank, layout.expert)
                && rank.experts == share(facts.shape.experts, expert_rank, layout.expert)
                && rank.layers == layers
                && (1..=1024).contains(&rank.threads)
        });
        if !is_alike || layers.start != next_layer || layers.end <= layers.start {
            return invalid(
                "plans.ranks",
                "every layer must be placed once on each tensor and expert rank, in order, and every expert once",
            );
        }
        next_layer = layers.end;
    }
    if next_layer != facts.layers {
        return invalid("plans.ranks", format!("{next_layer} of {} layers are placed", facts.layers));
    }
    let sizes_match = plan.block_size == spec.block_size
        && plan.kv_cache_dtype == spec.kv_cache_dtype
        && plan.max_step_tokens == spec.max_step_tokens
        && plan.max_batch_size == spec.max_batch_size
        && spec.max_model_len.is_none_or(|len| len == plan.max_model_len);
    if !sizes_match {
        return invalid("plans", "block size, batch size, step size, context and KV type must be the service's");
    }
    let slots = plan.kv_blocks.saturating_mul(plan.block_size);
    if plan.max_model_len == 0 || plan.max_model_len > facts.context_length || plan.max_model_len > slots {
        let reason = format!("{} tokens fit neither context ({}) nor KV slots ({slots})", plan.max_model_len, facts.context_length);
        return invalid("plans.max_model_len", reason);
    }
    Ok(())
}

fn check_refusal(refusal: &Refusal) -> Result<(), CommandError> {
    bounded("constraints of a refusal", refusal.constraints.len(), 65)?;
    bounded("settings of a nearest plan", refusal.nearest.len(), 17)?;
    refusal.constraints.iter().try_for_each(|failed| checks::text("refusals.constraint", &failed.constraint, 1_024))?;
    refusal.nearest.iter().try_for_each(|(key, value)| {
        checks::text("refusals.nearest", key, 64)?;
        checks::text("refusals.nearest", value, 64)
    })
}
