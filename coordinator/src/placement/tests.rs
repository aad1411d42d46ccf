use forge_shared::ids::NodeId;
use forge_shared::spec::{ByteSize, Layout};
use proptest::prelude::*;

use super::*;
use crate::state::check_plan;
use crate::state::test_support::{MIB, facts, mixture, worker};
use forge_shared::cluster::node::{DataPlane, DataTransport, NodePhase, NodeRecord, NodeSpec};

fn reached(id: &str, transport: DataTransport) -> DataPlane {
    DataPlane { address: format!("{id}:7100"), transport }
}

fn record(id: &str, devices_mib: &[u64]) -> NodeRecord {
    NodeRecord {
        spec: NodeSpec { data_plane: Some(reached(id, DataTransport::Quic)), ..worker(id, 1, devices_mib) },
        phase: NodePhase::Ready,
        cordoned: false,
        draining: false,
        is_forced: false,
        reason: String::new(),
        since_ms: 0,
    }
}

fn cluster(nodes: &[NodeRecord]) -> Cluster {
    Cluster::of_nodes(nodes.iter(), std::iter::empty())
}

/// A wish for replicas 0..count on a fresh cluster.
fn place_on(nodes: &[NodeRecord], spec: &ModelServiceSpec, facts: &ModelFacts) -> Placement {
    place_with(nodes, spec, facts, false)
}

fn place_with(nodes: &[NodeRecord], spec: &ModelServiceSpec, facts: &ModelFacts, on_one_node: bool) -> Placement {
    let indices: Vec<u32> = (0..spec.replicas).collect();
    let service = ServiceName::from("demo");
    let wish = Wish { service: &service, spec, facts, indices: &indices, last_epoch: Epoch(7), standing: &[], avoided: &[], on_one_node };
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
fn the_nearest_kv_memory_is_one_that_a_person_would_write() {
    let spec = ModelServiceSpec { kv_memory: Some(ByteSize(900 << 30)), ..Default::default() };
    let refusal = alone(&[16_000], &spec, &facts(94)).expect_err("too much");
    let (key, value) = &refusal.nearest[0];
    assert!(key == "kvMemory" && value.ends_with("MiB") && value.len() < 10, "{refusal}");
    alone(&[16_000], &changed(&spec, &refusal.nearest), &facts(94)).expect("it fits");
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
        layout: Layout { tensor, pipeline, ..Layout::default() },
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
        on_one_node: true,
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
fn ranks_that_share_a_device_share_its_cores() {
    let spec = |threads| ModelServiceSpec { layout: Layout { tensor: 2, ..Layout::default() }, threads, ..Default::default() };
    let threads = |plan: Plan| plan.ranks.iter().map(|rank| (rank.device, rank.threads)).collect::<Vec<_>>();
    assert_eq!(threads(alone(&[9000], &spec(None), &facts(94)).expect("both fit")), [(0, 1), (0, 1)]);
    assert_eq!(threads(alone(&[9000, 9000], &spec(None), &facts(94)).expect("one each")), [(0, 2), (1, 2)]);
    assert_eq!(threads(alone(&[9000], &spec(Some(5)), &facts(94)).expect("as is said")), [(0, 5), (0, 5)]);
}

#[test]
fn ranks_that_must_be_together_are_refused_where_no_node_holds_them() {
    let nodes = [record("a", &[420]), record("b", &[420])];
    let layout = Layout { tensor: 2, ..Layout::default() };
    let spec = ModelServiceSpec { layout, kv_memory: Some(ByteSize(50 * MIB)), max_model_len: Some(512), ..Default::default() };
    let place = |on_one_node| place_with(&nodes, &spec, &facts(400), on_one_node);
    let apart = place(false);
    assert_eq!(nodes_of(&apart), ["a", "b"]);
    let refusal = place(true).refusal.expect("neither holds both");
    assert!(refusal.to_string().contains("2 ranks must fit together on one worker"), "{refusal}");
}

#[test]
fn ranks_are_divided_only_among_workers_that_reach_each_other() {
    let mut nodes = [record("a", &[420]), record("b", &[420]), record("c", &[420])];
    let layout = Layout { tensor: 2, ..Layout::default() };
    let spec = ModelServiceSpec { layout, kv_memory: Some(ByteSize(50 * MIB)), max_model_len: Some(512), ..Default::default() };
    nodes[0].spec.data_plane = None;
    assert_eq!(nodes_of(&place_on(&nodes, &spec, &facts(400))), ["b", "c"]);
    nodes[1].spec.data_plane = Some(reached("b", DataTransport::Tcp));
    let refusal = place_on(&nodes, &spec, &facts(400)).refusal.expect("no two speak alike");
    assert!(refusal.to_string().contains("on several that reach each other (dataPlane"), "{refusal}");
    nodes[2].spec.data_plane = Some(reached("c", DataTransport::Tcp));
    assert_eq!(nodes_of(&place_on(&nodes, &spec, &facts(400))), ["b", "c"]);
}

#[test]
fn a_device_that_its_worker_cannot_run_is_refused_with_the_reason() {
    let mut nodes = [record("a", &[9000, 9000]), record("b", &[200])];
    nodes[0].spec.devices.iter_mut().for_each(|device| device.cannot_run = Some("this build has no kernels for cuda".into()));
    let refusal = place_on(&nodes, &ModelServiceSpec::default(), &facts(500)).refusal.expect("nowhere");
    assert!(refusal.to_string().contains("this build has no kernels for cuda (fails on 2 of 3"), "{refusal}");
    let small = place_on(&nodes, &ModelServiceSpec::default(), &facts(50));
    assert_eq!(nodes_of(&small), ["b"], "never where it cannot run, however roomy");
    let wish = Wish {
        service: &ServiceName::from("demo"),
        spec: &ModelServiceSpec::default(),
        facts: &facts(50),
        indices: &[0],
        last_epoch: Epoch(0),
        standing: &[],
        avoided: &[],
        on_one_node: true,
    };
    let said = why_not(&cluster(&nodes), &wish, &small.plans);
    assert_eq!(said.iter().map(|(device, _)| device.as_str()).collect::<Vec<_>>(), ["a/0", "a/1"]);
    assert!(said.iter().all(|(_, why)| why.contains("no kernels for cuda")));
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
            "layout.expert" => spec.layout.expert = value.parse().expect("a number"),
            other => panic!("unexpected key {other}"),
        }
    }
    spec
}

#[test]
fn experts_are_divided_over_nodes_and_all_else_is_whole() {
    // Two devices of 700 MiB on each of two nodes; the model has 1000 MiB, about 650 of them in experts.
    let nodes = [record("a", &[700, 700]), record("b", &[700, 700])];
    let spec = |layout| ModelServiceSpec { layout, kv_memory: Some(ByteSize(160 * MIB)), max_model_len: Some(512), ..Default::default() };
    let facts = mixture(1_000, 8);
    let by_four = place_on(&nodes, &spec(Layout { expert: 4, ..Layout::default() }), &facts);
    assert_eq!(by_four.refusal, None);
    let ranks = &by_four.plans[0].ranks;
    let held: Vec<_> = ranks.iter().map(|rank| (rank.expert_rank, rank.expert_size, rank.experts.clone())).collect();
    assert_eq!(held, [(0, 4, 0..2), (1, 4, 2..4), (2, 4, 4..6), (3, 4, 6..8)]);
    assert!(ranks.iter().all(|rank| rank.layers == (0..30) && rank.memory.kv_bytes == ranks[0].memory.kv_bytes));
    // Each has a quarter of the experts and all the rest.
    let routed_bytes: u64 = facts.shape.expert_bytes.iter().sum();
    assert!(ranks[0].memory.weights_bytes.abs_diff(facts.weights_bytes - routed_bytes * 3 / 4) < 1_024);
    // A group of tensor ranks stays on one node where a stage does not.
    let product = place_on(&nodes, &spec(Layout { tensor: 2, expert: 2, ..Layout::default() }), &facts);
    assert_eq!(nodes_of(&product), ["a", "a", "b", "b"]);
    let numbers: Vec<_> = product.plans[0].ranks.iter().map(|rank| (rank.expert_rank, rank.tensor_rank)).collect();
    assert_eq!(numbers, [(0, 0), (0, 1), (1, 0), (1, 1)]);
}

#[test]
fn experts_that_are_not_there_are_refused_with_the_nearest_layout() {
    let nodes = [record("a", &[900, 900, 900, 900])];
    let wish = |layout| ModelServiceSpec { layout, kv_memory: Some(ByteSize(100 * MIB)), max_model_len: Some(512), ..Default::default() };
    let dense = place_on(&nodes, &wish(Layout { tensor: 2, pipeline: 1, expert: 2 }), &facts(500)).refusal.expect("no experts");
    assert!(dense.to_string().contains("layout.expert=2: the model has no experts to divide"), "{dense}");
    assert_eq!(dense.wrong_setting.as_deref(), Some("layout.expert"));
    let keys = |refusal: &Refusal| refusal.nearest.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>();
    assert_eq!(keys(&dense), ["layout.tensor=2", "layout.pipeline=1", "layout.expert=1"]);
    let few = place_on(&nodes, &wish(Layout { expert: 8, ..Layout::default() }), &mixture(500, 6)).refusal.expect("six experts");
    assert_eq!(keys(&few), ["layout.tensor=1", "layout.pipeline=1", "layout.expert=4"]);
    // What fits no device whole is offered divided, by experts where the model has them.
    let large = ModelServiceSpec { kv_memory: Some(ByteSize(400 * MIB)), max_model_len: Some(512), ..Default::default() };
    let divided = place_on(&[record("a", &[900, 900])], &large, &mixture(900, 8)).refusal.expect("too large for one");
    assert!(divided.nearest.iter().any(|(key, _)| key.starts_with("layout.")), "{divided}");
    assert_eq!(place_on(&[record("a", &[900, 900])], &changed(&large, &divided.nearest), &mixture(900, 8)).refusal, None);
}

prop_compose! {
    fn any_nodes()(
        sizes in proptest::collection::vec(proptest::collection::vec(1u64..8_000, 0..5), 0..6),
        cordoned in proptest::collection::vec(any::<bool>(), 6),
        refused in 0usize..20,
    ) -> Vec<NodeRecord> {
        let records = sizes.iter().enumerate().map(|(number, devices)| NodeRecord {
            // One in eight.
            cordoned: cordoned[number] && number % 4 == 3,
            ..record(&format!("n{number}"), devices)
        });
        let mut records: Vec<NodeRecord> = records.collect();
        // And one device in some clusters runs nothing.
        if let Some(device) = records.iter_mut().flat_map(|node| &mut node.spec.devices).nth(refused) {
            device.cannot_run = Some("it has no kernels".into());
        }
        records
    }
}

prop_compose! {
    fn any_spec()(
        replicas in 1u32..5,
        tensor in prop::sample::select(vec![1usize, 1, 1, 2, 4, 8]),
        pipeline in prop::sample::select(vec![1usize, 1, 1, 2, 3, 30]),
        expert in prop::sample::select(vec![1usize, 1, 1, 2, 4, 8, 3]),
        max_model_len in proptest::option::of(16usize..10_000),
        kv in proptest::option::of(1u64..4_000),
        block_size in 1usize..64,
    ) -> ModelServiceSpec {
        let (layout, kv_memory) = (Layout { tensor, pipeline, expert }, kv.map(|mib| ByteSize(mib * MIB)));
        ModelServiceSpec { replicas, layout, max_model_len, kv_memory, block_size, ..Default::default() }
    }
}

/// A dense model or a mixture, of heads that divide evenly or not.
fn any_facts() -> impl Strategy<Value = ModelFacts> {
    let heads = prop::sample::select(vec![(9, 3), (8, 2), (32, 8), (25, 5), (4, 1)]);
    (1u64..20_000, prop::sample::select(vec![0usize, 0, 4, 6, 60]), heads, any::<bool>()).prop_map(|(mib, experts, heads, has_head)| {
        let mut facts = if experts == 0 { facts(mib) } else { mixture(mib, experts) };
        (facts.shape.heads, facts.shape.kv_heads) = heads;
        facts.shape.head_bytes = if has_head { mib * MIB / 20 } else { 0 };
        facts
    })
}

/// Bytes that plans give out on a device.
fn given_bytes<'a>(plans: impl Iterator<Item = &'a Plan>, node: &NodeRecord, device: u32) -> u64 {
    let here = plans.flat_map(|plan| &plan.ranks).filter(|rank| rank.node == node.spec.id && rank.device == device);
    here.map(|rank| rank.memory.total_bytes()).sum()
}

fn check_memory(nodes: &[NodeRecord], plans: &[Plan]) -> Result<(), TestCaseError> {
    for node in nodes {
        for device in &node.spec.devices {
            let limit_bytes = if node.cordoned || device.cannot_run.is_some() { 0 } else { device.memory_bytes };
            prop_assert!(given_bytes(plans.iter(), node, device.index) <= limit_bytes);
        }
    }
    Ok(())
}

/// Every layer once per tensor and expert rank; every expert once per layer and tensor rank; weights are all there.
fn check_parts(plan: &Plan, spec: &ModelServiceSpec, facts: &ModelFacts) -> Result<(), TestCaseError> {
    let Layout { tensor, expert, .. } = spec.layout;
    prop_assert_eq!(plan.ranks.len(), spec.layout.ranks());
    for (tensor_rank, expert_rank) in (0..tensor).flat_map(|tensor_rank| (0..expert).map(move |expert_rank| (tensor_rank, expert_rank))) {
        let ranks = plan.ranks.iter().filter(|rank| (rank.tensor_rank, rank.expert_rank) == (tensor_rank, expert_rank));
        let layers: Vec<usize> = ranks.flat_map(|rank| rank.layers.clone()).collect();
        prop_assert_eq!(layers, (0..facts.layers).collect::<Vec<_>>());
    }
    for (tensor_rank, layer) in (0..tensor).flat_map(|tensor_rank| (0..facts.layers).map(move |layer| (tensor_rank, layer))) {
        let ranks = plan.ranks.iter().filter(|rank| rank.tensor_rank == tensor_rank && rank.layers.contains(&layer));
        let experts: Vec<usize> = ranks.flat_map(|rank| rank.experts.clone()).collect();
        prop_assert_eq!(experts, (0..facts.shape.experts).collect::<Vec<_>>());
    }
    let weights_bytes: u64 = plan.ranks.iter().map(|rank| rank.memory.weights_bytes).sum();
    prop_assert!(weights_bytes >= facts.weights_bytes);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn plans_keep_their_promises(
        nodes in any_nodes(), spec in any_spec(), facts in any_facts(), seed in any::<u64>(), on_one_node in any::<bool>(),
    ) {
        let Placement { plans, refusal } = place_with(&nodes, &spec, &facts, on_one_node);
        prop_assert_eq!(plans.len() == spec.replicas as usize, refusal.is_none());
        check_memory(&nodes, &plans)?;
        let mut epoch = Epoch(7);
        for plan in &plans {
            prop_assert!(plan.epoch > epoch);
            epoch = plan.epoch;
            check_parts(plan, &spec, &facts)?;
            prop_assert!(!on_one_node || plan.ranks.iter().all(|rank| rank.node == plan.ranks[0].node));
            prop_assert_eq!(check_plan(plan, &spec, &facts), Ok(()), "the state takes it");
            prop_assert!(plan.kv_blocks * plan.block_size >= plan.max_model_len);
            prop_assert!(spec.max_model_len.is_none_or(|len| plan.max_model_len == len));
            prop_assert_eq!(plan.max_model_len, plans[0].max_model_len);
        }
        // The same input in another order gives the same plans.
        let mut shuffled = nodes.clone();
        let key = |text: &str| text.bytes().fold(seed, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3).rotate_left(17));
        shuffled.sort_by_key(|node| key(&node.spec.id.0));
        shuffled.iter_mut().for_each(|node| node.spec.devices.sort_by_key(|device| key(&device.index.to_string())));
        let again = place_with(&shuffled, &spec, &facts, on_one_node);
        prop_assert_eq!(&again.plans, &plans);
        prop_assert_eq!(&again.refusal, &refusal);
        if let Some(refusal) = refusal {
            prop_assert!(!refusal.constraints.is_empty());
            if !refusal.nearest.is_empty() {
                let nearer = changed(&spec, &refusal.nearest);
                let placement = place_with(&nodes, &nearer, &facts, on_one_node);
                prop_assert_eq!(placement.refusal, None, "{}", refusal);
                check_memory(&nodes, &placement.plans)?;
                for plan in &placement.plans {
                    check_parts(plan, &nearer, &facts)?;
                }
            }
        }
    }

    /// A second service beside a first: never over memory together, never on a node to be avoided, and nothing that stands
    /// moves.
    #[test]
    fn what_stands_is_counted_and_what_is_avoided_is_left_out(
        nodes in any_nodes(),
        (first, second) in (any_spec(), any_spec()),
        (one, other) in (any_facts(), any_facts()),
        avoided in proptest::collection::vec((0u32..5, 0usize..6), 0..8),
    ) {
        let standing = place_on(&nodes, &first, &one).plans;
        let mut cluster = Cluster::of_nodes(nodes.iter(), standing.iter());
        let indices: Vec<u32> = (0..second.replicas).collect();
        let avoided: Vec<(u32, NodeId)> = avoided.iter().map(|(index, node)| (*index, NodeId(format!("n{node}")))).collect();
        let service = ServiceName::from("second");
        let wish = Wish {
            service: &service,
            spec: &second,
            facts: &other,
            indices: &indices,
            last_epoch: Epoch(0),
            standing: &[],
            avoided: &avoided,
            on_one_node: false,
        };
        let placed = plan(&mut cluster, &wish).plans;
        for plan in &placed {
            let is_avoided = |rank: &RankPlan| avoided.contains(&(plan.replica.index, rank.node.clone()));
            prop_assert!(!plan.ranks.iter().any(is_avoided));
            check_parts(plan, &second, &other)?;
        }
        let all: Vec<Plan> = standing.into_iter().chain(placed).collect();
        check_memory(&nodes, &all)?;
        // The cluster's own count is the same.
        prop_assert_eq!(cluster, Cluster::of_nodes(nodes.iter(), all.iter()));
    }

    /// One rank is refused only where no device holds it.
    #[test]
    fn a_refusal_of_one_rank_means_that_no_device_holds_it(
        nodes in any_nodes(),
        mib in 1u64..10_000,
        len in proptest::option::of(16usize..8_192),
        kv in proptest::option::of(1u64..4_000),
    ) {
        let facts = facts(mib);
        let kv_memory = kv.map(|mib| ByteSize(mib * MIB));
        let spec = ModelServiceSpec { max_model_len: len, kv_memory, ..Default::default() };
        let least_bytes = facts.kv_slot_bytes * len.unwrap_or(16).next_multiple_of(16) as u64;
        let block_bytes = facts.kv_slot_bytes * 16;
        let wanted_bytes = kv_memory.map_or(Some(least_bytes), |ByteSize(bytes)| (bytes / block_bytes * block_bytes >= least_bytes).then_some(bytes / block_bytes * block_bytes));
        let holds = |bytes: u64| wanted_bytes.is_some_and(|kv_bytes| facts.weights_bytes + facts.workspace_bytes + kv_bytes <= bytes);
        let usable = nodes.iter().filter(|node| !node.cordoned).flat_map(|node| &node.spec.devices);
        let fits = usable.filter(|device| device.cannot_run.is_none()).any(|device| holds(device.memory_bytes));
        prop_assert_eq!(place_on(&nodes, &spec, &facts).refusal.is_none(), fits);
    }

    /// On equal nodes with room, replicas of any layout that fits one node are as many on each as on any other.
    #[test]
    fn replicas_of_every_layout_spread(count in 1usize..6, replicas in 1u32..12, layout in prop::sample::select(vec![(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2)])) {
        let nodes: Vec<NodeRecord> = (0..count).map(|number| record(&format!("n{number}"), &[60_000; 4])).collect();
        let layout = Layout { tensor: layout.0, pipeline: layout.1, expert: layout.2 };
        let spec = ModelServiceSpec { replicas, layout, kv_memory: Some(ByteSize(20 * MIB)), max_model_len: Some(16), ..Default::default() };
        let placement = place_on(&nodes, &spec, &mixture(400, 8));
        prop_assert_eq!(&placement.refusal, &None);
        let on = |node: &NodeRecord| placement.plans.iter().filter(|plan| plan.ranks.iter().any(|rank| rank.node == node.spec.id)).count();
        let counts: Vec<usize> = nodes.iter().map(on).collect();
        prop_assert!(counts.iter().max().zip(counts.iter().min()).is_some_and(|(most, least)| most - least <= 1), "{:?}", counts);
        prop_assert!(placement.plans.iter().all(|plan| plan.ranks.iter().all(|rank| rank.node == plan.ranks[0].node)));
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
