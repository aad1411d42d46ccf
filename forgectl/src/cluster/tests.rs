//! Making a cluster and knowing it again, without a coordinator.

use std::path::Path;
use std::time::{Duration, Instant};

use forge_cluster::api::{ClusterApi, ClusterLoads};
use forge_cluster::config::{CoordinatorConfig, load};
use forge_cluster::tls::{ClusterCa, Credentials};
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::Command;
use forge_shared::cluster::event::Object;
use forge_shared::cluster::node::{DeviceInfo, DeviceKind, NodeLoad, NodePhase, NodeRecord, NodeSpec, ReplicaLoad, Role};
use forge_shared::cluster::service::{Facts, ReplicaPhase, ReplicaRecord, ReplicaStatus, ServiceRecord};
use forge_shared::ids::{Epoch, Incarnation, NodeId, ReplicaId, ServiceName};
use forge_shared::plan::{ModelFacts, ModelShape, Plan, RankMemory, RankPlan, Refusal};
use forge_shared::spec::{KvCacheDtype, ModelService, ModelServiceSpec};

use super::connect::connect;
use super::contexts::ContextStore;
use super::get::table;
use super::init::init_with;
use super::rows::model_state;
use super::top::Rates;
use super::verbs::deletion;
use super::wait::not_served;
use crate::cli::cluster::{InitArgs, Listed, ServerArgs};

fn init_args(dir: &Path) -> InitArgs {
    InitArgs {
        dir: dir.to_owned(),
        cluster: "test".into(),
        name: "c1".into(),
        listen: "127.0.0.1:7000".into(),
        advertise: None,
        context: None,
    }
}

fn spec(name: &str) -> NodeSpec {
    NodeSpec {
        id: NodeId::from(name),
        role: Role::Worker,
        incarnation: Incarnation(1),
        version: "1".into(),
        level: forge_shared::version::LEVEL,
        address: "h:1".into(),
        metrics_address: "h:2".into(),
        data_plane: None,
        devices: vec![DeviceInfo {
            index: 0,
            kind: DeviceKind::Cpu,
            name: "x".into(),
            cores: 4,
            numa_node: None,
            instruction_sets: Vec::new(),
            memory_bytes: 3 << 30,
            read_bandwidth_bytes_per_s: 0,
            matrix_flops: 0,
            is_virtual: true,
            cannot_run: None,
        }],
    }
}

#[test]
fn init_makes_what_a_coordinator_and_its_operator_need() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, contexts) = (folder.path().join("c1"), ContextStore::at(&folder.path().join("home")));
    init_with(&init_args(&dir), &contexts).unwrap();

    let config: CoordinatorConfig = load(Some(&dir.join("coordinator.yaml")), &[]).unwrap();
    assert_eq!((config.name.as_str(), config.address()), ("c1", "127.0.0.1:7000"));
    let credentials = Credentials::load(&config.membership.directory).unwrap();
    assert_eq!(credentials.identity().uri(), "forge://test/coordinator/c1");
    assert_eq!(ClusterCa::load(&config.membership.directory).unwrap().digest(), credentials.ca_digest());

    assert_eq!(contexts.current().unwrap().as_deref(), Some("test"));
    let known = contexts.get("test").unwrap();
    assert_eq!(known.servers, ["127.0.0.1:7000"]);
    assert_eq!(known.credentials.identity().role, Role::Admin);

    assert_eq!(config.metrics_listen, "127.0.0.1:7001");
    // Several on one host do not meet.
    for (name, listen, metrics) in [("b", "127.0.0.1:7010", "127.0.0.1:7011"), ("c", "10.0.0.1:65535", "127.0.0.1:65534")] {
        let other = folder.path().join(name);
        init_with(&InitArgs { listen: listen.into(), context: Some(name.into()), ..init_args(&other) }, &contexts).unwrap();
        let config: CoordinatorConfig = load(Some(&other.join("coordinator.yaml")), &[]).unwrap();
        assert_eq!((config.listen.as_str(), config.metrics_listen.as_str()), (listen, metrics));
    }
    contexts.set_current("test").unwrap();

    let error = init_with(&init_args(&dir), &contexts).unwrap_err().to_string();
    assert!(error.contains("is there already") && error.contains("help:"), "{error}");
}

#[test]
fn a_second_cluster_takes_no_context_from_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, contexts) = (|name: &str| folder.path().join(name), ContextStore::at(&folder.path().join("home")));
    init_with(&init_args(&dir("c1")), &contexts).unwrap();
    let first = contexts.get("test").unwrap().credentials;

    let failure = init_with(&init_args(&dir("c2")), &contexts).unwrap_err();
    assert_eq!(format!("{:?}", failure.code()), format!("{:?}", std::process::ExitCode::from(2)));
    let text = failure.to_string();
    assert!(text.contains("context \"test\"") && text.contains("--context OTHER") && text.contains("context remove test"), "{text}");
    assert!(!dir("c2").exists(), "nothing is written");
    assert_eq!(contexts.get("test").unwrap().credentials.ca_digest(), first.ca_digest());

    init_with(&InitArgs { context: Some("other".into()), ..init_args(&dir("c2")) }, &contexts).unwrap();
    assert_eq!((contexts.names().unwrap(), contexts.current().unwrap().as_deref()), (vec!["other".into(), "test".into()], Some("other")));
    // The same cluster may be added again, another one not; nor a name of `forgectl serve`.
    contexts.add("test", &["h:1".into()], &first).unwrap();
    let second = contexts.get("other").unwrap().credentials;
    assert!(contexts.add("test", &["h:1".into()], &second).unwrap_err().to_string().contains("already"));
    for name in ["local", "local-2"] {
        assert!(contexts.add(name, &["h:1".into()], &second).unwrap_err().to_string().contains("forgectl serve"), "{name}");
    }
}

#[test]
fn a_configuration_made_by_a_relative_path_works_from_anywhere() {
    let folder = tempfile::tempdir_in(".").unwrap();
    let relative = Path::new(folder.path().file_name().unwrap()).join("c1");
    init_with(&init_args(&relative), &ContextStore::at(&folder.path().join("home"))).unwrap();
    let config: CoordinatorConfig = load(Some(&relative.join("coordinator.yaml")), &[]).unwrap();
    assert!(config.data_dir.is_absolute() && config.membership.directory.is_absolute(), "{config:?}");
}

#[test]
fn processes_hold_contexts_of_their_own_and_free_them() {
    let folder = tempfile::tempdir().unwrap();
    let contexts = ContextStore::at(folder.path());
    let ca = ClusterCa::create("local", crate::time::Utc::now().0).unwrap();
    let admin = super::issue(&ca, Role::Admin, "admin", forge_cluster::tls::NODE_LIFETIME).unwrap();
    let hold = |address: &str| contexts.hold_local(&[address.to_owned()], &admin).unwrap();
    let (first, second) = (hold("h:1"), hold("h:2"));
    assert_eq!((first.name(), second.name()), ("local", "local-2"));
    assert_eq!(contexts.get("local").unwrap().servers, ["h:1"]);
    assert_eq!(contexts.living_local().unwrap(), ["local", "local-2"]);
    drop(first);
    assert_eq!(contexts.living_local().unwrap(), ["local-2"]);
    assert!(!contexts.has("local"));
    assert_eq!(hold("h:3").name(), "local");
}

#[tokio::test]
async fn a_cluster_is_found_by_context_and_flags_and_missed_with_a_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let contexts = ContextStore::at(folder.path());
    let error = connect(&contexts, &ServerArgs::default()).unwrap_err().to_string();
    assert!(error.contains("no cluster runs") && error.contains("forgectl serve") && error.contains("cluster init"), "{error}");
    init_with(&init_args(&folder.path().join("c1")), &contexts).unwrap();
    connect(&contexts, &ServerArgs::default()).unwrap();
    let other = ServerArgs { context: Some("tset".into()), ..ServerArgs::default() };
    let error = connect(&contexts, &other).unwrap_err().to_string();
    assert!(error.contains("known: test"), "{error}");

    // Nobody listens there: lost contact, exit code 4.
    let nowhere = ServerArgs { server: vec!["127.0.0.1:1".into()], context: None };
    let error = connect(&contexts, &nowhere).unwrap().status(Duration::from_millis(300)).await.unwrap_err();
    let failure = crate::failure::Failure::from(error);
    assert_eq!(format!("{:?}", failure.code()), format!("{:?}", std::process::ExitCode::from(4)));
    assert!(failure.to_string().contains("127.0.0.1:1"), "{failure}");
}

#[test]
fn models_and_nodes_are_deleted_by_kind() {
    let of = |words: &str| deletion(&words.split(' ').map(str::to_owned).collect::<Vec<_>>());
    let service = |name: &str| Command::DeleteService { name: ServiceName::from(name) };
    assert_eq!(of("demo").unwrap(), service("demo"));
    assert_eq!(of("node").unwrap(), service("node"), "one word is a model's name, whatever it is");
    assert_eq!(of("model demo").unwrap(), service("demo"));
    assert_eq!(of("node w1").unwrap(), Command::RemoveNode { node: NodeId::from("w1") });
    let error = of("key k1").unwrap_err().to_string();
    assert!(error.contains("delete node NAME"), "{error}");
}

#[test]
fn nodes_are_rows() {
    let node = NodeRecord {
        spec: spec("w1"),
        phase: NodePhase::Ready,
        cordoned: true,
        draining: false,
        is_forced: false,
        reason: String::new(),
        since_ms: 0,
    };
    let (columns, rows) = table(Listed::Nodes, &[Object::Node(Box::new(node))]);
    assert_eq!(columns.len(), rows[0].len());
    assert_eq!(rows[0][..5], ["w1", "worker", "ready,cordoned", "1 cpu (4 cores)", "3.0 GiB"]);
}

/// A service of one replica.
fn starting() -> ServiceRecord {
    let spec = ModelServiceSpec { model: "a/b".into(), ..ModelServiceSpec::default() };
    let rank = RankPlan {
        node: "w1".into(),
        device: 0,
        tensor_rank: 0,
        tensor_size: 1,
        expert_rank: 0,
        expert_size: 1,
        layers: 0..1,
        experts: 0..0,
        threads: 1,
        memory: RankMemory::default(),
    };
    let plan = Plan {
        replica: ReplicaId { service: "m".into(), index: 0 },
        epoch: Epoch(1),
        max_model_len: 64,
        block_size: 16,
        kv_blocks: 4,
        kv_cache_dtype: KvCacheDtype::F32,
        max_step_tokens: 16,
        max_batch_size: 4,
        ranks: vec![rank],
    };
    ServiceRecord {
        service: ModelService::new("m", spec),
        generation: 1,
        revision: Revision(1),
        created: Revision(1),
        facts: Facts::NEW,
        replicas: vec![ReplicaRecord { plan, generation: 1, status: ReplicaStatus::placed() }],
        leaving: Vec::new(),
        older: Vec::new(),
        is_deleted: false,
        refusal: None,
        last_epoch: Epoch(1),
        longest_len: None,
        history: Vec::new(),
        changed_ms: None,
        stuck: None,
    }
}

#[test]
fn a_service_runs_once_every_gateway_that_lives_serves_it() {
    let mut service = starting();
    service.replicas[0].status.phase = ReplicaPhase::Ready;
    let gateway = |name: &str| NodeSpec { role: Role::Gateway, devices: Vec::new(), ..spec(name) };
    let gateways = [gateway("g1"), gateway("g2")];
    let waits = |loads: Vec<(NodeSpec, NodeLoad)>| {
        let nodes = loads.into_iter().map(|(spec, load)| (spec, NodeLoad { resident_bytes: 1, ..load }, 5)).collect();
        not_served(&service, gateways.iter(), &ClusterLoads { nodes })
    };
    let says = |name: &str, service: &str, epochs: &[u64]| {
        let epochs = epochs.iter().map(|epoch| Epoch(*epoch)).collect();
        (gateway(name), NodeLoad { serves: Some([(service.into(), epochs)].into()), ..NodeLoad::default() })
    };
    assert_eq!(waits(vec![says("g1", "m", &[1])]).as_deref(), Some("g2"), "it has no session yet");
    assert_eq!(waits(vec![says("g1", "m", &[]), says("g2", "m", &[1])]).as_deref(), Some("g1"));
    assert_eq!(waits(vec![says("g1", "other", &[1]), says("g2", "m", &[1])]).as_deref(), Some("g1"));
    assert_eq!(waits(vec![says("g1", "m", &[1, 7]), says("g2", "m", &[0, 1])]), None);
    let (mut earlier, load) = says("g2", "m", &[1]);
    earlier.incarnation = Incarnation(earlier.incarnation.0 + 1);
    assert_eq!(waits(vec![says("g1", "m", &[1]), (earlier, load)]).as_deref(), Some("g2"), "another process said so");
    assert_eq!(waits(vec![says("g1", "m", &[1]), (gateway("g2"), NodeLoad::default())]), None, "its version does not say");
    assert_eq!(not_served(&service, [].iter(), &ClusterLoads { nodes: Vec::new() }), None, "there are none to wait for");
}

#[test]
fn whoever_does_not_run_says_why() {
    let refusal = || Refusal {
        replica: starting().replicas[0].plan.replica.clone(),
        wrong_setting: None,
        constraints: Vec::new(),
        nearest: Vec::new(),
    };
    let phase = |phase, reason: &str| {
        let mut service = starting();
        let shape = ModelShape { layer_bytes: vec![1], ..ModelShape::default() };
        let facts = ModelFacts {
            layers: 1,
            context_length: 64,
            weights_bytes: 1,
            kv_slot_bytes: 1,
            workspace_bytes: 1,
            weights_digest: String::new(),
            shape,
        };
        service.facts = Facts::Known { facts: Box::new(facts) };
        service.replicas[0].status = ReplicaStatus { phase, percent: 40, reason: reason.into(), ..ReplicaStatus::placed() };
        service
    };
    let state = |service: &ServiceRecord| {
        let (state, reason) = model_state(service);
        format!("{state}: {reason}")
    };
    assert_eq!(state(&starting()), "starting: a worker is to look at the model");
    let asked = ServiceRecord { facts: Facts::Unknown { waits_for: "worker w1 is reading the model a/b".into() }, ..starting() };
    assert_eq!(state(&asked), "starting: worker w1 is reading the model a/b");
    assert_eq!(state(&phase(ReplicaPhase::Placed, "")), "starting: worker w1 has not begun with m/0");
    assert_eq!(state(&phase(ReplicaPhase::Pulling, "3 of 9 files")), "starting: m/0 on w1 is pulling 40%: 3 of 9 files");
    assert_eq!(state(&ServiceRecord { replicas: Vec::new(), ..phase(ReplicaPhase::Placed, "") }), "starting: a replica is to be placed");
    assert_eq!(
        state(&ServiceRecord { generation: 2, ..phase(ReplicaPhase::Ready, "") }),
        "starting: m/0 on w1 is to be replaced by one of the new generation"
    );
    assert_eq!(state(&phase(ReplicaPhase::Failed, "no memory")), "failing: no memory");
    assert_eq!(state(&phase(ReplicaPhase::Ready, "")), "running: ");
    let stays = state(&ServiceRecord { refusal: Some(refusal()), ..phase(ReplicaPhase::Ready, "") });
    assert!(stays.starts_with("running: a replica that is to move has no other place: m/0 cannot be placed"), "{stays}");
    let lacks = state(&ServiceRecord { refusal: Some(refusal()), ..phase(ReplicaPhase::Loading, "") });
    assert!(lacks.starts_with("not placeable: m/0 cannot be placed"), "{lacks}");
}

#[test]
fn what_was_not_heard_of_yet_is_not_nothing() {
    let row = |load: &NodeLoad| super::top::node(&spec("w1"), load, 7);
    assert_eq!(row(&NodeLoad::default()), ["w1", "worker", "7 ms ago", "…", "…"]);
    assert_eq!(row(&NodeLoad { resident_bytes: 3 << 20, ..NodeLoad::default() })[3..], ["3 MiB", "0"]);
}

#[test]
fn rates_come_of_two_pictures_and_not_of_a_restart() {
    let picture = |generated_tokens| {
        let replica =
            ReplicaLoad { replica: "m/0".into(), running: 1, waiting: 0, kv_blocks_used: 1, kv_blocks_total: 2, generated_tokens };
        ClusterLoads { nodes: vec![(spec("w1"), NodeLoad { replicas: vec![replica], ..NodeLoad::default() }, 5)] }
    };
    let (mut rates, now) = (Rates::default(), Instant::now());
    let key = ("w1".to_owned(), "m/0".to_owned());
    assert!(rates.update(&picture(100), now).is_empty());
    let rate = rates.update(&picture(150), now + Duration::from_secs(2))[&key];
    assert!((rate - 25.0).abs() < 1e-9, "{rate}");
    assert!(!rates.update(&picture(3), now + Duration::from_secs(3)).contains_key(&key));
}
