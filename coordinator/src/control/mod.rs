//! What the leader decides and lends: leases, proposals, inspections, shares of budgets.
//!
//! Pure: time is an argument, the state is read, and what is to happen comes back as data. What it is not: nothing here
//! is in the log; a new leader begins with empty tables and gets them filled by heartbeats, and its first decisions are
//! those of the old one, since they follow from the state.
//!
//! Invariant: decisions are idempotent. Asked again in the same state the controller asks for nothing new, and whatever it
//! proposes is checked once more when it is applied.

mod commit;
mod controller;
mod deadline;
mod duties;
mod failures;
mod inspect;
mod lease;
mod rollout;
mod shares;
#[cfg(test)]
mod tests;

use forge_cluster::api::{ClusterError, PlannedService};
use forge_shared::cluster::service::{Facts, ServiceRecord};
use forge_shared::ids::{Epoch, ServiceName};
use forge_shared::plan::{ModelFacts, Plan, RankPlan};
use forge_shared::spec::{ByteSize, ModelService};

pub use controller::{Controller, ControllerOptions, Intent};
pub use duties::{Duties, Duty};
pub use lease::LeaseTable;
pub use shares::ShareTable;

use crate::placement::{self, Cluster, Wish};
use crate::state::{ClusterState, changes_replicas, check_wish, runs};

/// How long a replica of this wish may finish its requests, milliseconds.
fn drain_ms(wish: &ModelService) -> u64 {
    wish.spec.gateway.drain_timeout_s.saturating_mul(1_000)
}

/// The wish of a generation and the digest of its weights.
fn wish_of(service: &ServiceRecord, generation: u64) -> Option<(&ModelService, &str)> {
    if generation == service.generation {
        let digest = match &service.facts {
            Facts::Known { facts } => facts.weights_digest.as_str(),
            Facts::Unknown { .. } | Facts::Failed { .. } => "",
        };
        return Some((&service.service, digest));
    }
    let older = service.older.iter().find(|older| older.generation == generation)?;
    Some((&older.service, &older.weights_digest))
}

/// What would be placed where, if this service were applied now. Replicas that would stay are in it.
///
/// # Errors
/// A wish that may not be written down, or one that fits nowhere, with the nearest that does.
pub fn plan_service(state: &ClusterState, service: &ModelService, facts: &ModelFacts) -> Result<PlannedService, ClusterError> {
    check_wish(service)?;
    let name = ServiceName(service.metadata.name.clone());
    let known = state.services().get(&name);
    let stays = known.filter(|known| !known.is_deleted && !changes_replicas(&known.service, service));
    let replicas = service.spec.replicas;
    let mut cluster = Cluster::of(state);
    let mut standing: Vec<&Plan> = Vec::new();
    if let Some(known) = known {
        for replica in known.replicas.iter().filter(|replica| runs(replica)) {
            let index = replica.plan.replica.index;
            if stays.is_some() && replica.generation == known.generation && index < replicas && !is_on_draining(state, &replica.plan) {
                standing.push(&replica.plan);
            } else {
                // Its place is free once it was replaced.
                cluster.release(&replica.plan);
            }
        }
    }
    let indices: Vec<u32> = (0..replicas).filter(|index| standing.iter().all(|plan| plan.replica.index != *index)).collect();
    let wish = Wish {
        service: &name,
        spec: &service.spec,
        facts,
        indices: &indices,
        last_epoch: known.map_or(state.epoch_floor(), |known| known.last_epoch),
        standing: &standing,
        avoided: &[],
        on_one_node: false,
    };
    let placement = placement::plan(&mut cluster, &wish);
    if let Some(refusal) = placement.refusal {
        return Err(ClusterError::NotPlaceable(Box::new(refusal)));
    }
    let mut plans: Vec<Plan> = standing.iter().map(|plan| (*plan).clone()).chain(placement.plans).collect();
    plans.sort_by_key(|plan| plan.replica.index);
    let refused_devices = placement::why_not(&cluster, &wish, &plans);
    let changes = known.is_none_or(|known| known.is_deleted || known.service != *service);
    let mut notes = Vec::new();
    if let Some(plan) = plans.iter().find(|plan| plan.is_divided()) {
        notes.push(across_note(plan, facts));
    }
    notes.extend(known.filter(|known| !known.is_deleted).and_then(|known| how_it_rolls(known, service)));
    Ok(PlannedService { service: service.clone(), changes, plans, refused_devices, notes })
}

/// What a replica over several workers means, in a sentence.
fn across_note(plan: &Plan, facts: &ModelFacts) -> String {
    let nodes = plan.nodes().len();
    let row_bytes = (facts.shape.hidden_size as u64).saturating_mul(4);
    let stage_ranks = plan.ranks.first().map_or(1, |first| first.tensor_size * first.expert_size).max(1);
    let stages = plan.ranks.chunks(stage_ranks);
    let apart = |ranks: &[RankPlan]| ranks.iter().any(|rank| rank.node != ranks[0].node);
    // Two sums a layer: after the attention, and after the rest.
    let sums = stages.clone().filter(|stage| apart(stage)).map(|stage| stage[0].layers.len() as u64 * 2).sum::<u64>();
    let handed = stages.clone().zip(stages.skip(1)).filter(|(from, to)| from.iter().zip(*to).any(|(from, to)| from.node != to.node));
    let bytes = row_bytes.saturating_mul(sums.saturating_add(handed.count() as u64));
    format!(
        "ranks of a replica are on {nodes} workers: for each token about {} go from a rank over their network (dataPlane), in {sums} sums \
         that each step waits for; where one worker has the devices it is faster",
        ByteSize(bytes)
    )
}

/// How a changed wish would be rolled out, in a sentence.
fn how_it_rolls(known: &ServiceRecord, service: &ModelService) -> Option<String> {
    let old = known.replicas.iter().filter(|replica| runs(replica)).count();
    if !changes_replicas(&known.service, service) || old == 0 {
        return None;
    }
    let (wished, rollout) = (service.spec.replicas, &service.spec.rollout);
    let (surge, unavailable) = (rollout.surge(wished), rollout.unavailable(wished));
    let beside = match surge {
        0 => "none beside the one that it replaces (rollout.maxSurge)".to_owned(),
        surge => format!("up to {surge} at a time beside those that they replace (rollout.maxSurge)"),
    };
    let instead = match unavailable {
        0 => "and none takes a place before its successor is ready (rollout.maxUnavailable is 0)".to_owned(),
        count => format!("and where there is no room for both up to {count} of {wished} may be missing (rollout.maxUnavailable)"),
    };
    let (next, deadline_s) = (known.generation + 1, rollout.progress_deadline_s);
    Some(format!(
        "it would become generation {next}: {old} replicas are replaced, {beside}, {instead}; without progress for {deadline_s} s it is said to be stuck"
    ))
}

/// Whether a rank of a plan is on a node that is being emptied.
fn is_on_draining(state: &ClusterState, plan: &Plan) -> bool {
    plan.ranks.iter().any(|rank| state.nodes().get(&rank.node).is_some_and(|node| node.draining))
}

/// Whether a plan has a rank on a node that is drained by force.
fn is_forced_off(state: &ClusterState, plan: &Plan) -> bool {
    plan.ranks.iter().any(|rank| state.nodes().get(&rank.node).is_some_and(|node| node.draining && node.is_forced))
}

/// The highest epoch and the plans that stand of a service's present generation.
fn present(service: &ServiceRecord) -> (Epoch, Vec<&Plan>) {
    let present = service.replicas.iter().filter(|replica| runs(replica) && replica.generation == service.generation);
    (service.last_epoch, present.map(|replica| &replica.plan).collect())
}
