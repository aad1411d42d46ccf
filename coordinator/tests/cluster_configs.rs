//! The GPU examples under `cluster-configs/` are planned: their declared devices take a model of 70 billion parameters.

use std::collections::BTreeSet;
use std::path::Path;

use forge_cluster::config::{WorkerConfig, load};
use forge_coordinator::control::plan_service;
use forge_coordinator::state::ClusterState;
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Command, Envelope};
use forge_shared::cluster::node::{DataPlane, NodeSpec, Role};
use forge_shared::ids::{Incarnation, NodeId};
use forge_shared::plan::{ModelFacts, ModelShape};
use forge_shared::spec::{Layout, ModelService, ModelServiceSpec};

const DEVICE_BYTES: u64 = 80 << 30;

fn cluster(folder: &str, workers: usize) -> ClusterState {
    let mut state = ClusterState::new("example");
    let mut apply = |number: usize, command: Command| {
        let envelope = Envelope { request_id: format!("request-{number}"), proposed_ms: 1, traceparent: String::new(), command };
        state.apply(Revision(number as u64 + 1), &envelope).0.unwrap();
    };
    // Nobody is older.
    apply(0, Command::RaiseLevel { level: forge_shared::version::LEVEL });
    for number in 1..=workers {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../cluster-configs/{folder}/worker-{number}.yaml"));
        let config: WorkerConfig = load(Some(&file), &[]).unwrap();
        let spec = NodeSpec {
            id: NodeId(config.name.clone()),
            role: Role::Worker,
            incarnation: Incarnation(1),
            version: "1".into(),
            level: forge_shared::version::LEVEL,
            address: config.address().into(),
            metrics_address: config.metrics_listen.clone(),
            data_plane: Some(DataPlane { address: config.address().into(), transport: config.data_plane.transport }),
            devices: config.declared(),
        };
        apply(number, Command::JoinNode { spec: Box::new(spec) });
    }
    state
}

/// As a model of 70 billion parameters in bf16: 80 layers, 64 heads, 8 of keys and values.
fn facts() -> ModelFacts {
    let (layer_bytes, table_bytes) = (1_711_000_000, 2_101_000_000);
    ModelFacts {
        layers: 80,
        context_length: 8192,
        weights_bytes: 80 * layer_bytes + 2 * table_bytes,
        kv_slot_bytes: 80 * 2 * 8 * 128 * 2,
        workspace_bytes: 1 << 30,
        weights_digest: "d".repeat(64),
        shape: ModelShape {
            heads: 64,
            kv_heads: 8,
            experts: 0,
            hidden_size: 8192,
            vocab_size: 128_256,
            embedding_bytes: table_bytes,
            head_bytes: table_bytes,
            layer_bytes: vec![layer_bytes; 80],
            expert_bytes: Vec::new(),
            tensor_extra_bytes: Vec::new(),
        },
    }
}

fn service(replicas: u32, layout: Layout) -> ModelService {
    ModelService::new("big", ModelServiceSpec { model: "org/big".into(), replicas, layout, ..ModelServiceSpec::default() })
}

#[test]
fn a_model_too_large_for_a_device_fills_the_declared_nodes() {
    for (folder, workers) in [("2x8-gpu", 2usize), ("8x8-gpu", 8)] {
        let state = cluster(folder, workers);
        let service = service(workers as u32, Layout { tensor: 8, ..Layout::default() });
        let planned = plan_service(&state, &service, &facts()).unwrap();
        assert_eq!(planned.plans.len(), workers, "{folder}");
        let mut taken = BTreeSet::new();
        for plan in &planned.plans {
            assert_eq!(plan.ranks.len(), 8);
            for rank in &plan.ranks {
                assert!(taken.insert((rank.node.0.clone(), rank.device)), "{folder}: a device was given twice");
                assert!(rank.memory.total_bytes() <= DEVICE_BYTES, "{folder}: {} bytes on one device", rank.memory.total_bytes());
                assert_eq!(rank.layers, 0..80);
            }
        }
        assert_eq!(taken.len(), workers * 8);
    }
}

#[test]
fn one_replica_over_all_nodes_has_every_layer_once_on_every_tensor_rank() {
    for (folder, workers) in [("2x8-gpu", 2usize), ("8x8-gpu", 8)] {
        let layout = Layout { tensor: 8, pipeline: workers, ..Layout::default() };
        let planned = plan_service(&cluster(folder, workers), &service(1, layout), &facts()).unwrap();
        assert_eq!((planned.plans.len(), planned.plans[0].ranks.len()), (1, workers * 8), "{folder}");
        let ranks = &planned.plans[0].ranks;
        let devices: BTreeSet<_> = ranks.iter().map(|rank| (rank.node.0.clone(), rank.device)).collect();
        assert_eq!(devices.len(), workers * 8, "{folder}: a device was given twice");
        for tensor_rank in 0..8 {
            let mut layers: Vec<_> =
                ranks.iter().filter(|rank| rank.tensor_rank == tensor_rank).flat_map(|rank| rank.layers.clone()).collect();
            layers.sort_unstable();
            assert_eq!(layers, (0..80).collect::<Vec<_>>(), "{folder}: tensor rank {tensor_rank}");
        }
        let stages: BTreeSet<_> = ranks.iter().map(|rank| (rank.layers.start, rank.node.0.clone())).collect();
        assert_eq!(stages.len(), workers, "{folder}: a stage is on several nodes");
    }
}

#[test]
fn one_device_alone_is_refused_with_numbers() {
    let error = plan_service(&cluster("2x8-gpu", 2), &service(1, Layout::default()), &facts()).unwrap_err();
    assert!(matches!(error, forge_cluster::api::ClusterError::NotPlaceable(_)), "{error:?}");
}
