//! Seeds of the fuzz targets of the cluster's messages and files, made from their own types. They are taken by this version,
//! or this test says so: what an older one wrote is then not read any more. `FORGE_TEST_WRITE_SEEDS=1` writes them anew.

use std::path::{Path, PathBuf};

use forge_cluster::api::{ClusterLoads, GroupStatus, MemberStatus, PlannedService};
use forge_cluster::tls::{CA_LIFETIME, ClusterCa, Identity, NodeKey};
use forge_coordinator::state::ClusterState;
use forge_coordinator::{MemberFile, write_backup};
use forge_proto::{cluster as wire, node as node_wire};
use forge_shared::cluster::Revision;
use forge_shared::cluster::certificate::{CaRecord, CertificateRecord};
use forge_shared::cluster::command::{
    Applied, Command, CommandError, Envelope, IdempotencyRecord, JoinToken, MemberRecord, PlannedReplica,
};
use forge_shared::cluster::event::{Change, Event, Kind, Object};
use forge_shared::cluster::node::{DeviceInfo, DeviceKind, NodeLoad, NodeSpec, ReplicaLoad, Role};
use forge_shared::cluster::service::{ReplicaPhase, ReplicaReport, ReplicaStatus};
use forge_shared::cluster::session::{Assignment, KeyShare, KeyUsage, NodeDown, NodeUp};
use forge_shared::ids::{Epoch, Incarnation, ReplicaId};
use forge_shared::plan::{FailedConstraint, ModelFacts, ModelShape, Plan, RankMemory, RankPlan, Refusal};
use forge_shared::spec::{ModelService, ModelServiceSpec};
use prost::Message;
use serde::Serialize;

type Seeds = Vec<(&'static str, Vec<u8>)>;

fn are_all<T: serde::de::DeserializeOwned>(lines: &[u8]) -> bool {
    lines.split(|byte| *byte == b'\n').all(|line| serde_json::from_slice::<T>(line).is_ok())
}

/// What a target does with a seed.
fn run(target: &str, seed: &[u8]) {
    match target {
        "envelopes" => {
            assert!(are_all::<Envelope>(seed));
            forge_coordinator::state::fuzz_envelopes(seed);
        }
        "snapshot" => assert!(ClusterState::decode(seed).is_ok()),
        "backup" => assert!(forge_coordinator::read_backup(seed).is_ok()),
        "member_file" => forge_coordinator::fuzz_member_file(seed),
        "coordinator_request" => forge_coordinator::fuzz_request(seed),
        "node_session" => {
            assert!(are_all::<NodeUp>(seed));
            forge_coordinator::fuzz_session(seed);
        }
        "coordinator_reply" => forge_cluster::client::fuzz::coordinator_reply(seed),
        "watch" => assert!(!forge_cluster::client::fuzz::watch(seed).is_empty()),
        "certificate" => forge_cluster::tls::fuzz::certificate(seed),
        other => panic!("no target {other}"),
    }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap()
}

fn lines<T: Serialize>(values: &[T]) -> Vec<u8> {
    values.iter().map(json).collect::<Vec<_>>().join(&b"\n"[..])
}

fn lettered(letter: u8, message: &impl Message) -> Vec<u8> {
    [vec![letter], message.encode_to_vec()].concat()
}

fn worker(id: &str, incarnation: u64) -> NodeSpec {
    let device = DeviceInfo {
        index: 0,
        kind: DeviceKind::Cpu,
        name: "declared".into(),
        cores: 4,
        numa_node: Some(0),
        instruction_sets: vec!["avx2".into()],
        memory_bytes: 1 << 30,
        read_bandwidth_bytes_per_s: 10_000_000_000,
        matrix_flops: 1,
        is_virtual: true,
        cannot_run: None,
    };
    NodeSpec {
        id: id.into(),
        role: Role::Worker,
        incarnation: Incarnation(incarnation),
        version: "0.1.0".into(),
        level: forge_shared::version::LEVEL,
        address: format!("{id}:7100"),
        metrics_address: String::new(),
        data_plane: None,
        devices: vec![device],
    }
}

fn service(name: &str) -> ModelService {
    ModelService::new(name, ModelServiceSpec { model: "a/model".into(), replicas: 2, ..ModelServiceSpec::default() })
}

fn facts() -> ModelFacts {
    ModelFacts {
        layers: 2,
        context_length: 128,
        weights_bytes: 1 << 20,
        kv_slot_bytes: 64,
        workspace_bytes: 1 << 20,
        weights_digest: "sha256:ab".into(),
        shape: ModelShape::default(),
    }
}

/// Of the service that the targets begin with.
fn plan(epoch: u64) -> Plan {
    let memory = RankMemory { weights_bytes: 1 << 20, kv_bytes: 8 * 16 * 64, workspace_bytes: 1 << 20 };
    let rank = RankPlan {
        node: "w1".into(),
        device: 0,
        tensor_rank: 0,
        tensor_size: 1,
        expert_rank: 0,
        expert_size: 1,
        layers: 0..2,
        experts: 0..0,
        threads: 2,
        memory,
    };
    let spec = ModelServiceSpec::default();
    Plan {
        replica: replica(),
        epoch: Epoch(epoch),
        max_model_len: 128,
        block_size: spec.block_size,
        kv_blocks: 8,
        kv_cache_dtype: spec.kv_cache_dtype,
        max_step_tokens: spec.max_step_tokens,
        max_batch_size: spec.max_batch_size,
        ranks: vec![rank],
    }
}

fn replica() -> ReplicaId {
    ReplicaId { service: "demo".into(), index: 0 }
}

fn refusal() -> Refusal {
    Refusal {
        replica: replica(),
        wrong_setting: None,
        constraints: vec![FailedConstraint { constraint: "memory".into(), failed_devices: 1, devices: 2 }],
        nearest: vec![("max_model_len".into(), "64".into())],
    }
}

fn report(phase: ReplicaPhase, found_memory_bytes: Option<u64>) -> ReplicaReport {
    ReplicaReport { replica: replica(), epoch: Epoch(1), status: ReplicaStatus { phase, ..ReplicaStatus::placed() }, found_memory_bytes }
}

fn commit(basis: u64) -> Command {
    let plans = vec![PlannedReplica { plan: plan(1), generation: 1 }];
    Command::CommitPlans { basis: Revision(basis), plans, removed: Vec::new(), refusals: vec![refusal()], settled: Vec::new() }
}

fn put_token() -> Command {
    let token = JoinToken { id: "t1".into(), secret_sha256: "ab".repeat(32), role: Role::Worker, expires_ms: 9_000, uses_left: 2 };
    Command::PutJoinToken { token }
}

fn envelopes(commands: Vec<Command>) -> Vec<Envelope> {
    let envelope = |(number, command): (u64, Command)| Envelope {
        request_id: format!("r{number}"),
        proposed_ms: 1_000 + number * 100,
        traceparent: String::new(),
        command,
    };
    (0..).zip(commands).map(envelope).collect()
}

fn entries() -> Vec<(&'static str, Vec<Envelope>)> {
    let node = || "w1".into();
    let replica = vec![
        commit(4),
        Command::ReportReplica { node: node(), incarnation: Incarnation(1), report: report(ReplicaPhase::Ready, None) },
        Command::CommitPlans {
            basis: Revision(5),
            plans: Vec::new(),
            removed: vec![(self::replica(), Epoch(1))],
            refusals: Vec::new(),
            settled: Vec::new(),
        },
        Command::LoseNode { node: node(), incarnation: Incarnation(1), reason: "no heartbeat".into() },
        Command::RemoveNode { node: node() },
    ];
    let services = vec![
        Command::ApplyService { service: Box::new(service("other")) },
        Command::ScaleService { name: "demo".into(), replicas: 3 },
        Command::RecordFacts { name: "other".into(), generation: 1, facts: Ok(Box::new(facts())) },
        Command::RecordFacts { name: "demo".into(), generation: 1, facts: Err("no such model".into()) },
        Command::RecordWait { name: "other".into(), generation: 1, waits_for: "worker w1 is reading it".into() },
        Command::RaiseLevel { level: 2 },
        Command::UndoService { name: "demo".into(), to: Some(1) },
        Command::RecordRollout { name: "demo".into(), generation: 1, stuck: Some("no room".into()) },
        Command::DeleteService { name: "other".into() },
    ];
    let ca = |digits: &str| CaRecord { sha256: digits.repeat(32), certificate_pem: "pem".into() };
    let certificate = |serial: &str, role, name: &str| {
        let certificate = CertificateRecord {
            serial: serial.into(),
            role,
            name: name.into(),
            issued_s: 1,
            expires_s: 9_000,
            ca_sha256: ca("bb").sha256,
            believes: vec![ca("aa").sha256, ca("bb").sha256],
            is_used: true,
            written: Revision(0),
            revoked_s: None,
        };
        Command::RecordCertificate { certificate: Box::new(certificate), asked_with: None }
    };
    let certificates = vec![
        certificate("01", Role::Worker, "w1"),
        certificate("02", Role::Worker, "w2"),
        certificate("03", Role::Admin, "root"),
        certificate("04", Role::Admin, "other"),
        Command::PutMember { member: MemberRecord::new(3, "c1", "c1:7000", Default::default()) },
        certificate("05", Role::Coordinator, "c1"),
        Command::RevokeCertificates { serials: ["04".to_owned()].into(), holder: None, force: false },
        Command::BeginCaRotation { from: ca("aa"), to: ca("bb") },
        Command::AbandonCaRotation,
        Command::BeginCaRotation { from: ca("aa"), to: ca("bb") },
        Command::SwitchCa { to: ca("bb").sha256, force: false },
        Command::FinishCaRotation { to: ca("bb").sha256, force: false },
    ];
    let nodes = vec![
        Command::JoinNode { spec: Box::new(worker("w3", 7)) },
        Command::CordonNode { node: node(), cordoned: true },
        Command::DrainNode { node: node(), draining: true, is_forced: true },
        Command::JoinNode { spec: Box::new(worker("w1", 2)) },
        Command::PutMember { member: MemberRecord::new(3, "c1", "c1:7000", Default::default()) },
        Command::RemoveMember { id: 3 },
    ];
    let record = IdempotencyRecord {
        tenant: "anonymous".into(),
        key: "k".into(),
        body_sha256: "ab".repeat(32),
        clock_s: 1,
        numerics_id: "n".into(),
        expires_ms: 5_000,
    };
    let access = vec![
        put_token(),
        Command::UseJoinToken { id: "t1".into(), role: Role::Worker, node: "w9".into() },
        Command::RemoveJoinToken { id: "t1".into() },
        Command::RecordIdempotency { record },
        Command::RevokeKey { name: "k1".into() },
    ];
    [("replica", replica), ("services", services), ("nodes", nodes), ("access", access), ("certificates", certificates)]
        .map(|(name, commands)| (name, envelopes(commands)))
        .into()
}

/// States after these entries.
fn states() -> Vec<(&'static str, ClusterState)> {
    let after = |envelopes: &[Envelope]| {
        let mut state = ClusterState::new("seed");
        for (index, envelope) in (1..).zip(envelopes) {
            state.apply(Revision(index), envelope).0.unwrap_or_else(|error| panic!("{error}: {envelope:?}"));
        }
        state
    };
    let placed = vec![
        Command::JoinNode { spec: Box::new(worker("w1", 1)) },
        Command::ApplyService { service: Box::new(service("demo")) },
        Command::RecordFacts { name: "demo".into(), generation: 1, facts: Ok(Box::new(facts())) },
        commit(3),
    ];
    let named = vec![put_token(), Command::PutMember { member: MemberRecord::new(3, "c1", "c1:7000", Default::default()) }];
    vec![("empty", after(&[])), ("placed", after(&envelopes(placed))), ("named", after(&envelopes(named)))]
}

fn requests() -> Seeds {
    let execute = |command| wire::ExecuteRequest { request_id: "r1".into(), command_json: json(&command).into() };
    let key = NodeKey::generate().unwrap().signing_request_der().unwrap();
    let join = node_wire::JoinRequest {
        token_id: "t1".into(),
        token_secret: vec![1; 32].into(),
        role: "worker".into(),
        name: "w9".into(),
        signing_request_der: key.into(),
        address: String::new(),
        version: "0.1.0".into(),
        level: forge_shared::version::LEVEL,
    };
    vec![
        ("apply", lettered(b'e', &execute(Command::ApplyService { service: Box::new(service("other")) }))),
        ("cordon", lettered(b'e', &execute(Command::CordonNode { node: "w1".into(), cordoned: true }))),
        ("token", lettered(b'e', &execute(put_token()))),
        ("read", lettered(b'r', &wire::ReadRequest { kind: "node".into(), name: "w1".into(), is_local: true })),
        ("watch", lettered(b'w', &wire::WatchRequest { after_revision: 7, kinds: vec!["service".into(), "key".into()] })),
        ("plan", lettered(b'p', &wire::PlanRequest { service_json: json(&service("demo")).into() })),
        ("logs", lettered(b'l', &wire::LogsRequest { target: "demo/0".into(), is_node: false, follow: true, tail: 10 })),
        ("join", lettered(b'j', &join)),
    ]
}

fn sessions() -> Seeds {
    let hello = || NodeUp::Hello { spec: Box::new(worker("w1", 2)) };
    let usage = KeyUsage { key_id: "k1".into(), requests: 3, tokens: 90, refused: 1, held_rpm: Some(10), held_tpm: None };
    let load =
        ReplicaLoad { replica: "demo/0".into(), running: 1, waiting: 0, kv_blocks_used: 2, kv_blocks_total: 8, generated_tokens: 99 };
    let load = NodeLoad {
        resident_bytes: 1 << 28,
        replicas: vec![load],
        requests_in_progress: 0,
        serves: Some([("demo".into(), vec![Epoch(3)])].into()),
    };
    let replica = |phase, found| NodeUp::Replica { report: Box::new(report(phase, found)) };
    vec![
        ("heartbeat", lines(&[hello(), NodeUp::Heartbeat { number: 1, load, usage: vec![usage] }, NodeUp::Goodbye])),
        ("reports", lines(&[hello(), replica(ReplicaPhase::Loading, Some(1 << 29)), replica(ReplicaPhase::Ready, None)])),
        ("inspected", lines(&[hello(), NodeUp::Inspected { number: 1, result: Ok(Box::new(facts())) }])),
        ("refused", lines(&[NodeUp::Goodbye])),
    ]
}

fn replies() -> Seeds {
    let applied = Applied { revision: Revision(9), changed: true, existing: None };
    let member = MemberStatus {
        id: 1,
        name: "c1".into(),
        address: "c1:7000".into(),
        version: "0.1.0".into(),
        level: 1,
        is_voter: true,
        is_reachable: true,
        matched_index: 9,
    };
    let status = GroupStatus {
        cluster_id: "c".into(),
        group_id: "c".into(),
        member_id: 1,
        leader_id: 1,
        term: 2,
        commit_index: 9,
        applied_index: 9,
        revision: Revision(9),
        members: vec![member],
        version: "0.1.0".into(),
        level: forge_shared::version::LEVEL,
        older: Vec::new(),
    };
    let planned = PlannedService {
        service: service("demo"),
        changes: true,
        plans: vec![plan(1)],
        refused_devices: vec![("w2/0".into(), "too small".into())],
        notes: vec!["a note".into()],
    };
    let down = |message: NodeDown| lettered(b'd', &node_wire::SessionDown { message_json: json(&message).into() });
    let assignment = Assignment {
        plan: plan(1),
        service: Box::new(service("demo")),
        weights_digest: "sha256:ab".into(),
        drain_ms: Some(5_000),
        peers: Vec::new(),
    };
    let share = KeyShare { key_id: "k1".into(), rpm: Some(3), tpm: None };
    let detail = |error_json: Vec<u8>| wire::ErrorDetail { leader: "c2:7000".into(), is_retryable: true, error_json: error_json.into() };
    let missing = CommandError::NotFound { kind: "node".into(), name: "w".into(), nearest: Some("w1".into()) };
    let loads = ClusterLoads { nodes: vec![(worker("w1", 1), NodeLoad::default(), 20)] };
    let member = Object::Member(MemberRecord::new(1, "c1", "c1:7000", Default::default()));
    vec![
        ("applied", lettered(b'e', &wire::ExecuteReply { applied_json: json(&applied).into() })),
        ("objects", lettered(b'r', &wire::ReadReply { revision: 9, objects_json: vec![json(&member).into()] })),
        ("status", lettered(b's', &wire::StatusReply { status_json: json(&status).into() })),
        ("planned", lettered(b'p', &wire::PlanReply { planned_json: json(&planned).into() })),
        ("loads", lettered(b'l', &wire::LoadsReply { loads_json: json(&loads).into() })),
        ("welcome", down(NodeDown::Welcome { lease_ms: 3_000, heartbeat_ms: 500 })),
        ("ack", down(NodeDown::Ack { number: 4, lease_ms: 3_000, shares: vec![share] })),
        ("assignments", down(NodeDown::Assignments { history: "g".into(), revision: Revision(9), assignments: vec![assignment] })),
        ("moved", down(NodeDown::Moved { leader: Some("c2:7000".into()) })),
        ("missing", lettered(b'x', &detail(json(&missing)))),
        ("not_placeable", lettered(b'x', &detail(json(&refusal())))),
        ("not_leader", lettered(b'x', &detail(Vec::new()))),
    ]
}

fn watches() -> Seeds {
    let (_, placed) = states().remove(1);
    let event = |object: &Object| Event { revision: Revision(4), change: Change::Put { object: object.clone() } };
    let objects: Vec<Object> = [Kind::Node, Kind::Service].into_iter().flat_map(|kind| placed.objects(kind)).collect();
    let listing = wire::WatchBatch {
        revision: 4,
        events_json: objects.iter().map(|object| json(&event(object)).into()).collect(),
        is_reset: true,
        is_reset_end: true,
    };
    let deleted = Event { revision: Revision(6), change: Change::Deleted { kind: Kind::Node, name: "w1".into() } };
    let change = |revision, events: &[Event]| wire::WatchBatch {
        revision,
        events_json: events.iter().map(|event| json(event).into()).collect(),
        is_reset: false,
        is_reset_end: false,
    };
    let (begin, end) = (
        wire::WatchBatch { is_reset_end: false, revision: 0, ..listing.clone() },
        wire::WatchBatch { is_reset_end: true, ..change(5, &[]) },
    );
    let framed = |batches: &[&wire::WatchBatch]| -> Vec<u8> {
        let framed = batches.iter().map(|batch| batch.encode_to_vec());
        framed.flat_map(|bytes| [(bytes.len() as u16).to_le_bytes().to_vec(), bytes].concat()).collect()
    };
    vec![
        ("listing", framed(&[&listing, &change(6, &[deleted])])),
        ("in_parts", framed(&[&begin, &end])),
        ("quiet", framed(&[&change(1, &[]), &change(2, &[])])),
    ]
}

/// Other ones each time they are made.
fn certificates() -> Seeds {
    let now_s = 1_700_000_000;
    let ca = ClusterCa::create("seed", now_s).unwrap();
    let key = NodeKey::generate().unwrap();
    let identity = Identity::new("seed", Role::Worker, "w1").unwrap();
    let worker = ca.sign(&key.signing_request_der().unwrap(), &identity, CA_LIFETIME, now_s).unwrap();
    let reply = node_wire::JoinReply {
        cluster_id: "seed".into(),
        certificate_pem: worker.clone(),
        ca_certificate_pem: ca.certificate_pem().into(),
        coordinators: vec!["c1:7000".into()],
        ca_key_pem: String::new(),
        member_id: 0,
    };
    let der = |pem: &str| forge_cluster::tls::fuzz::der(pem).unwrap();
    vec![
        ("ca.der", der(ca.certificate_pem())),
        ("worker.der", der(&worker)),
        ("files.pem", format!("{worker}{}", ca.certificate_pem()).into_bytes()),
        ("join_reply", reply.encode_to_vec()),
    ]
}

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target)
}

#[test]
fn seeds_of_the_cluster_are_taken() {
    let is_writing = std::env::var_os("FORGE_TEST_WRITE_SEEDS").is_some();
    let member = MemberFile {
        member_id: 3,
        group_id: "c".into(),
        is_founder: false,
        peers: vec![MemberRecord::new(1, "c1", "c1:7000", Default::default())],
    };
    let founder = MemberFile { is_founder: true, peers: Vec::new(), ..member.clone() };
    let restored = MemberFile { group_id: "c-0badcafe".into(), ..founder.clone() };
    let members = [("member", member), ("founder", founder), ("restored", restored)].map(|(name, file)| (name, json(&file))).into();
    let snapshots: Seeds = states().into_iter().map(|(name, state)| (name, state.encode())).collect();
    let backup = |(name, snapshot): &(&'static str, Vec<u8>)| {
        let file = write_backup("seed", Revision(4), snapshot, 1_700_000_000_000).unwrap();
        (*name, file.to_vec())
    };
    let backups = snapshots.iter().map(backup).collect();
    let envelopes: Seeds = entries().into_iter().map(|(name, entries)| (name, lines(&entries))).collect();
    let targets: [(&str, Seeds); 9] = [
        ("envelopes", envelopes),
        ("snapshot", snapshots),
        ("backup", backups),
        ("member_file", members),
        ("coordinator_request", requests()),
        ("node_session", sessions()),
        ("coordinator_reply", replies()),
        ("watch", watches()),
        ("certificate", certificates()),
    ];
    for (target, seeds) in targets {
        for (name, bytes) in seeds {
            let path = folder(target).join(name);
            if is_writing {
                std::fs::create_dir_all(folder(target)).unwrap();
                std::fs::write(&path, &bytes).unwrap();
            }
            let found = std::fs::read(&path).unwrap_or_default();
            assert!(!found.is_empty(), "{target}/{name} is missing: write it with FORGE_TEST_WRITE_SEEDS=1");
            run(target, &bytes);
            run(target, &found);
        }
    }
}
