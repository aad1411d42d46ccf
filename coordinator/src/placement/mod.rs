//! Placement: a pure function from devices and a wish to plans, or a [`Refusal`] that explains itself.
//!
//! What it is not: it moves nothing that stands. Its caller says which replicas are to be placed, and the rest of a
//! service only counts for spreading.
//!
//! Invariants (property-tested): a plan never exceeds a device's free memory, other replicas included; every layer is
//! placed once per tensor and expert rank, and every expert once per stage and tensor rank; epochs grow; the same input, in whatever order, gives the same plans; replicas spread over
//! nodes; a refusal's nearest plan is feasible.

mod cluster;
mod demand;
mod explain;
mod fit;
#[cfg(test)]
mod tests;

use forge_shared::ids::{Epoch, NodeId, ReplicaId, ServiceName};
use forge_shared::plan::{DeviceView, ModelFacts, Plan, RankPlan, Refusal};
use forge_shared::spec::ModelServiceSpec;

pub use cluster::Cluster;

use demand::Demand;
use fit::{Budget, Place, Spread};

/// What is to be placed.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// The service.
    pub service: &'a ServiceName,
    /// The operator's settings.
    pub spec: &'a ModelServiceSpec,
    /// The model's own numbers.
    pub facts: &'a ModelFacts,
    /// Which replicas are to be placed.
    pub indices: &'a [u32],
    /// The highest epoch given out for the service.
    pub last_epoch: Epoch,
    /// Replicas of the service that stay, of the same generation: they decide the context, and count for spreading.
    pub standing: &'a [&'a Plan],
    /// Where a replica must not be.
    pub avoided: &'a [(u32, NodeId)],
    /// Whether all ranks of a replica must be on one node.
    pub on_one_node: bool,
}

/// What became of a wish.
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    /// Replicas that fit, in the order of `indices`, with growing epochs.
    pub plans: Vec<Plan>,
    /// Why the first that does not fit does not.
    pub refusal: Option<Refusal>,
}

/// Places replicas, taking their memory from the cluster.
pub fn plan(cluster: &mut Cluster, wish: &Wish<'_>) -> Placement {
    let (plans, refused) = place(cluster, wish);
    let refusal = refused.map(|index| explain::refusal(cluster, wish, index, &plans));
    Placement { plans, refusal }
}

/// Places one replica on the roomiest of some devices outside any cluster; of equals, the first.
///
/// # Errors
/// A [`Refusal`] that lists each failed constraint with numbers and settings that would fit.
pub fn plan_alone(devices: &[DeviceView], service: &ServiceName, spec: &ModelServiceSpec, facts: &ModelFacts) -> Result<Plan, Refusal> {
    let wish = Wish { service, spec, facts, indices: &[0], last_epoch: Epoch(0), standing: &[], avoided: &[], on_one_node: true };
    let Placement { plans, refusal } = plan(&mut Cluster::of_devices(devices), &wish);
    match (plans.into_iter().next(), refusal) {
        (Some(plan), _) => Ok(plan),
        (None, Some(refusal)) => Err(refusal),
        (None, None) => {
            let replica = ReplicaId { service: service.clone(), index: 0 };
            Err(Refusal { replica, wrong_setting: None, constraints: vec![], nearest: vec![] })
        }
    }
}

/// Devices without a rank of `plans`, as `node/device`, and why they have none.
pub fn why_not(cluster: &Cluster, wish: &Wish<'_>, plans: &[Plan]) -> Vec<(String, String)> {
    explain::why_not(cluster, wish, plans)
}

/// Plans for the replicas that fit, and the first index that does not.
fn place(cluster: &mut Cluster, wish: &Wish<'_>) -> (Vec<Plan>, Option<u32>) {
    let first_index = wish.indices.first().copied();
    if explain::forbidden(wish).is_some() {
        return (Vec::new(), first_index);
    }
    let Ok(demand) = Demand::of(wish.spec, wish.facts, wish.standing.first().map(|plan| plan.max_model_len)) else {
        return (Vec::new(), first_index);
    };
    let mut counts = vec![0; cluster.nodes.len()];
    wish.standing.iter().for_each(|plan| count(cluster, &mut counts, plan));
    let (mut plans, mut refused, mut epoch) = (Vec::new(), None, wish.last_epoch);
    for &index in wish.indices {
        let avoided: Vec<usize> =
            wish.avoided.iter().filter(|(of, _)| *of == index).filter_map(|(_, node)| cluster.position(node)).collect();
        let spread = Spread { counts: &counts, avoided: &avoided, on_one_node: wish.on_one_node };
        let places = fit::choose(cluster, &demand, &spread);
        let fitting = places.and_then(|places| fit::budget(cluster, &demand, &places).map(|budget| (places, budget)));
        let Some((places, budget)) = fitting else {
            refused = refused.or(Some(index));
            continue;
        };
        epoch = epoch.next();
        let ranks = ranks(cluster, wish.spec, &demand, &places, &budget);
        let plan = Plan {
            replica: ReplicaId { service: wish.service.clone(), index },
            epoch,
            max_model_len: budget.max_model_len,
            block_size: wish.spec.block_size,
            kv_blocks: usize::try_from(budget.kv_blocks).unwrap_or(usize::MAX),
            kv_cache_dtype: wish.spec.kv_cache_dtype,
            max_step_tokens: wish.spec.max_step_tokens,
            max_batch_size: wish.spec.max_batch_size,
            ranks,
        };
        cluster.take(&plan);
        count(cluster, &mut counts, &plan);
        plans.push(plan);
    }
    // All replicas of a generation answer the same requests: the shortest context is everyone's.
    let shortest = plans.iter().map(|plan| plan.max_model_len).min();
    plans.iter_mut().for_each(|plan| plan.max_model_len = shortest.unwrap_or(plan.max_model_len));
    (plans, refused)
}

fn count(cluster: &Cluster, counts: &mut [u32], plan: &Plan) {
    let mut nodes: Vec<usize> = plan.ranks.iter().filter_map(|rank| cluster.position(&rank.node)).collect();
    nodes.sort_unstable();
    nodes.dedup();
    nodes.into_iter().for_each(|at| counts[at] += 1);
}

fn ranks(cluster: &Cluster, spec: &ModelServiceSpec, demand: &Demand, places: &[Place], budget: &Budget) -> Vec<RankPlan> {
    let ranks = demand.ranks.iter().zip(places).zip(&budget.memory).map(|((rank, place), memory)| {
        let node = &cluster.nodes[place.node];
        let slot = &node.slots[place.slot];
        // Ranks that share a device share its cores.
        let sharing = places.iter().filter(|other| *other == place).count().max(1);
        RankPlan {
            node: node.id.clone(),
            device: slot.device,
            tensor_rank: rank.tensor_rank,
            tensor_size: demand.layout.tensor,
            expert_rank: rank.expert_rank,
            expert_size: demand.layout.expert,
            layers: rank.layers.clone(),
            experts: rank.experts.clone(),
            threads: spec.threads.unwrap_or(slot.cores / sharing).clamp(1, 1024),
            memory: *memory,
        }
    });
    ranks.collect()
}
