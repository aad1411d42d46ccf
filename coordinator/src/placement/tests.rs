use forge_shared::ids::NodeId;
use forge_shared::spec::{ByteSize, Layout};
use proptest::prelude::*;

use super::*;
use crate::state::test_support::{MIB, facts, worker};
use forge_shared::cluster::node::{NodePhase, NodeRecord};

fn record(id: &str, devices_mib: &[u64]) -> NodeRecord {
    NodeRecord {
        spec: worker(id, 1, devices_mib),
        phase: NodePhase::Ready,
        cordoned: false,
        draining: false,
        reason: String::new(),
        since_ms: 0,
    }
}

fn cluster(nodes: &[NodeRecord]) -> Cluster {
    Cluster::of_nodes(nodes.iter(), std::iter::empty())
}

/// A wish for replicas 0..count on a fresh cluster.
fn place_on(nodes: &[NodeRecord], spec: &ModelServiceSpec, facts: &ModelFacts) -> Placement {
    let indices: Vec<u32> = (0..spec.replicas).collect();
    let service = ServiceName::from("demo");
    let wish = Wish {
        service: &service,
        spec,
        facts,
        indices: &indices,
        last_epoch: Epoch(7),
        standing: &[],
        avoided: &[],
        max_ranks: usize::MAX,
    };
    plan(&mut cluster(nodes), &wish)
}

fn alone(free_mib: &[u64], spec: &ModelServiceSpec, facts: &ModelFacts) -> Result<Plan, Refusal> {
    let view = |(device, mib): (usize, &u64)| DeviceView {
        node: NodeId::from("n"),
        device: device as u32,
        free_bytes: ByteSize(mib * MIB),
        threads: 2,
    };
    let devices: Vec<DeviceView> = free_mib.iter().enumerate().map(view).collect();
    plan_alone(&devices, &ServiceName::from("demo"), spec, facts)
}

fn nodes_of(placement: &Placement) -> Vec<&str> {
    placement.plans.iter().flat_map(|plan| plan.ranks.iter().map(|rank| rank.node.0.as_str())).collect()
}

#[test]
fn a_small_model_gets_its_whole_context() {
    let plan = alone(&[16_000], &ModelServiceSpec::default(), &facts(94)).expect("fits");
    assert_eq!(plan.max_model_len, 8192);
    assert!(plan.ranks[0].memory.kv_bytes <= 4 << 30);
    assert_eq!(plan.ranks[0].layers, 0..30);
}

#[test]
fn short_memory_shortens_an_unstated_context_only() {
    let plan = alone(&[300], &ModelServiceSpec::default(), &facts(94)).expect("fits shorter");
    assert!(plan.max_model_len < 8192 && plan.max_model_len >= 1024, "{}", plan.max_model_len);
    let stated = ModelServiceSpec { max_model_len: Some(8192), ..Default::default() };
    let refusal = alone(&[300], &stated, &facts(94)).expect_err("too long");
    assert!(refusal.to_string().contains("maxModelLen=") && refusal.wrong_setting.is_none(), "{refusal}");
}

#[test]
fn a_context_beyond_the_model_is_refused() {
    let spec = ModelServiceSpec { max_model_len: Some(9000), ..Default::default() };
    let refusal = alone(&[16_000], &spec, &facts(94)).expect_err("beyond");
    assert_eq!(refusal.nearest, vec![("maxModelLen".to_owned(), "8192".to_owned())]);
    assert_eq!(refusal.wrong_setting.as_deref(), Some("maxModelLen"), "no machine could");
}

#[test]
fn weights_that_do_not_fit_are_refused_with_numbers() {
    let refusal = alone(&[1000, 2000], &ModelServiceSpec::default(), &facts(14_000)).expect_err("too big");
    let text = refusal.to_string();
    assert!(text.contains("13.7GiB") && text.contains("2 of 2") && text.contains("no smaller setting"), "{text}");
}

#[test]
fn the_roomiest_device_wins_and_ties_go_to_the_first() {
    let spec = ModelServiceSpec { kv_memory: Some(ByteSize(256 * MIB)), ..Default::default() };
    let chosen = |free: &[u64]| alone(free, &spec, &facts(94)).expect("fits").ranks[0].device;
    assert_eq!(chosen(&[4000, 8000]), 1);
    assert_eq!(chosen(&[8000, 8000]), 0);
}

#[test]
fn replicas_spread_over_nodes_before_they_share_one() {
    let nodes = [record("a", &[9000, 9000]), record("b", &[2000]), record("c", &[3000])];
    let spec = ModelServiceSpec { replicas: 4, kv_memory: Some(ByteSize(200 * MIB)), ..Default::default() };
    let placement = place_on(&nodes, &spec, &facts(94));
    assert_eq!(nodes_of(&placement), ["a", "c", "b", "a"]);
    let epochs: Vec<u64> = placement.plans.iter().map(|plan| plan.epoch.0).collect();
    assert_eq!(epochs, [8, 9, 10, 11]);
    assert_eq!((placement.plans[0].ranks[0].device, placement.plans[3].ranks[0].device), (0, 1));
}

#[test]
fn nodes_that_take_no_replicas_are_left_out_and_counted() {
    let mut nodes = [record("a", &[9000]), record("b", &[9000]), record("c", &[9000]), record("d", &[100])];
    nodes[0].cordoned = true;
    nodes[1].phase = NodePhase::Lost;
    (nodes[2].cordoned, nodes[2].draining) = (true, true);
    let refusal = place_on(&nodes, &ModelServiceSpec::default(), &facts(94)).refusal.expect("nowhere");
    let text = refusal.to_string();
    for reason in ["its node is lost (fails on 1 of 4", "being drained (fails on 1", "cordoned (fails on 1", "free memory"] {
        assert!(text.contains(reason), "{reason}: {text}");
    }
}

#[test]
fn ranks_of_a_replica_stay_on_one_node_where_they_can() {
    let nodes = [record("a", &[400, 400]), record("b", &[300, 300, 300, 300]), record("c", &[500])];
    let spec = |tensor, pipeline| ModelServiceSpec {
        layout: Layout { tensor, pipeline },
        kv_memory: Some(ByteSize(100 * MIB)),
        max_model_len: Some(512),
        ..Default::default()
    };
    let placement = place_on(&nodes, &spec(2, 2), &facts(500));
    let plan = &placement.plans[0];
    assert_eq!(nodes_of(&placement), ["b"; 4]);
    let mut devices: Vec<u32> = plan.ranks.iter().map(|rank| rank.device).collect();
    devices.sort_unstable();
    assert_eq!(devices, [0, 1, 2, 3], "each rank has a device of its own");
    assert_eq!(plan.ranks[0].layers, plan.ranks[1].layers);
    assert_eq!(plan.ranks[1].layers.end, plan.ranks[2].layers.start);
    // KV of three groups on two ranks is 2 + 1.
    assert_eq!(plan.ranks[0].memory.kv_bytes, 2 * plan.ranks[1].memory.kv_bytes);
    assert!(plan.ranks[0].memory.weights_bytes > plan.ranks[1].memory.weights_bytes);
    // No node has seven devices: two nodes and more take a stage each.
    let over_nodes = place_on(&nodes, &spec(1, 6), &facts(800));
    assert_eq!(over_nodes.refusal, None);
    assert_eq!(over_nodes.plans[0].ranks.len(), 6);
}

#[test]
fn standing_replicas_decide_the_context_and_count_for_spreading() {
    let nodes = [record("a", &[9000]), record("b", &[9000])];
    let (spec, facts) = (ModelServiceSpec { replicas: 2, ..Default::default() }, facts(94));
    let service = ServiceName::from("demo");
    let wish = Wish {
        service: &service,
        spec: &spec,
        facts: &facts,
        indices: &[0],
        last_epoch: Epoch(0),
        standing: &[],
        avoided: &[],
        max_ranks: 1,
    };
    let mut cluster = cluster(&nodes);
    let first = plan(&mut cluster, &wish).plans.remove(0);
    let short = Plan { max_model_len: 100, ..first.clone() };
    let second = plan(&mut cluster, &Wish { indices: &[1], last_epoch: Epoch(1), standing: &[&short], ..wish }).plans.remove(0);
    assert_eq!((second.max_model_len, second.epoch), (100, Epoch(2)));
    assert_ne!(second.ranks[0].node, first.ranks[0].node);
    let avoided = [(2, NodeId::from("a")), (2, NodeId::from("b"))];
    let refused = plan(&mut cluster, &Wish { indices: &[2], avoided: &avoided, standing: &[&first, &second], ..wish });
    let refusal = refused.refusal.expect("nowhere else");
    assert!(refusal.to_string().contains("is to be elsewhere"), "{refusal}");
    assert_eq!(refusal.nearest, [("replicas".to_owned(), "2".to_owned())]);
}

#[test]
fn a_layout_that_workers_cannot_run_is_refused_with_one_that_they_can() {
    let spec = ModelServiceSpec { layout: Layout { tensor: 2, pipeline: 1 }, ..Default::default() };
    let refusal = alone(&[9000], &spec, &facts(94)).expect_err("two ranks");
    assert!(refusal.to_string().contains("layout.tensor=1 layout.pipeline=1"), "{refusal}");
}

fn changed(spec: &ModelServiceSpec, nearest: &[(String, String)]) -> ModelServiceSpec {
    let mut spec = spec.clone();
    for (key, value) in nearest {
        match key.as_str() {
            "maxModelLen" => spec.max_model_len = value.parse().ok(),
            "kvMemory" => spec.kv_memory = value.parse().ok(),
            "replicas" => spec.replicas = value.parse().expect("a number"),
            "layout.tensor" => spec.layout.tensor = value.parse().expect("a number"),
            "layout.pipeline" => spec.layout.pipeline = value.parse().expect("a number"),
            other => panic!("unexpected key {other}"),
        }
    }
    spec
}

prop_compose! {
    fn any_nodes()(
        sizes in proptest::collection::vec(proptest::collection::vec(1u64..8_000, 0..5), 0..6),
        cordoned in proptest::collection::vec(any::<bool>(), 6),
    ) -> Vec<NodeRecord> {
        let records = sizes.iter().enumerate().map(|(number, devices)| NodeRecord {
            // One in eight.
            cordoned: cordoned[number] && number % 4 == 3,
            ..record(&format!("n{number}"), devices)
        });
        records.collect()
    }
}

prop_compose! {
    fn any_spec()(
        replicas in 1u32..5,
        tensor in prop::sample::select(vec![1usize, 1, 1, 2, 4, 8]),
        pipeline in prop::sample::select(vec![1usize, 1, 1, 2, 3, 30]),
        max_model_len in proptest::option::of(16usize..10_000),
        kv in proptest::option::of(1u64..4_000),
        block_size in 1usize..64,
    ) -> ModelServiceSpec {
        let kv_memory = kv.map(|mib| ByteSize(mib * MIB));
        ModelServiceSpec { replicas, layout: Layout { tensor, pipeline }, max_model_len, kv_memory, block_size, ..Default::default() }
    }
}

proptest! {
    #[test]
    fn plans_keep_their_promises(nodes in any_nodes(), spec in any_spec(), weights in 1u64..20_000, turn in 0usize..6) {
        let facts = facts(weights);
        let Placement { plans, refusal } = place_on(&nodes, &spec, &facts);
        prop_assert_eq!(plans.len() == spec.replicas as usize, refusal.is_none());
        // Never over memory, and never on a node that takes none.
        for node in &nodes {
            for device in &node.spec.devices {
                let ranks = plans.iter().flat_map(|plan| &plan.ranks);
                let here = ranks.filter(|rank| rank.node == node.spec.id && rank.device == device.index);
                let bytes: u64 = here.map(|rank| rank.memory.total_bytes()).sum();
                let limit_bytes = if node.cordoned { 0 } else { device.memory_bytes };
                prop_assert!(bytes <= limit_bytes);
            }
        }
        let mut epoch = Epoch(7);
        for plan in &plans {
            prop_assert!(plan.epoch > epoch);
            epoch = plan.epoch;
            prop_assert_eq!(plan.ranks.len(), spec.layout.tensor * spec.layout.pipeline);
            for tensor_rank in 0..spec.layout.tensor {
                let mut layers: Vec<usize> = plan.ranks.iter().filter(|rank| rank.tensor_rank == tensor_rank).flat_map(|rank| rank.layers.clone()).collect();
                layers.sort_unstable();
                prop_assert_eq!(layers, (0..facts.layers).collect::<Vec<_>>());
            }
            prop_assert!(plan.kv_blocks * plan.block_size >= plan.max_model_len);
            prop_assert!(spec.max_model_len.is_none_or(|len| plan.max_model_len == len));
            prop_assert_eq!(plan.max_model_len, plans[0].max_model_len);
            // What ranks of one tensor group hold together is the whole, at least.
            let weights_bytes: u64 = plan.ranks.iter().map(|rank| rank.memory.weights_bytes).sum();
            prop_assert!(weights_bytes >= facts.weights_bytes);
        }
        // The same input in another order gives the same plans.
        let mut turned = nodes.clone();
        turned.rotate_left(turn.min(nodes.len()));
        turned.iter_mut().for_each(|node| node.spec.devices.reverse());
        let again = place_on(&turned, &spec, &facts);
        prop_assert_eq!(&again.plans, &plans);
        prop_assert_eq!(&again.refusal, &refusal);
        if let Some(refusal) = refusal {
            prop_assert!(!refusal.constraints.is_empty());
            if !refusal.nearest.is_empty() {
                let nearer = changed(&spec, &refusal.nearest);
                prop_assert_eq!(place_on(&nodes, &nearer, &facts).refusal, None, "{}", refusal);
            }
        }
    }

    #[test]
    fn replicas_of_one_rank_spread(nodes in proptest::collection::vec(1_000u64..8_000, 1..6), replicas in 1u32..6) {
        let nodes: Vec<NodeRecord> = nodes.iter().enumerate().map(|(number, mib)| record(&format!("n{number}"), &[*mib])).collect();
        let spec = ModelServiceSpec { replicas, kv_memory: Some(ByteSize(20 * MIB)), max_model_len: Some(16), ..Default::default() };
        let placement = place_on(&nodes, &spec, &facts(50));
        let mut counts: Vec<usize> = nodes.iter().map(|node| nodes_of(&placement).iter().filter(|id| **id == node.spec.id.0).count()).collect();
        counts.sort_unstable();
        prop_assert!(counts[counts.len() - 1] - counts[0] <= 1, "{:?}", counts);
    }

    #[test]
    fn what_is_taken_can_be_given_back(nodes in any_nodes(), spec in any_spec(), weights in 1u64..5_000) {
        let before = cluster(&nodes);
        let placement = place_on(&nodes, &spec, &facts(weights));
        let mut after = Cluster::of_nodes(nodes.iter(), placement.plans.iter());
        placement.plans.iter().for_each(|plan| after.release(plan));
        prop_assert_eq!(before, after);
    }
}
