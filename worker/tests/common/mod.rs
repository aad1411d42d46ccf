//! Nodes with real tiny checkpoints, for the worker's integration tests.
#![allow(dead_code)] // each test binary uses a part of it

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use forge_net::Fabric;
use forge_shared::cluster::Revision;
use forge_shared::cluster::node::{NodeSpec, Role};
use forge_shared::cluster::service::{ReplicaPhase, ReplicaReport};
use forge_shared::cluster::session::Assignment;
use forge_shared::generate::{Choice, EngineEvent, GenerateRequest, SamplingParams, TenantSalt};
use forge_shared::ids::{Epoch, Incarnation, NodeId, ReplicaId, RequestId, ServiceName};
use forge_shared::link::{EngineLink, EventStream};
use forge_shared::plan::{Plan, RankMemory, RankPlan};
use forge_shared::spec::{Layout, ModelService, ModelServiceSpec};
use forge_shared::telemetry::Metrics;
use forge_shared::tree::share;
use forge_store::ForgeHome;
use forge_worker::actors::{NodeEvent, NodeMessage};
use forge_worker::agent::RunId;
use forge_worker::inspect::inspect;
use forge_worker::ledger::{Ledger, LedgerDevice};
use forge_worker::link::ReplicaLink;
use forge_worker::machine;
use forge_worker::models::StoredModels;
use forge_worker::node::WorkerNode;
use serde_json::{Map, Value, json};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/model");
/// Everything here takes milliseconds; a test that hangs ends.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with the tiny models `llama`, `qwen2` and `mixtral`.
pub struct Models(tempfile::TempDir);

impl Models {
    pub fn new() -> Self {
        let home = tempfile::tempdir().expect("a temporary folder");
        for (name, fixture) in [("llama", "llama"), ("qwen2", "qwen2"), ("mixtral", "rows/mixtral")] {
            let folder = home.path().join(name);
            std::fs::create_dir(&folder).expect("writable");
            for file in ["config.json", "model.safetensors"] {
                std::fs::copy(Path::new(FIXTURES).join(fixture).join(file), folder.join(file)).expect("the fixture is there");
            }
            let config = std::fs::read(folder.join("config.json")).expect("readable");
            let config: Value = serde_json::from_slice(&config).expect("JSON");
            let vocab_size = config["vocab_size"].as_u64().expect("a number");
            std::fs::write(folder.join("tokenizer.json"), tokenizer(vocab_size).to_string()).expect("writable");
        }
        Models(home)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn stored(&self) -> Arc<StoredModels> {
        Arc::new(StoredModels::new(ForgeHome::at(self.0.path().join("home")), true))
    }

    /// A service over one of the models.
    pub fn service(&self, service: &str, model: &str) -> ModelService {
        let model = self.path(model).display().to_string();
        ModelService::new(service, ModelServiceSpec { model, max_batch_size: 4, max_step_tokens: 32, ..Default::default() })
    }

    /// What a leader would assign for a service on a node, after an inspection.
    pub fn assignment(&self, service: ModelService, index: u32, epoch: u64, node: &str) -> Assignment {
        let facts = inspect(&self.stored(), &service).expect("the model is usable");
        let kv_blocks = 24;
        let spec = &service.spec;
        let memory = RankMemory {
            weights_bytes: facts.weights_bytes,
            kv_bytes: facts.kv_slot_bytes * (spec.block_size * kv_blocks) as u64,
            workspace_bytes: facts.workspace_bytes,
        };
        let rank = RankPlan {
            node: NodeId::from(node),
            device: 0,
            tensor_rank: 0,
            tensor_size: 1,
            expert_rank: 0,
            expert_size: 1,
            layers: 0..facts.layers,
            experts: 0..facts.shape.experts,
            threads: 1,
            memory,
        };
        let plan = Plan {
            replica: ReplicaId { service: ServiceName(service.metadata.name.clone()), index },
            epoch: Epoch(epoch),
            max_model_len: facts.context_length,
            block_size: spec.block_size,
            kv_blocks,
            kv_cache_dtype: spec.kv_cache_dtype,
            max_step_tokens: spec.max_step_tokens,
            max_batch_size: spec.max_batch_size,
            ranks: vec![rank],
        };
        Assignment { plan, service: Box::new(service), weights_digest: facts.weights_digest, drain_ms: None, peers: Vec::new() }
    }
}

/// The same replica divided: each rank on a device of its own in turn, and with the memory that the whole had, for its share
/// is less.
pub fn divided(mut assignment: Assignment, layout: Layout, devices: u32) -> Assignment {
    let whole = assignment.plan.ranks.remove(0);
    let (layers, experts) = (whole.layers.end, whole.experts.end);
    for stage in 0..layout.pipeline {
        for (expert_rank, tensor_rank) in (0..layout.expert).flat_map(|expert| (0..layout.tensor).map(move |tensor| (expert, tensor))) {
            let number = assignment.plan.ranks.len() as u32;
            assignment.plan.ranks.push(RankPlan {
                device: number % devices,
                tensor_rank,
                tensor_size: layout.tensor,
                expert_rank,
                expert_size: layout.expert,
                layers: stage * layers / layout.pipeline..(stage + 1) * layers / layout.pipeline,
                experts: share(experts, expert_rank, layout.expert),
                memory: RankMemory { workspace_bytes: 2 * whole.memory.workspace_bytes, ..whole.memory },
                ..whole.clone()
            });
        }
    }
    assignment
}

/// One token per id.
fn tokenizer(vocab_size: u64) -> Value {
    let mut vocabulary = Map::new();
    for (id, token) in ["\u{120}".to_owned(), "<s>".into(), "</s>".into()]
        .into_iter()
        .chain((b'!'..=b'~').map(|byte| char::from(byte).to_string()))
        .enumerate()
    {
        if (id as u64) < vocab_size {
            vocabulary.insert(token, json!(id));
        }
    }
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
    json!({
        "version": "1.0",
        "added_tokens": [special(1, "<s>"), special(2, "</s>")],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "ignore_merges": false}
    })
}

/// A node with one device of so much memory.
pub struct Node {
    pub worker: WorkerNode,
    revision: u64,
}

pub fn spec(name: &str) -> NodeSpec {
    NodeSpec {
        id: NodeId::from(name),
        role: Role::Worker,
        incarnation: Incarnation(1),
        version: "test".into(),
        level: forge_shared::version::LEVEL,
        address: "127.0.0.1:1".into(),
        metrics_address: "127.0.0.1:2".into(),
        data_plane: None,
        devices: Vec::new(),
    }
}

impl Node {
    pub async fn start(name: &str, models: &Models, memory_bytes: u64) -> Self {
        Self::with_devices(name, models, &[memory_bytes]).await
    }

    /// A node with several devices on one core each, as far as the machine has them.
    pub async fn with_devices(name: &str, models: &Models, memory_bytes: &[u64]) -> Self {
        let allowed = forge_worker::threads::allowed_cores();
        let count = memory_bytes.len();
        let device = |(index, &memory_bytes): (usize, &u64)| LedgerDevice {
            index: index as u32,
            memory_bytes,
            cores: if count == 1 { Vec::new() } else { vec![allowed[index % allowed.len()]] },
            niceness: 0,
        };
        let devices = memory_bytes.iter().enumerate().map(device).collect();
        Self::with_fabric(name, models, devices, None).await
    }

    /// A node that takes part in a data plane.
    pub async fn with_fabric(name: &str, models: &Models, devices: Vec<LedgerDevice>, fabric: Option<Arc<Fabric>>) -> Self {
        let ledger = Ledger::new(devices, Box::new(machine::free_bytes));
        let worker = WorkerNode::start(&spec(name), ledger, models.stored(), fabric, Metrics::new()).await.expect("it starts");
        Node { worker, revision: 0 }
    }

    pub fn assign(&mut self, assignments: Vec<Assignment>) {
        self.revision += 1;
        let message = NodeMessage::Assign { history: "g".into(), revision: Revision(self.revision), assignments, reply: None };
        self.worker.actor.cast(message).expect("the node lives");
    }

    /// Waits until a replica's epoch reports a phase, and returns all phases it went through.
    pub async fn wait(&mut self, replica: &str, epoch: u64, phase: ReplicaPhase) -> (ReplicaReport, Vec<ReplicaPhase>) {
        let mut phases = Vec::new();
        let wanted = async {
            loop {
                let NodeEvent::Report(report) = self.worker.events.recv().await.expect("the node lives") else { continue };
                if report.replica.to_string() != replica || report.epoch != Epoch(epoch) {
                    continue;
                }
                if phases.last() != Some(&report.status.phase) {
                    phases.push(report.status.phase);
                }
                if report.status.phase == phase {
                    return *report;
                }
                assert_ne!(report.status.phase, ReplicaPhase::Failed, "{report:?}");
            }
        };
        let report = tokio::time::timeout(PATIENCE, wanted).await.unwrap_or_else(|_| panic!("{replica} is never {phase:?}"));
        (report, phases)
    }

    pub fn link(&self, replica: &str, epoch: u64) -> Arc<ReplicaLink> {
        self.worker.board.get(&RunId { replica: replica.into(), epoch: Epoch(epoch) }).expect("it is on the board")
    }
}

pub fn request(prompt: &[u32], max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        id: RequestId::from("test"),
        tenant: TenantSalt::anonymous(),
        prompt_tokens: prompt.into(),
        choices: vec![Choice { index: 0, emitted_tokens: Vec::new() }],
        seed: 7,
        params: SamplingParams { temperature: 0.8, max_tokens, ignore_eos: true, ..SamplingParams::default() },
        priority: 0,
    }
}

/// All tokens of an answer.
pub async fn tokens(mut stream: EventStream) -> Vec<u32> {
    let mut tokens = Vec::new();
    let all = async {
        while let Some(event) = stream.recv().await {
            match event {
                EngineEvent::Token(token) => tokens.push(token.token),
                EngineEvent::Failed { reason, .. } => panic!("{reason}"),
                _ => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, all).await.expect("it ends");
    tokens
}

pub async fn generate(link: &dyn EngineLink, prompt: &[u32], max_tokens: u32) -> Vec<u32> {
    tokens(link.submit(request(prompt, max_tokens)).await.expect("admitted")).await
}

/// Waits until something holds.
pub async fn until(what: &str, holds: impl Fn() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}
