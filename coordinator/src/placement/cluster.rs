//! The cluster as placement sees it: devices and the memory that is free on them.
//!
//! Invariant: nodes are in order of their names and devices of their numbers, so that the order in which they were given
//! decides nothing; what is taken is what plans say, and never makes free memory negative.

use forge_shared::cluster::node::{DataTransport, DeviceKind, NodePhase, NodeRecord, Role};
use forge_shared::ids::NodeId;
use forge_shared::plan::{DeviceView, Plan};

use crate::state::ClusterState;

/// Devices of all workers.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    pub(super) nodes: Vec<Node>,
}

/// A worker.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub id: NodeId,
    /// Why it takes no new replicas, if so.
    pub unusable: Option<&'static str>,
    pub slots: Vec<Slot>,
    /// How it reaches other workers; absent where its ranks can share no replica with theirs.
    pub transport: Option<DataTransport>,
    /// Devices on which its worker runs nothing, and why.
    pub refused: Vec<(u32, String)>,
}

/// A device.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Slot {
    pub device: u32,
    pub kind: DeviceKind,
    pub cores: usize,
    pub free_bytes: u64,
    /// Given out beyond what the device has, where its node was found to have lied.
    pub debt_bytes: u64,
}

impl Cluster {
    /// The workers of a state, with what their replicas leave free.
    pub fn of(state: &ClusterState) -> Self {
        Self::of_nodes(state.nodes().values(), state.standing_plans())
    }

    /// The workers among `nodes`, with what `plans` leave free.
    pub fn of_nodes<'a>(nodes: impl Iterator<Item = &'a NodeRecord>, plans: impl Iterator<Item = &'a Plan>) -> Self {
        let mut cluster = Cluster { nodes: nodes.filter(|node| node.spec.role == Role::Worker).map(Node::of).collect() };
        cluster.nodes.sort_by(|a, b| a.id.cmp(&b.id));
        plans.for_each(|plan| cluster.take(plan));
        cluster
    }

    /// Devices outside any cluster.
    pub fn of_devices(devices: &[DeviceView]) -> Self {
        let mut nodes: Vec<Node> = Vec::new();
        for view in devices {
            let slot =
                Slot { device: view.device, kind: DeviceKind::Cpu, cores: view.threads, free_bytes: view.free_bytes.0, debt_bytes: 0 };
            match nodes.iter_mut().find(|node| node.id == view.node) {
                Some(node) => node.slots.push(slot),
                None => nodes.push(Node { id: view.node.clone(), unusable: None, slots: vec![slot], transport: None, refused: Vec::new() }),
            }
        }
        nodes.sort_by(|a, b| a.id.cmp(&b.id));
        nodes.iter_mut().for_each(|node| node.slots.sort_by_key(|slot| slot.device));
        Cluster { nodes }
    }

    /// Devices, usable or not.
    pub fn devices(&self) -> usize {
        self.nodes.iter().map(|node| node.slots.len() + node.refused.len()).sum()
    }

    /// Gives a plan's ranks their memory.
    pub fn take(&mut self, plan: &Plan) {
        for rank in &plan.ranks {
            let bytes = rank.memory.total_bytes();
            if let Some(slot) = self.slot_mut(&rank.node, rank.device) {
                slot.debt_bytes = slot.debt_bytes.saturating_add(bytes.saturating_sub(slot.free_bytes));
                slot.free_bytes = slot.free_bytes.saturating_sub(bytes);
            }
        }
    }

    /// Takes a plan's memory back.
    pub fn release(&mut self, plan: &Plan) {
        for rank in &plan.ranks {
            let bytes = rank.memory.total_bytes();
            if let Some(slot) = self.slot_mut(&rank.node, rank.device) {
                let owed = slot.debt_bytes.min(bytes);
                slot.debt_bytes -= owed;
                slot.free_bytes = slot.free_bytes.saturating_add(bytes - owed);
            }
        }
    }

    pub(super) fn position(&self, id: &NodeId) -> Option<usize> {
        self.nodes.binary_search_by(|node| node.id.cmp(id)).ok()
    }

    fn slot_mut(&mut self, id: &NodeId, device: u32) -> Option<&mut Slot> {
        let position = self.position(id)?;
        self.nodes[position].slots.iter_mut().find(|slot| slot.device == device)
    }
}

impl Node {
    fn of(record: &NodeRecord) -> Node {
        let unusable = match (record.phase, record.draining, record.cordoned) {
            (NodePhase::Lost, _, _) => Some("its node is lost"),
            (_, true, _) => Some("its node is being drained"),
            (_, _, true) => Some("its node is cordoned"),
            (NodePhase::Ready, false, false) => None,
        };
        let runs = record.spec.devices.iter().filter(|device| device.cannot_run.is_none());
        let slots = runs.map(|device| Slot {
            device: device.index,
            kind: device.kind,
            cores: device.cores as usize,
            free_bytes: device.memory_bytes,
            debt_bytes: 0,
        });
        let mut slots: Vec<Slot> = slots.collect();
        slots.sort_by_key(|slot| slot.device);
        let refused = record.spec.devices.iter().filter_map(|device| Some((device.index, device.cannot_run.clone()?)));
        let mut refused: Vec<(u32, String)> = refused.collect();
        refused.sort();
        let transport = record.spec.data_plane.as_ref().map(|told| told.transport);
        Node { id: record.spec.id.clone(), unusable, slots, transport, refused }
    }

    /// The roomiest device; of equals the first.
    pub fn roomiest(&self) -> Option<(usize, &Slot)> {
        self.slots.iter().enumerate().max_by(|(a_at, a), (b_at, b)| a.free_bytes.cmp(&b.free_bytes).then(b_at.cmp(a_at)))
    }
}
