//! Builders for the tests of state, placement and control: small clusters, services and reports.
//!
//! Invariant: every helper goes through [`ClusterState::apply`], so tests see states that a log can make.

use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Applied, Command, CommandError, Envelope};
use forge_shared::cluster::event::Change;
use forge_shared::cluster::node::{DeviceInfo, DeviceKind, NodeSpec, Role};
use forge_shared::cluster::service::{ReplicaPhase, ReplicaReport, ReplicaStatus};
use forge_shared::ids::{Epoch, Incarnation, NodeId, ReplicaId, ServiceName};
use forge_shared::plan::{ModelFacts, ModelShape, RankMemory, RankPlan};
use forge_shared::spec::{ModelService, ModelServiceSpec};

use super::ClusterState;

pub(crate) const MIB: u64 = 1 << 20;

/// A state and the log it is at.
pub(crate) struct World {
    pub state: ClusterState,
    pub index: u64,
    pub now_ms: u64,
    pub changes: Vec<Change>,
}

impl World {
    pub fn new() -> Self {
        let mut state = ClusterState::new("test");
        state.level = forge_shared::version::LEVEL;
        World { state, index: 0, now_ms: 1_700_000_000_000, changes: Vec::new() }
    }

    pub fn envelope(&self, command: Command) -> Envelope {
        let request_id = format!("r{}", self.index + 1);
        Envelope { request_id, proposed_ms: self.now_ms, traceparent: String::new(), command }
    }

    pub fn run(&mut self, command: Command) -> Result<Applied, CommandError> {
        let envelope = self.envelope(command);
        self.run_envelope(&envelope)
    }

    pub fn run_envelope(&mut self, envelope: &Envelope) -> Result<Applied, CommandError> {
        self.index += 1;
        let (reply, changes) = self.state.apply(Revision(self.index), envelope);
        self.changes = changes;
        reply
    }

    pub fn join(&mut self, id: &str, incarnation: u64, devices_mib: &[u64]) -> Result<Applied, CommandError> {
        self.run(Command::JoinNode { spec: Box::new(worker(id, incarnation, devices_mib)) })
    }

    pub fn lose(&mut self, id: &str, incarnation: u64) -> Result<Applied, CommandError> {
        self.run(Command::LoseNode { node: NodeId::from(id), incarnation: Incarnation(incarnation), reason: "test".into() })
    }

    pub fn apply(&mut self, name: &str, spec: ModelServiceSpec) -> Result<Applied, CommandError> {
        self.run(Command::ApplyService { service: Box::new(service(name, spec)) })
    }

    pub fn record_facts(&mut self, name: &str, facts: ModelFacts) -> Result<Applied, CommandError> {
        let name = ServiceName::from(name);
        let generation = self.state.services()[&name].generation;
        self.run(Command::RecordFacts { name, generation, facts: Ok(Box::new(facts)) })
    }

    pub fn report(&mut self, replica: &ReplicaId, epoch: Epoch, phase: ReplicaPhase) -> Result<Applied, CommandError> {
        let node = self
            .state
            .standing_plans()
            .find(|plan| plan.replica == *replica && plan.epoch == epoch)
            .map_or_else(|| NodeId::from("nobody"), |plan| plan.ranks[0].node.clone());
        let incarnation = self.state.nodes().get(&node).map_or(Incarnation(0), |node| node.spec.incarnation);
        let status = ReplicaStatus { phase, ..ReplicaStatus::placed() };
        let report = ReplicaReport { replica: replica.clone(), epoch, status, found_memory_bytes: None };
        self.run(Command::ReportReplica { node, incarnation, report })
    }
}

pub(crate) fn id(service: &str, index: u32) -> ReplicaId {
    ReplicaId { service: ServiceName::from(service), index }
}

pub(crate) fn service(name: &str, spec: ModelServiceSpec) -> ModelService {
    let model = if spec.model.is_empty() { "a/model".to_owned() } else { spec.model.clone() };
    ModelService::new(name, ModelServiceSpec { model, ..spec })
}

pub(crate) fn worker(id: &str, incarnation: u64, devices_mib: &[u64]) -> NodeSpec {
    let devices = devices_mib.iter().enumerate().map(|(index, mib)| DeviceInfo {
        index: index as u32,
        kind: DeviceKind::Cpu,
        name: "test".into(),
        cores: 2,
        numa_node: None,
        instruction_sets: vec!["avx2".into()],
        memory_bytes: mib * MIB,
        read_bandwidth_bytes_per_s: 0,
        matrix_flops: 0,
        is_virtual: true,
        cannot_run: None,
    });
    NodeSpec {
        id: NodeId::from(id),
        role: Role::Worker,
        incarnation: Incarnation(incarnation),
        version: "1.0.0".into(),
        level: forge_shared::version::LEVEL,
        address: format!("{id}:7100"),
        metrics_address: format!("{id}:9000"),
        data_plane: None,
        devices: devices.collect(),
    }
}

pub(crate) fn gateway(id: &str, incarnation: u64) -> NodeSpec {
    NodeSpec { role: Role::Gateway, ..worker(id, incarnation, &[]) }
}

/// A model of 30 equal layers with 9 heads in 3 groups.
pub(crate) fn facts(weights_mib: u64) -> ModelFacts {
    ModelFacts {
        layers: 30,
        context_length: 8192,
        weights_bytes: weights_mib * MIB,
        kv_slot_bytes: 23_040,
        workspace_bytes: 64 * MIB,
        weights_digest: "d1".into(),
        shape: ModelShape {
            heads: 9,
            kv_heads: 3,
            experts: 0,
            hidden_size: 576,
            vocab_size: 49_152,
            embedding_bytes: weights_mib * MIB / 10,
            head_bytes: 0,
            layer_bytes: vec![weights_mib * MIB * 9 / 10 / 30; 30],
            expert_bytes: vec![],
            tensor_extra_bytes: vec![],
        },
    }
}

/// A mixture: the same, but for `experts` experts in all layers but the first, which are three quarters of a layer.
pub(crate) fn mixture(weights_mib: u64, experts: usize) -> ModelFacts {
    let mut facts = facts(weights_mib);
    facts.shape.experts = experts;
    facts.shape.expert_bytes = facts.shape.layer_bytes.iter().map(|bytes| bytes * 3 / 4).collect();
    facts.shape.expert_bytes[0] = 0;
    facts
}

/// One rank that holds everything.
pub(crate) fn whole_rank(node: &str, device: u32, layers: usize, bytes: u64) -> RankPlan {
    RankPlan {
        node: NodeId::from(node),
        device,
        tensor_rank: 0,
        tensor_size: 1,
        expert_rank: 0,
        expert_size: 1,
        layers: 0..layers,
        experts: 0..0,
        threads: 1,
        memory: RankMemory { weights_bytes: bytes, kv_bytes: 0, workspace_bytes: 0 },
    }
}
