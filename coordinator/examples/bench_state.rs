//! What a snapshot of a large cluster's state costs: `cargo run --release -p forge-coordinator --example bench_state`.
//!
//! 1,000 nodes of 8 devices, 200 services of 16 replicas that are ready, 10,000 keys and as many idempotency records, all made
//! by commands. Prints medians of ten runs, and what the first command of a kind costs while a copy for a snapshot is held: the
//! part that it changes is copied then.

use std::time::{Duration, Instant};

use forge_coordinator::placement::{self, Cluster, Placement, Wish};
use forge_coordinator::state::ClusterState;
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{ApiKeyRecord, Command, Envelope, IdempotencyRecord, PlannedReplica};
use forge_shared::cluster::node::{DeviceInfo, DeviceKind, NodeSpec, Role};
use forge_shared::cluster::service::{ReplicaPhase, ReplicaReport, ReplicaStatus};
use forge_shared::ids::{Incarnation, NodeId, ServiceName};
use forge_shared::plan::{ModelFacts, ModelShape};
use forge_shared::spec::{ByteSize, ModelService, ModelServiceSpec};

const NODES: usize = 1_000;
const SERVICES: usize = 200;
const REPLICAS: u32 = 16;
const RECORDS: usize = 10_000;
const RUNS: usize = 10;
const NOW_MS: u64 = 1_700_000_000_000;

type Failure = Box<dyn std::error::Error + Send + Sync>;

struct World {
    state: ClusterState,
    index: u64,
    slowest: (Duration, &'static str),
}

impl World {
    fn run(&mut self, what: &'static str, command: Command) -> Result<(), Failure> {
        self.index += 1;
        let envelope =
            Envelope { request_id: format!("request-{:032x}", self.index), proposed_ms: NOW_MS, traceparent: String::new(), command };
        let began = Instant::now();
        let (reply, _) = self.state.apply(Revision(self.index), &envelope);
        self.slowest = self.slowest.max((began.elapsed(), what));
        reply?;
        Ok(())
    }
}

fn node(number: usize) -> NodeSpec {
    let device = |index| DeviceInfo {
        index,
        kind: DeviceKind::Cuda,
        name: "NVIDIA H100 80GB HBM3".into(),
        cores: 132,
        numa_node: Some(index / 4),
        instruction_sets: vec!["sm_90".into()],
        memory_bytes: 80 << 30,
        read_bandwidth_bytes_per_s: 3_000_000_000_000,
        matrix_flops: 900_000_000_000_000,
        is_virtual: false,
        cannot_run: None,
    };
    NodeSpec {
        id: NodeId(format!("node-{number:04}")),
        role: Role::Worker,
        incarnation: Incarnation(1),
        version: "1.0.0".into(),
        level: forge_shared::version::LEVEL,
        address: format!("node-{number:04}.example:7100"),
        metrics_address: format!("node-{number:04}.example:9000"),
        data_plane: None,
        devices: (0..8).map(device).collect(),
    }
}

fn facts() -> ModelFacts {
    let bytes = 15 << 30;
    ModelFacts {
        layers: 64,
        context_length: 32_768,
        weights_bytes: bytes,
        kv_slot_bytes: 262_144,
        workspace_bytes: 1 << 30,
        weights_digest: format!("sha256:{}", "a".repeat(64)),
        shape: ModelShape {
            heads: 64,
            kv_heads: 8,
            experts: 0,
            hidden_size: 8_192,
            vocab_size: 128_256,
            embedding_bytes: bytes / 66,
            head_bytes: bytes / 66,
            layer_bytes: vec![bytes / 66; 64],
            expert_bytes: Vec::new(),
            tensor_extra_bytes: Vec::new(),
        },
    }
}

fn fill() -> Result<World, Failure> {
    let mut world = World { state: ClusterState::new("bench"), index: 0, slowest: (Duration::ZERO, "") };
    for number in 0..NODES {
        world.run("joinNode", Command::JoinNode { spec: Box::new(node(number)) })?;
    }
    for number in 0..SERVICES {
        let name = ServiceName(format!("service-{number:03}"));
        let spec = ModelServiceSpec {
            model: "an/example-model".into(),
            replicas: REPLICAS,
            kv_memory: Some(ByteSize(8 << 30)),
            ..Default::default()
        };
        world.run("applyService", Command::ApplyService { service: Box::new(ModelService::new(&name.0, spec)) })?;
        world.run("recordFacts", Command::RecordFacts { name: name.clone(), generation: 1, facts: Ok(Box::new(facts())) })?;
        let record = world.state.services().get(&name).ok_or("no such service")?.clone();
        let mut cluster = Cluster::of_nodes(world.state.nodes().values(), world.state.standing_plans());
        let wish = Wish {
            service: &name,
            spec: &record.service.spec,
            facts: &facts(),
            indices: &(0..REPLICAS).collect::<Vec<_>>(),
            last_epoch: record.last_epoch,
            standing: &[],
            avoided: &[],
            on_one_node: true,
        };
        let Placement { plans, refusal } = placement::plan(&mut cluster, &wish);
        if let Some(refusal) = refusal {
            return Err(Box::new(refusal));
        }
        let (basis, generation) = (world.state.revision(), record.generation);
        let planned = plans.iter().map(|plan| PlannedReplica { plan: plan.clone(), generation }).collect();
        world.run(
            "commitPlans",
            Command::CommitPlans { basis, plans: planned, removed: Vec::new(), refusals: Vec::new(), settled: Vec::new() },
        )?;
        for plan in plans {
            let status =
                ReplicaStatus { phase: ReplicaPhase::Ready, numerics_id: format!("cpu:{}", "b".repeat(64)), ..ReplicaStatus::placed() };
            let report = ReplicaReport { replica: plan.replica, epoch: plan.epoch, status, found_memory_bytes: None };
            let node = plan.ranks.first().ok_or("no rank")?.node.clone();
            world.run("reportReplica", Command::ReportReplica { node, incarnation: Incarnation(1), report })?;
        }
    }
    for number in 0..RECORDS {
        let key = ApiKeyRecord {
            id: format!("{number:08x}"),
            name: format!("key-{number}"),
            created_s: NOW_MS / 1000,
            revoked_s: None,
            rpm: Some(600),
            tpm: Some(100_000),
            salt: "c".repeat(32),
            hash: "d".repeat(64),
        };
        world.run("putKey", Command::PutKey { key: Box::new(key) })?;
        let record = IdempotencyRecord {
            tenant: format!("{:08x}", number % 100),
            key: format!("{number:036}"),
            body_sha256: "e".repeat(64),
            clock_s: NOW_MS / 1000,
            numerics_id: format!("cpu:{}", "b".repeat(64)),
            expires_ms: NOW_MS + 3_600_000,
        };
        world.run("recordIdempotency", Command::RecordIdempotency { record })?;
    }
    Ok(world)
}

fn median<T>(what: &str, mut run: impl FnMut() -> T) {
    let mut taken = Vec::new();
    for _ in 0..RUNS {
        let began = Instant::now();
        let made = run();
        taken.push(began.elapsed());
        drop(made);
    }
    taken.sort();
    println!("{what}: {:.1?} (median), {:.1?} (worst of {RUNS})", taken[RUNS / 2], taken[RUNS - 1]);
}

/// The first command of each kind after a copy was made, which still stands.
fn first_changes(world: &mut World) -> Result<(), Failure> {
    for (what, command) in [
        ("joinNode", Command::JoinNode { spec: Box::new(node(NODES)) }),
        ("cordonNode", Command::CordonNode { node: NodeId("node-0000".into()), cordoned: true }),
        ("scaleService", Command::ScaleService { name: ServiceName("service-000".into()), replicas: REPLICAS - 1 }),
        ("revokeKey", Command::RevokeKey { name: "key-0".into() }),
        ("removeNode", Command::RemoveNode { node: NodeId("nobody".into()) }),
    ] {
        let mut taken = Vec::new();
        for run in 0..RUNS {
            world.index += 1;
            let request_id = format!("change-{what}-{run}");
            let envelope = Envelope { request_id, proposed_ms: NOW_MS, traceparent: String::new(), command: command.clone() };
            let mut copy = world.state.clone();
            let began = Instant::now();
            drop(copy.apply(Revision(world.index), &envelope));
            taken.push(began.elapsed());
        }
        taken.sort();
        println!("{what} while a copy is held: {:.1?} (median), {:.1?} (worst of {RUNS})", taken[RUNS / 2], taken[RUNS - 1]);
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    let mut world = fill()?;
    let state = &world.state;
    let bytes = state.encode();
    println!("{NODES} nodes, {SERVICES} services x {REPLICAS}, {RECORDS} keys, {RECORDS} idempotency records: {} bytes", bytes.len());
    println!("slowest of {} entries to apply: {:.1?} ({})", world.index, world.slowest.0, world.slowest.1);
    median("encoded", || state.encode());
    median("copied", || state.clone());
    median("decoded", || ClusterState::decode(&bytes));
    first_changes(&mut world)
}
