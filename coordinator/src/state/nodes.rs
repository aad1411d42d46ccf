//! Nodes: joining, loss, cordon and drain.
//!
//! Invariant: a node is known under its newest incarnation alone; a replica stands only on ready nodes, since a node's
//! loss or return closes the epochs that it had a rank of.

use forge_shared::cluster::command::{Command, CommandError};
use forge_shared::cluster::event::{Change, Kind, Object};
use forge_shared::cluster::node::{NodePhase, NodeRecord, NodeSpec, Role};
use forge_shared::ids::{Incarnation, NodeId, ServiceName};
use forge_shared::spec::ByteSize;
use serde::{Deserialize, Serialize};

use super::notices::Weight;
use super::{ClusterState, Effect, MAX_DEVICES, MAX_NODES, MAX_REASON_BYTES, MAX_REMOVED_NODES, Step, checks};

/// What is kept of a node that was removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RemovedNode {
    pub incarnation: Incarnation,
    /// Index of the entry that removed it.
    pub removed_at: u64,
}

impl ClusterState {
    pub(super) fn join_node(&mut self, spec: &NodeSpec, step: &mut Step) -> Result<Effect, CommandError> {
        check_spec(spec)?;
        self.check_build(spec.role, &spec.id.0, &spec.build())?;
        let stale = |known: Incarnation| CommandError::Stale {
            reason: format!(
                "node {} is known in incarnation {}, and this is {}: a newer process runs under this name; stop one of the two",
                spec.id, known.0, spec.incarnation.0
            ),
        };
        if let Some(removed) = self.removed_nodes.get(&spec.id)
            && spec.incarnation <= removed.incarnation
        {
            let reason = format!("node {} was removed; start it anew to let it in again", spec.id);
            return Err(CommandError::Stale { reason });
        }
        let mut record = NodeRecord {
            spec: spec.clone(),
            phase: NodePhase::Ready,
            cordoned: false,
            draining: false,
            is_forced: false,
            reason: String::new(),
            since_ms: self.clock.latest_ms(),
        };
        let is_again = match self.nodes.get(&spec.id) {
            None => {
                checks::bounded("nodes", self.nodes.len(), MAX_NODES)?;
                false
            }
            Some(known) if known.spec.role != spec.role => {
                let reason = format!("it is a {}; give this {} another name, or remove the old node first", known.spec.role, spec.role);
                return Err(conflict(&spec.id, reason));
            }
            Some(known) if spec.incarnation < known.spec.incarnation => return Err(stale(known.spec.incarnation)),
            Some(known) if spec.incarnation == known.spec.incarnation => {
                if known.phase == NodePhase::Ready {
                    if known.spec.address != spec.address {
                        let reason = format!(
                            "a process of the same incarnation lives at {}: two nodes share one name and data directory",
                            known.spec.address
                        );
                        return Err(conflict(&spec.id, reason));
                    }
                    // It could not be written down before all processes knew of it.
                    if known.spec.data_plane != spec.data_plane {
                        self.node_mut(&spec.id)?.spec.data_plane = spec.data_plane.clone();
                        self.put_node(&spec.id, step);
                        return Ok(Effect::CHANGED);
                    }
                    return Ok(Effect::NONE);
                }
                keep_beliefs(&mut record, known);
                true
            }
            Some(known) => {
                keep_duty(&mut record, known);
                true
            }
        };
        self.removed_nodes.remove(&spec.id);
        self.close_replicas_of(&spec.id, "its node began anew", step);
        self.nodes.insert(spec.id.clone(), record);
        self.put_node(&spec.id, step);
        let (reason, verb) = if is_again { ("NodeReturned", "returned") } else { ("NodeJoined", "joined") };
        let message = format!("{} {} {verb} in incarnation {}, at {}", spec.role, spec.id, spec.incarnation.0, spec.address);
        self.notice(step, Weight::Normal, reason, about(&spec.id), message);
        Ok(Effect::CHANGED)
    }

    pub(super) fn lose_node(
        &mut self,
        id: &NodeId,
        incarnation: Incarnation,
        reason: &str,
        step: &mut Step,
    ) -> Result<Effect, CommandError> {
        let known = self.node_mut(id)?;
        if incarnation > known.spec.incarnation {
            let reason = format!("node {id} is known in incarnation {} only", known.spec.incarnation.0);
            return Err(CommandError::Stale { reason });
        }
        if incarnation < known.spec.incarnation || known.phase == NodePhase::Lost {
            return Ok(Effect::NONE);
        }
        let reason = checks::cut(reason, MAX_REASON_BYTES);
        known.phase = NodePhase::Lost;
        known.reason = reason.clone();
        let latest_ms = self.clock.latest_ms();
        self.node_mut(id)?.since_ms = latest_ms;
        self.close_replicas_of(id, "its node is lost", step);
        self.put_node(id, step);
        self.notice(step, Weight::Warning, "NodeLost", about(id), format!("node {id} is lost: {reason}"));
        Ok(Effect::CHANGED)
    }

    /// Whether a command that keeps replicas off a node makes sense for it. Asked before the command is in the log: there,
    /// every build must do the same.
    ///
    /// # Errors
    /// [`CommandError::Invalid`] for a gateway, which has no replicas, with what to do instead.
    pub(crate) fn check_duty(&self, command: &Command) -> Result<(), CommandError> {
        let (node, verb) = match command {
            Command::CordonNode { node, cordoned: true } => (node, "cordoned"),
            Command::DrainNode { node, draining: true, .. } => (node, "drained"),
            _ => return Ok(()),
        };
        match self.nodes.get(node).map(|known| known.spec.role) {
            Some(Role::Gateway) => checks::invalid(
                "node",
                format!(
                    "{node} is a gateway, and only workers are {verb}, for they have replicas: take it out of your load balancer and stop \
                     its process with SIGTERM, which finishes its requests first"
                ),
            ),
            _ => Ok(()),
        }
    }

    pub(super) fn cordon_node(&mut self, id: &NodeId, cordoned: bool, step: &mut Step) -> Result<Effect, CommandError> {
        let known = self.node_mut(id)?;
        // To take replicas again is also to stop moving them away.
        let draining = known.draining && cordoned;
        let is_forced = known.is_forced && draining;
        self.set_duty(id, (cordoned, draining, is_forced), step)
    }

    pub(super) fn drain_node(&mut self, id: &NodeId, draining: bool, is_forced: bool, step: &mut Step) -> Result<Effect, CommandError> {
        self.node_mut(id)?;
        self.set_duty(id, (draining, draining, is_forced && draining), step)
    }

    /// `duty`: whether it is cordoned, draining, and that by force.
    fn set_duty(&mut self, id: &NodeId, duty: (bool, bool, bool), step: &mut Step) -> Result<Effect, CommandError> {
        let known = self.node_mut(id)?;
        if (known.cordoned, known.draining, known.is_forced) == duty {
            return Ok(Effect::NONE);
        }
        (known.cordoned, known.draining, known.is_forced) = duty;
        self.put_node(id, step);
        let (reason, message) = match duty {
            (_, true, false) => {
                ("NodeDraining", "is drained: its replicas move away; those with room nowhere else serve on until there is")
            }
            (_, true, true) => ("NodeDraining", "is drained by force: its replicas move away, or end where there is room nowhere else"),
            (true, false, _) => ("NodeCordoned", "takes no new replicas"),
            (false, false, _) => ("NodeUncordoned", "takes replicas again"),
        };
        self.notice(step, Weight::Normal, reason, about(id), format!("node {id} {message}"));
        Ok(Effect::CHANGED)
    }

    pub(super) fn remove_node(&mut self, id: &NodeId, step: &mut Step) -> Result<Effect, CommandError> {
        let known = self.node_mut(id)?;
        if known.phase != NodePhase::Lost {
            let reason = "it lives: `forgectl drain` it, stop its process, and delete it then".to_owned();
            return Err(conflict(id, reason));
        }
        let removed = RemovedNode { incarnation: known.spec.incarnation, removed_at: step.index.0 };
        // A gateway runs no epoch that could be served twice: one that was only cut off may come back as it is.
        let is_fenced = known.spec.role == Role::Worker;
        self.nodes.remove(id);
        if is_fenced {
            self.removed_nodes.insert(id.clone(), removed);
        }
        if self.removed_nodes.len() > MAX_REMOVED_NODES {
            let oldest = self.removed_nodes.iter().min_by_key(|(_, removed)| removed.removed_at).map(|(id, _)| id.clone());
            oldest.map(|oldest| self.removed_nodes.remove(&oldest));
        }
        step.moves = true;
        step.changes.push(Change::Deleted { kind: Kind::Node, name: id.0.clone() });
        self.notice(step, Weight::Normal, "NodeRemoved", about(id), format!("node {id} was removed"));
        Ok(Effect::CHANGED)
    }

    /// A node is believed to have no more memory than was found on some of its devices.
    pub(super) fn believe_memory(&mut self, id: &NodeId, devices: &[u32], found_bytes: u64, step: &mut Step) -> bool {
        let Some(known) = self.nodes.get_mut(id) else { return false };
        let mut corrected = Vec::new();
        for device in known.spec.devices.iter_mut().filter(|device| devices.contains(&device.index)) {
            if found_bytes < device.memory_bytes {
                corrected.push(format!("device {} has {}, not {}", device.index, ByteSize(found_bytes), ByteSize(device.memory_bytes)));
                device.memory_bytes = found_bytes;
            }
        }
        if corrected.is_empty() {
            return false;
        }
        self.put_node(id, step);
        let message = format!("node {id} has less memory than it said: {}", corrected.join(", "));
        self.notice(step, Weight::Warning, "MemoryCorrected", about(id), message);
        true
    }

    /// Ends every replica with a rank on a node, at once.
    fn close_replicas_of(&mut self, id: &NodeId, why: &str, step: &mut Step) {
        let is_on = |plan: &forge_shared::plan::Plan| plan.ranks.iter().any(|rank| rank.node == *id);
        let hit: Vec<ServiceName> = self
            .services
            .iter()
            .filter(|(_, service)| {
                service.replicas.iter().chain(service.leaving.iter().map(|leaving| &leaving.replica)).any(|replica| is_on(&replica.plan))
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in hit {
            let Some(mut service) = self.services.get(&name).cloned() else { continue };
            for replica in service.replicas.iter().filter(|replica| is_on(&replica.plan)) {
                let message = format!("replica {} of epoch {} ended: {why} ({id})", replica.plan.replica, replica.plan.epoch);
                self.notice(step, Weight::Warning, "ReplicaLost", format!("replica/{}", replica.plan.replica), message);
            }
            service.replicas.retain(|replica| !is_on(&replica.plan));
            service.leaving.retain(|leaving| !is_on(&leaving.replica.plan));
            self.put_service(name, service, step);
        }
    }

    fn node_mut(&mut self, id: &NodeId) -> Result<&mut NodeRecord, CommandError> {
        if !self.nodes.contains_key(id) {
            return Err(checks::not_found("node", &id.0, self.nodes.keys().map(|known| known.0.as_str())));
        }
        self.nodes.get_mut(id).ok_or_else(|| checks::not_found("node", &id.0, std::iter::empty()))
    }

    fn put_node(&self, id: &NodeId, step: &mut Step) {
        if let Some(node) = self.nodes.get(id) {
            step.moves = true;
            step.changes.push(Change::Put { object: Object::Node(Box::new(node.clone())) });
        }
    }
}

/// What was found of a process's devices stays true when it comes back.
fn keep_beliefs(record: &mut NodeRecord, known: &NodeRecord) {
    keep_duty(record, known);
    for device in &mut record.spec.devices {
        let believed = known.spec.devices.iter().find(|believed| believed.index == device.index);
        device.memory_bytes = believed.map_or(device.memory_bytes, |believed| believed.memory_bytes.min(device.memory_bytes));
    }
}

/// What an operator said of a node is of its name, not of its process.
fn keep_duty(record: &mut NodeRecord, known: &NodeRecord) {
    (record.cordoned, record.draining, record.is_forced) = (known.cordoned, known.draining, known.is_forced);
}

fn about(id: &NodeId) -> String {
    format!("node/{id}")
}

fn conflict(id: &NodeId, reason: String) -> CommandError {
    CommandError::Conflict { kind: "node".into(), name: id.0.clone(), reason }
}

fn check_spec(spec: &NodeSpec) -> Result<(), CommandError> {
    checks::label("spec.id", &spec.id.0)?;
    if !matches!(spec.role, Role::Worker | Role::Gateway) {
        return checks::invalid("spec.role", format!("a {} is no node: workers and gateways are", spec.role));
    }
    if spec.incarnation.0 == 0 {
        return checks::invalid("spec.incarnation", "must be at least 1");
    }
    checks::address("spec.address", &spec.address)?;
    if !spec.metrics_address.is_empty() {
        checks::address("spec.metricsAddress", &spec.metrics_address)?;
    }
    if let Some(data_plane) = &spec.data_plane {
        checks::address("spec.dataPlane.address", &data_plane.address)?;
        if spec.role == Role::Gateway {
            return checks::invalid("spec.dataPlane", "a gateway has none");
        }
    }
    if spec.role == Role::Gateway && !spec.devices.is_empty() {
        return checks::invalid("spec.devices", "a gateway has none");
    }
    if spec.devices.len() > MAX_DEVICES {
        return checks::invalid("spec.devices", format!("has {} devices, at most {MAX_DEVICES}", spec.devices.len()));
    }
    for (position, device) in spec.devices.iter().enumerate() {
        checks::text("spec.devices.name", &device.name, 256)?;
        if spec.devices[..position].iter().any(|other| other.index == device.index) {
            return checks::invalid("spec.devices.index", format!("device {} is there twice", device.index));
        }
        if device.instruction_sets.len() > 64 {
            return checks::invalid("spec.devices.instructionSets", "has more than 64 entries");
        }
        device.instruction_sets.iter().try_for_each(|set| checks::text("spec.devices.instructionSets", set, 64))?;
        // Sums over devices and replicas must not overflow.
        if device.memory_bytes > 1 << 50 {
            return checks::invalid("spec.devices.memoryBytes", "is more than a pebibyte");
        }
    }
    Ok(())
}
