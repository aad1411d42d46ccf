//! Time of placement: 1,000 nodes of 8 devices, 200 services, planned from nothing, and again where everything stands.
//!
//! `cargo run --release -p forge-coordinator --example bench_placement`. It prints the median and the worst of ten runs, and
//! fails where the median is above the bound that ARCHITECTURE.md names.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use forge_coordinator::placement::{self, Cluster, Placement, Wish};
use forge_shared::cluster::node::{DeviceInfo, DeviceKind, NodePhase, NodeRecord, NodeSpec, Role};
use forge_shared::ids::{Epoch, Incarnation, NodeId, ServiceName};
use forge_shared::plan::{ModelFacts, ModelShape, Plan};
use forge_shared::spec::{ByteSize, Layout, ModelServiceSpec};

const NODES: usize = 1_000;
const DEVICES: u32 = 8;
const SERVICES: usize = 200;
const RUNS: usize = 10;
const BOUND: Duration = Duration::from_millis(100);

fn node(number: usize) -> NodeRecord {
    let device = |index| DeviceInfo {
        index,
        kind: DeviceKind::Cuda,
        name: "80 GB".into(),
        cores: 132,
        numa_node: None,
        instruction_sets: Vec::new(),
        // Not all alike, so that the roomiest has to be looked for.
        memory_bytes: (72 << 30) + ((number * 7 + index as usize * 13) % 32) as u64 * (256 << 20),
        read_bandwidth_bytes_per_s: 0,
        matrix_flops: 0,
        is_virtual: false,
        cannot_run: None,
    };
    let spec = NodeSpec {
        id: NodeId(format!("node-{number:04}")),
        role: Role::Worker,
        incarnation: Incarnation(1),
        version: String::new(),
        level: forge_shared::version::LEVEL,
        address: String::new(),
        metrics_address: String::new(),
        data_plane: None,
        devices: (0..DEVICES).map(device).collect(),
    };
    NodeRecord { spec, phase: NodePhase::Ready, cordoned: false, draining: false, is_forced: false, reason: String::new(), since_ms: 0 }
}

fn facts(gib: u64) -> ModelFacts {
    let bytes = gib << 30;
    ModelFacts {
        layers: 64,
        context_length: 32_768,
        weights_bytes: bytes,
        kv_slot_bytes: 262_144,
        workspace_bytes: 1 << 30,
        weights_digest: String::new(),
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

/// One service in four is divided: tensor 2, 4 and 8, and 8 × 2 over two nodes.
fn service(number: usize) -> (ServiceName, ModelServiceSpec, ModelFacts) {
    let (gib, tensor, pipeline) = match number % 16 {
        0 => (100, 2, 1),
        4 => (200, 4, 1),
        8 => (400, 8, 1),
        12 => (800, 8, 2),
        small => (8 + small as u64, 1, 1),
    };
    let layout = Layout { tensor, pipeline, ..Layout::default() };
    let spec = ModelServiceSpec { replicas: 1 + (number % 8) as u32, layout, kv_memory: Some(ByteSize(16 << 30)), ..Default::default() };
    (ServiceName(format!("service-{number:03}")), spec, facts(gib))
}

/// All plans, and the time from the nodes' records to the last plan.
fn plan_all(
    nodes: &[NodeRecord],
    services: &[(ServiceName, ModelServiceSpec, ModelFacts)],
    standing: &[Vec<Plan>],
) -> (Vec<Vec<Plan>>, Duration) {
    let started = Instant::now();
    let mut cluster = Cluster::of_nodes(nodes.iter(), standing.iter().flatten());
    let mut plans = Vec::with_capacity(services.len());
    for (number, (name, spec, facts)) in services.iter().enumerate() {
        let stays: Vec<&Plan> = standing.get(number).into_iter().flatten().collect();
        let indices: Vec<u32> = (stays.len() as u32..spec.replicas).collect();
        let wish = Wish {
            service: name,
            spec,
            facts,
            indices: &indices,
            last_epoch: Epoch(stays.len() as u64),
            standing: &stays,
            avoided: &[],
            on_one_node: false,
        };
        let Placement { plans: placed, refusal } = placement::plan(&mut cluster, &wish);
        if let Some(refusal) = refusal {
            eprintln!("{refusal}");
        }
        plans.push(placed);
    }
    (plans, started.elapsed())
}

fn main() -> ExitCode {
    let nodes: Vec<NodeRecord> = (0..NODES).map(node).collect();
    let services: Vec<_> = (0..SERVICES).map(service).collect();
    let mut slowest = Duration::ZERO;
    let (first, _) = plan_all(&nodes, &services, &[]);
    let replicas: usize = first.iter().map(Vec::len).sum();
    let ranks: usize = first.iter().flatten().map(|plan| plan.ranks.len()).sum();
    println!("{NODES} nodes x {DEVICES} devices, {SERVICES} services, {replicas} replicas, {ranks} ranks");
    for (what, standing) in [("from nothing", Vec::new()), ("where all stands", first)] {
        let mut times: Vec<Duration> = (0..RUNS).map(|_| plan_all(&nodes, &services, &standing).1).collect();
        times.sort_unstable();
        println!("{what}: median {:.1?}, worst {:.1?} of {RUNS} runs", times[RUNS / 2], times[RUNS - 1]);
        slowest = slowest.max(times[RUNS / 2]);
    }
    if slowest < BOUND { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
