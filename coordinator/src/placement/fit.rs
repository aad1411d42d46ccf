//! Which devices a replica takes, and how much KV memory its ranks get there.
//!
//! Ranks are divided only among workers whose data planes reach each other. Preferences, in order: the node with the fewest replicas of the service; one node for all ranks, each on a device of its
//! own; devices of several nodes, stage by stage; devices shared by several ranks; always the roomier.
//!
//! Invariant: what is chosen has free memory for every rank's weights, workspace and KV blocks together.

use std::cmp::Reverse;

use forge_shared::cluster::node::{DataTransport, DeviceKind};
use forge_shared::plan::RankMemory;
use forge_shared::spec::Layout;

use super::cluster::{Cluster, Node};
use super::demand::{Demand, RankDemand};

/// KV memory when the operator names none, on a machine's main memory: at most this share of what is free after weights …
const CPU_KV_SHARE: f64 = 0.5;
/// … and at most this much, so that a laptop keeps breathing.
const CPU_KV_BYTES_MAX: u64 = 4 << 30;
/// On a GPU, which does nothing else.
const GPU_KV_SHARE: f64 = 0.9;

/// A device by its positions in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub node: usize,
    pub slot: usize,
}

/// Sizes of a placed replica.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Budget {
    pub max_model_len: usize,
    pub kv_blocks: u64,
    /// Per rank.
    pub memory: Vec<RankMemory>,
}

/// Where replicas of the service are, and where the next may not be.
pub(super) struct Spread<'a> {
    /// Replicas of the service per node.
    pub counts: &'a [u32],
    /// Nodes that this replica must not be on.
    pub avoided: &'a [usize],
    /// Whether its ranks may not be divided among nodes.
    pub on_one_node: bool,
}

/// A device for each rank, or `None` where they do not fit.
pub(super) fn choose(cluster: &Cluster, demand: &Demand, spread: &Spread<'_>) -> Option<Vec<Place>> {
    let blocks = demand.least_blocks()?;
    let needs: Vec<u64> = demand.ranks.iter().map(|rank| rank.need_bytes(blocks)).collect();
    if let [need] = needs.as_slice() {
        return choose_one(cluster, *need, spread).map(|place| vec![place]);
    }
    let candidates: Vec<usize> = {
        let usable = |at: &usize| cluster.nodes[*at].unusable.is_none() && !spread.avoided.contains(at);
        let mut candidates: Vec<usize> = (0..cluster.nodes.len()).filter(usable).collect();
        candidates.sort_by_cached_key(|&at| (spread.counts[at], Reverse(free_bytes(&cluster.nodes[at])), at));
        candidates
    };
    // Only workers that speak to each other share a replica.
    let several = |choose: &dyn Fn(&[usize]) -> Option<Vec<Place>>| {
        let of = |transport: DataTransport| -> Vec<usize> {
            candidates.iter().copied().filter(|&at| cluster.nodes[at].transport == Some(transport)).collect()
        };
        let kinds = [DataTransport::Quic, DataTransport::Tcp];
        kinds.into_iter().filter(|_| !spread.on_one_node).find_map(|transport| choose(&of(transport)))
    };
    candidates
        .iter()
        .find_map(|&at| distinct(&cluster.nodes[at], at, &needs, &[]))
        .or_else(|| several(&|nodes| across(cluster, demand.layout, &needs, nodes)))
        .or_else(|| candidates.iter().find_map(|&at| shared(cluster, &needs, &[at])))
        .or_else(|| several(&|nodes| shared(cluster, &needs, nodes)))
}

fn choose_one(cluster: &Cluster, need_bytes: u64, spread: &Spread<'_>) -> Option<Place> {
    let mut best: Option<(u32, u64, Place)> = None;
    for (at, node) in cluster.nodes.iter().enumerate() {
        if node.unusable.is_some() || best.is_some_and(|(count, ..)| count < spread.counts[at]) {
            continue;
        }
        let Some((slot, device)) = node.roomiest().filter(|(_, device)| device.free_bytes >= need_bytes) else { continue };
        let is_better = best.is_none_or(|(count, free_bytes, _)| spread.counts[at] < count || device.free_bytes > free_bytes);
        if is_better && !spread.avoided.contains(&at) {
            best = Some((spread.counts[at], device.free_bytes, Place { node: at, slot }));
        }
    }
    best.map(|(_, _, place)| place)
}

fn free_bytes(node: &Node) -> u64 {
    node.slots.iter().fold(0, |sum, slot| sum.saturating_add(slot.free_bytes))
}

/// Each rank on a device of its own, all of one node: the hungriest rank on the roomiest device.
fn distinct(node: &Node, at: usize, needs: &[u64], taken: &[Place]) -> Option<Vec<Place>> {
    let is_free = |slot: &usize| !taken.contains(&Place { node: at, slot: *slot });
    let mut slots: Vec<usize> = (0..node.slots.len()).filter(is_free).collect();
    if slots.len() < needs.len() {
        return None;
    }
    slots.sort_by_key(|&slot| (Reverse(node.slots[slot].free_bytes), slot));
    let mut places = vec![Place { node: at, slot: 0 }; needs.len()];
    for (&rank, &slot) in by_need(needs).iter().zip(&slots) {
        if node.slots[slot].free_bytes < needs[rank] {
            return None;
        }
        places[rank].slot = slot;
    }
    Some(places)
}

/// Ranks, the hungriest first.
fn by_need(needs: &[u64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..needs.len()).collect();
    order.sort_by_key(|&rank| (Reverse(needs[rank]), rank));
    order
}

/// Devices of several nodes, each taken once; a stage's ranks on one node where that is possible, else those that share
/// its sums.
fn across(cluster: &Cluster, layout: Layout, needs: &[u64], candidates: &[usize]) -> Option<Vec<Place>> {
    let devices: usize = candidates.iter().map(|&at| cluster.nodes[at].slots.len()).sum();
    if devices < needs.len() {
        return None;
    }
    let mut places: Vec<Place> = Vec::with_capacity(needs.len());
    // Nodes in use come first, so that a replica is on few.
    let mut order = candidates.to_vec();
    for stage in needs.chunks(layout.stage_ranks().max(1)) {
        if on_one_node(cluster, stage, &mut order, &mut places) {
            continue;
        }
        for group in stage.chunks(layout.tensor.max(1)) {
            if on_one_node(cluster, group, &mut order, &mut places) {
                continue;
            }
            for need in group {
                let place = roomiest(cluster, &order, |place| !places.contains(&place), |place| free_at(cluster, place))?;
                if free_at(cluster, place) < *need {
                    return None;
                }
                places.push(place);
            }
        }
    }
    Some(places)
}

/// Adds a place for each of these ranks, all on the first node that takes them, which then comes first.
fn on_one_node(cluster: &Cluster, needs: &[u64], order: &mut [usize], places: &mut Vec<Place>) -> bool {
    let whole = order.iter().enumerate().find_map(|(position, &at)| Some((position, distinct(&cluster.nodes[at], at, needs, places)?)));
    let Some((position, chosen)) = whole else { return false };
    places.extend(chosen);
    order[..=position].rotate_right(1);
    true
}

/// Several ranks may share a device: the hungriest first, each on what is roomiest by then.
fn shared(cluster: &Cluster, needs: &[u64], candidates: &[usize]) -> Option<Vec<Place>> {
    let mut given: Vec<(Place, u64)> = Vec::new();
    let mut places = vec![Place { node: 0, slot: 0 }; needs.len()];
    for rank in by_need(needs) {
        let left = |place: Place| {
            let used = given.iter().filter(|(other, _)| *other == place).fold(0u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
            free_at(cluster, place).saturating_sub(used)
        };
        let place = roomiest(cluster, candidates, |_| true, left)?;
        if left(place) < needs[rank] {
            return None;
        }
        given.push((place, needs[rank]));
        places[rank] = place;
    }
    Some(places)
}

fn roomiest(cluster: &Cluster, candidates: &[usize], may: impl Fn(Place) -> bool, left: impl Fn(Place) -> u64) -> Option<Place> {
    let mut best: Option<(u64, Place)> = None;
    for &node in candidates {
        for slot in 0..cluster.nodes[node].slots.len() {
            let place = Place { node, slot };
            if may(place) && best.is_none_or(|(bytes, _)| left(place) > bytes) {
                best = Some((left(place), place));
            }
        }
    }
    best.map(|(_, place)| place)
}

fn free_at(cluster: &Cluster, place: Place) -> u64 {
    cluster.nodes[place.node].slots[place.slot].free_bytes
}

/// How many KV blocks, the same on every rank, and what context they make.
pub(super) fn budget(cluster: &Cluster, demand: &Demand, places: &[Place]) -> Option<Budget> {
    let mut blocks = u64::MAX;
    for (position, &place) in places.iter().enumerate() {
        if places[..position].contains(&place) {
            continue;
        }
        let here = || demand.ranks.iter().zip(places).filter(|(_, other)| **other == place).map(|(rank, _)| rank);
        let fixed_bytes = here().map(RankDemand::fixed_bytes).fold(0, u64::saturating_add);
        // A rank without a head stores no keys.
        let block_bytes = here().map(|rank| rank.block_bytes).fold(0, u64::saturating_add).max(1);
        let slot = &cluster.nodes[place.node].slots[place.slot];
        let left_bytes = slot.free_bytes.checked_sub(fixed_bytes)?;
        let most = left_bytes / block_bytes;
        blocks = blocks.min(match demand.stated_blocks {
            Some(stated) if stated > most => return None,
            Some(stated) => stated,
            None => {
                let modest = modest_bytes(slot.kind, left_bytes) / block_bytes;
                // One full context is worth more than the default's modesty.
                modest.min(demand.full_blocks).max(demand.context_blocks.min(most))
            }
        });
    }
    if blocks < demand.min_blocks {
        return None;
    }
    let longest = usize::try_from(blocks.saturating_mul(demand.block_size as u64)).unwrap_or(usize::MAX);
    let max_model_len = if demand.is_len_stated { demand.wanted_len } else { demand.wanted_len.min(longest) };
    let memory = demand.ranks.iter().map(|rank| RankMemory {
        weights_bytes: rank.weights_bytes,
        kv_bytes: blocks.saturating_mul(rank.block_bytes),
        workspace_bytes: rank.workspace_bytes,
    });
    Some(Budget { max_model_len, kv_blocks: blocks, memory: memory.collect() })
}

fn modest_bytes(kind: DeviceKind, left_bytes: u64) -> u64 {
    match kind {
        DeviceKind::Cpu => ((left_bytes as f64 * CPU_KV_SHARE) as u64).min(CPU_KV_BYTES_MAX),
        DeviceKind::Cuda | DeviceKind::Metal => (left_bytes as f64 * GPU_KV_SHARE) as u64,
    }
}
