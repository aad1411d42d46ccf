//! Why something does not fit, and what would.
//!
//! Invariant: a nearest plan was placed once, on the same devices, before it is offered.

use std::collections::BTreeMap;

use forge_shared::ids::ReplicaId;
use forge_shared::plan::{FailedConstraint, Plan, Refusal};
use forge_shared::spec::{ByteSize, Layout, ModelServiceSpec};

use super::cluster::{Cluster, Slot};
use super::demand::{Demand, MIN_MODEL_LEN, nearest_expert, no_such_experts};
use super::{Wish, place};

/// A whole model may be divided at most so often in a nearest plan.
const MAX_NEAREST_RANKS: usize = 64;
const MIB: u64 = 1 << 20;

/// What of a wish holds on no device whatever: the constraint, in words.
pub(super) fn forbidden(wish: &Wish<'_>) -> Option<String> {
    let spec = wish.spec;
    if let Some(reason) = no_such_experts(spec.layout, wish.facts) {
        return Some(reason);
    }
    let len = spec.max_model_len.filter(|len| *len > wish.facts.context_length)?;
    Some(format!("maxModelLen {len} is beyond the model's context of {} tokens", wish.facts.context_length))
}

/// Why replica `index` does not fit beside `placed`, which were placed just now and have their memory.
pub(super) fn refusal(cluster: &mut Cluster, wish: &Wish<'_>, index: u32, placed: &[Plan]) -> Refusal {
    let replica = ReplicaId { service: wish.service.clone(), index };
    let constraints = constraints(cluster, wish, index);
    let standing = wish.standing.len() + placed.len();
    let nearest = if standing > 0 {
        // The others stand: with so many replicas the wish is fulfilled as it is.
        vec![("replicas".to_owned(), standing.to_string())]
    } else {
        nearest(cluster, wish)
    };
    Refusal { replica, wrong_setting: wrong_setting(wish).map(str::to_owned), constraints, nearest }
}

/// The setting that this model cannot have on any machine.
fn wrong_setting(wish: &Wish<'_>) -> Option<&'static str> {
    if no_such_experts(wish.spec.layout, wish.facts).is_some() {
        return Some("layout.expert");
    }
    wish.spec.max_model_len.filter(|len| *len > wish.facts.context_length).map(|_| "maxModelLen")
}

fn constraints(cluster: &Cluster, wish: &Wish<'_>, index: u32) -> Vec<FailedConstraint> {
    let devices = cluster.devices();
    let everywhere = |constraint: String| vec![FailedConstraint { constraint, failed_devices: devices, devices }];
    if let Some(constraint) = forbidden(wish) {
        return everywhere(constraint);
    }
    let fixed_len = wish.standing.first().map(|plan| plan.max_model_len);
    let demand = match Demand::of(wish.spec, wish.facts, fixed_len) {
        Ok(demand) => demand,
        Err(constraint) => return everywhere(constraint),
    };
    if devices == 0 {
        return everywhere("there is no worker with a device".into());
    }
    let mut failed = Vec::new();
    let add = |failed: &mut Vec<FailedConstraint>, constraint: String, failed_devices: usize| {
        if failed_devices > 0 {
            failed.push(FailedConstraint { constraint, failed_devices, devices });
        }
    };
    for reason in ["its node is lost", "its node is being drained", "its node is cordoned"] {
        let nodes = cluster.nodes.iter().filter(|node| node.unusable == Some(reason));
        add(&mut failed, format!("a device takes replicas, and {reason}"), nodes.map(|node| node.slots.len() + node.refused.len()).sum());
    }
    let mut refused: BTreeMap<&str, usize> = BTreeMap::new();
    let ready = cluster.nodes.iter().filter(|node| node.unusable.is_none());
    ready.flat_map(|node| &node.refused).for_each(|(_, reason)| *refused.entry(reason).or_default() += 1);
    // A refusal is bounded: nodes that say ever new reasons are not quoted at length.
    for (reason, count) in refused.into_iter().take(8) {
        add(&mut failed, format!("a device can run models, and {reason}"), count);
    }
    let avoided = |at: usize| wish.avoided.iter().any(|(of, node)| *of == index && cluster.position(node) == Some(at));
    let kept_off = (0..cluster.nodes.len()).filter(|at| avoided(*at)).map(|at| cluster.nodes[at].slots.len()).sum();
    add(&mut failed, format!("replica {index} failed or is leaving there and is to be elsewhere"), kept_off);
    let usable: Vec<&Slot> = cluster
        .nodes
        .iter()
        .enumerate()
        .filter(|(at, node)| node.unusable.is_none() && !avoided(*at))
        .flat_map(|(_, node)| &node.slots)
        .collect();
    let free_max = usable.iter().map(|slot| slot.free_bytes).max().unwrap_or(0);
    // Of all ranks the hungriest decides.
    let Some(rank) = demand.ranks.iter().max_by_key(|rank| rank.need_bytes(demand.min_blocks)) else { return failed };
    let count = |fails: &dyn Fn(u64) -> bool| usable.iter().filter(|slot| fails(slot.free_bytes)).count();
    let fixed_bytes = rank.fixed_bytes();
    let part = if demand.ranks.len() > 1 { " of the largest rank" } else { "" };
    add(
        &mut failed,
        format!(
            "weights {} and workspace {}{part} must fit in free memory ({} at most)",
            ByteSize(rank.weights_bytes),
            ByteSize(rank.workspace_bytes),
            ByteSize(free_max)
        ),
        count(&|free| free < fixed_bytes),
    );
    let left_max = ByteSize(free_max.saturating_sub(fixed_bytes));
    if let (Some(kv_memory), Some(blocks)) = (wish.spec.kv_memory, demand.stated_blocks) {
        let kv_bytes = blocks.saturating_mul(rank.block_bytes);
        let constraint = format!("kvMemory {kv_memory} must fit beside weights and workspace ({left_max} left)");
        add(&mut failed, constraint, count(&|free| free.saturating_sub(fixed_bytes) < kv_bytes));
    }
    let context_bytes = demand.context_blocks.saturating_mul(rank.block_bytes);
    let kv_limit = demand.stated_blocks.map_or(u64::MAX, |blocks| blocks.saturating_mul(rank.block_bytes));
    let len = demand.wanted_len;
    add(
        &mut failed,
        format!("one sequence of {len} tokens needs {} of KV memory{part}", ByteSize(context_bytes)),
        count(&|free| free.saturating_sub(fixed_bytes).min(kv_limit) < context_bytes),
    );
    let need_bytes = rank.need_bytes(demand.least_blocks().unwrap_or(demand.min_blocks));
    let fitting = usable.len() - count(&|free| free < need_bytes);
    if demand.ranks.len() > 1 && (fitting < demand.ranks.len() || failed.is_empty()) {
        // Every device may do alone: what fails is all of them together.
        let lacks = |at: usize| cluster.nodes[at].unusable.is_none() && !avoided(at) && cluster.nodes[at].transport.is_none();
        let place = if wish.on_one_node {
            " on one worker"
        } else if (0..cluster.nodes.len()).any(lacks) {
            " on one worker, or on several that reach each other (dataPlane; the cluster at level 2)"
        } else {
            ""
        };
        let constraint = format!("{} ranks must fit together{place}, and {fitting} devices hold one", demand.ranks.len());
        failed.push(FailedConstraint { constraint, failed_devices: devices - fitting, devices });
    }
    failed
}

/// The same wish with less: a shorter context, then other KV memory, then another layout; with fewer replicas where even
/// so not all fit.
fn nearest(cluster: &mut Cluster, wish: &Wish<'_>) -> Vec<(String, String)> {
    shorter(cluster, wish).or_else(|| other_kv(cluster, wish)).or_else(|| other_layout(cluster, wish)).unwrap_or_default()
}

/// How many replicas of a changed wish fit, if any, and the context they would have.
fn fits(cluster: &mut Cluster, wish: &Wish<'_>, spec: &ModelServiceSpec) -> Option<(usize, Plan)> {
    let (plans, _) = place(cluster, &Wish { spec, ..*wish });
    plans.iter().for_each(|plan| cluster.release(plan));
    plans.first().map(|first| (plans.len(), first.clone()))
}

fn with_replicas(mut changes: Vec<(String, String)>, placed: usize, wish: &Wish<'_>) -> Vec<(String, String)> {
    if placed < wish.indices.len() {
        changes.push(("replicas".into(), placed.to_string()));
    }
    changes
}

/// The longest context with which a replica fits, by bisection: fitting is monotone in it.
fn shorter(cluster: &mut Cluster, wish: &Wish<'_>) -> Option<Vec<(String, String)>> {
    let context = wish.facts.context_length;
    let wanted_len = wish.spec.max_model_len.unwrap_or(context).min(context);
    let one = Wish { indices: &wish.indices[..1.min(wish.indices.len())], ..*wish };
    let (mut low, mut high) = (0, wanted_len);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        let spec = ModelServiceSpec { max_model_len: Some(middle), ..wish.spec.clone() };
        if fits(cluster, &one, &spec).is_some() { low = middle } else { high = middle - 1 }
    }
    if low == 0 || low < MIN_MODEL_LEN.min(wanted_len) {
        return None;
    }
    let spec = ModelServiceSpec { max_model_len: Some(low), ..wish.spec.clone() };
    let (placed, plan) = fits(cluster, wish, &spec)?;
    Some(with_replicas(vec![("maxModelLen".into(), plan.max_model_len.to_string())], placed, wish))
}

fn other_kv(cluster: &mut Cluster, wish: &Wish<'_>) -> Option<Vec<(String, String)>> {
    wish.spec.kv_memory?;
    let free = ModelServiceSpec { kv_memory: None, max_model_len: None, ..wish.spec.clone() };
    let one = Wish { indices: &wish.indices[..1.min(wish.indices.len())], ..*wish };
    let (_, plan) = fits(cluster, &one, &free)?;
    let kv_bytes: u64 = plan.ranks.iter().map(|rank| rank.memory.kv_bytes).sum();
    // Whole mebibytes are what a person would write; to the byte, only where nothing else fits.
    let exact = (kv_bytes, kv_bytes.to_string());
    let whole = [kv_bytes / MIB, kv_bytes.div_ceil(MIB)].map(|mib| (mib * MIB, format!("{mib}MiB")));
    whole.into_iter().filter(|(bytes, _)| *bytes > 0).chain([exact]).find_map(|(bytes, text)| {
        let spec = ModelServiceSpec { kv_memory: Some(ByteSize(bytes)), max_model_len: Some(plan.max_model_len), ..wish.spec.clone() };
        let (placed, _) = fits(cluster, wish, &spec)?;
        let changes = vec![("kvMemory".into(), text), ("maxModelLen".into(), plan.max_model_len.to_string())];
        Some(with_replicas(changes, placed, wish))
    })
}

/// The layout that differs only in what this model cannot have, then those with the fewest ranks, stages and expert ranks.
fn other_layout(cluster: &mut Cluster, wish: &Wish<'_>) -> Option<Vec<(String, String)>> {
    let wished = wish.spec.layout;
    let powers = |most: usize| (0..usize::BITS).map(|bits| 1usize << bits).take_while(move |power| *power <= most);
    let most_experts = if wish.facts.shape.expert_bytes.len() == wish.facts.layers { wish.facts.shape.experts.max(1) } else { 1 };
    let mut layouts: Vec<Layout> = Vec::new();
    for (tensor, pipeline) in powers(8).flat_map(|tensor| powers(wish.facts.layers).map(move |pipeline| (tensor, pipeline))) {
        layouts.extend(powers(most_experts).map(|expert| Layout { tensor, pipeline, expert }));
    }
    layouts.retain(|layout| layout.ranks() <= MAX_NEAREST_RANKS);
    layouts.sort_by_key(|layout| (layout.ranks(), layout.pipeline, layout.expert));
    let corrected = Layout { expert: nearest_expert(wished.expert, wish.facts), ..wished };
    for layout in std::iter::once(corrected).chain(layouts).filter(|layout| *layout != wished) {
        let spec = ModelServiceSpec { layout, ..wish.spec.clone() };
        if let Some((placed, _)) = fits(cluster, wish, &spec) {
            return Some(with_replicas(layout_changes(wished, layout), placed, wish));
        }
    }
    None
}

fn layout_changes(wished: Layout, layout: Layout) -> Vec<(String, String)> {
    let mut changes =
        vec![("layout.tensor".to_owned(), layout.tensor.to_string()), ("layout.pipeline".into(), layout.pipeline.to_string())];
    if (wished.expert, layout.expert) != (1, 1) {
        changes.push(("layout.expert".into(), layout.expert.to_string()));
    }
    changes
}

pub(super) fn why_not(cluster: &Cluster, wish: &Wish<'_>, plans: &[Plan]) -> Vec<(String, String)> {
    let demand = Demand::of(wish.spec, wish.facts, None);
    let need = |demand: &Demand| {
        let blocks = demand.least_blocks().unwrap_or(demand.min_blocks);
        demand.ranks.iter().map(|rank| rank.need_bytes(blocks)).min().unwrap_or(0)
    };
    let mut reasons = Vec::new();
    for node in &cluster.nodes {
        reasons.extend(node.refused.iter().map(|(device, reason)| (format!("{}/{device}", node.id), reason.clone())));
        for slot in &node.slots {
            let is_taken = plans.iter().any(|plan| plan.ranks.iter().any(|rank| rank.node == node.id && rank.device == slot.device));
            if is_taken {
                continue;
            }
            let reason = match (node.unusable, &demand) {
                (Some(reason), _) => reason.to_owned(),
                (None, Err(constraint)) => constraint.clone(),
                (None, Ok(demand)) if slot.free_bytes < need(demand) => {
                    format!("needs {} and {} is free", ByteSize(need(demand)), ByteSize(slot.free_bytes))
                }
                (None, Ok(_)) if forbidden(wish).is_some() => forbidden(wish).unwrap_or_default(),
                (None, Ok(_)) => "it fits, and others were preferred: fewer replicas on their node, or more room".to_owned(),
            };
            reasons.push((format!("{}/{}", node.id, slot.device), reason));
        }
    }
    reasons
}
