use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{ApiKeyRecord, Command, CommandError, IdempotencyRecord, JoinToken, MemberRecord, PlannedReplica};
use forge_shared::cluster::event::{Change, Kind, Object};
use forge_shared::cluster::node::{NodePhase, Role};
use forge_shared::cluster::service::{Facts, ReplicaPhase, ReplicaReport, ReplicaStatus, ServiceRecord};
use forge_shared::ids::{Epoch, Incarnation, NodeId, ReplicaId, ServiceName};
use forge_shared::plan::{Plan, Refusal};
use forge_shared::spec::{Layout, ModelServiceSpec};

use super::test_support::*;
use super::*;

fn plan_on(node: &str, replica: ReplicaId, epoch: u64, mib: u64) -> Plan {
    let spec = ModelServiceSpec::default();
    Plan {
        replica,
        epoch: Epoch(epoch),
        max_model_len: 8192,
        block_size: spec.block_size,
        kv_blocks: 512,
        kv_cache_dtype: spec.kv_cache_dtype,
        max_step_tokens: spec.max_step_tokens,
        max_batch_size: spec.max_batch_size,
        ranks: vec![whole_rank(node, 0, 30, mib * MIB)],
    }
}

fn commit(world: &World, plans: Vec<Plan>, removed: Vec<(ReplicaId, Epoch)>) -> Command {
    let generation = |plan: &Plan| world.state.services().get(&plan.replica.service).map_or(1, |service| service.generation);
    let plans = plans.into_iter().map(|plan| PlannedReplica { generation: generation(&plan), plan }).collect();
    Command::CommitPlans { basis: world.state.revision(), plans, removed, refusals: Vec::new(), settled: Vec::new() }
}

/// Two workers of 1,000 MiB and a service of known facts.
fn ready(replicas: u32) -> World {
    let mut world = World::new();
    world.join("w1", 1, &[1000]).expect("joins");
    world.join("w2", 1, &[1000]).expect("joins");
    world.apply("demo", ModelServiceSpec { replicas, ..Default::default() }).expect("applies");
    world.record_facts("demo", facts(100)).expect("known");
    world
}

fn demo(world: &World) -> &ServiceRecord {
    &world.state.services()[&ServiceName::from("demo")]
}

fn place(world: &mut World, node: &str, index: u32, epoch: u64) {
    let command = commit(world, vec![plan_on(node, id("demo", index), epoch, 400)], vec![]);
    assert!(world.run(command).expect("fits").changed);
}

#[test]
fn a_request_id_is_applied_once() {
    let mut world = World::new();
    let envelope = world.envelope(Command::ApplyService { service: Box::new(service("demo", Default::default())) });
    let first = world.run_envelope(&envelope);
    assert!(first.as_ref().is_ok_and(|applied| applied.changed && applied.revision == Revision(1)), "{first:?}");
    assert_eq!(world.run_envelope(&envelope), first);
    assert!(world.changes.is_empty());
    let mut other = envelope.clone();
    other.command = Command::DeleteService { name: ServiceName::from("demo") };
    assert!(matches!(world.run_envelope(&other), Err(CommandError::Conflict { .. })));
    // An error is remembered too.
    other.request_id = "e".into();
    other.command = Command::RevokeKey { name: "nobody".into() };
    let refused = world.run_envelope(&other);
    assert!(matches!(refused, Err(CommandError::NotFound { .. })));
    assert_eq!(world.run_envelope(&other), refused);
    assert_eq!(world.state.revision(), Revision(1));
}

#[test]
fn replies_are_bounded_and_the_oldest_goes_first() {
    let mut world = World::new();
    let first = world.envelope(Command::RevokeKey { name: "nobody".into() });
    world.run_envelope(&first).expect_err("unknown");
    for _ in 0..MAX_ASKED_REPLIES {
        world.run(Command::RevokeKey { name: "nobody".into() }).expect_err("unknown");
    }
    let reused = Envelope { command: Command::RevokeKey { name: "somebody".into() }, ..first };
    assert!(matches!(world.run_envelope(&reused), Err(CommandError::NotFound { name, .. }) if name == "somebody"));
}

#[test]
fn incarnations_fence_nodes() {
    let mut world = ready(1);
    assert!(!world.join("w1", 1, &[1000]).expect("again").changed);
    place(&mut world, "w1", 0, 1);
    assert!(world.join("w1", 3, &[1000]).expect("newer").changed);
    assert!(demo(&world).replicas.is_empty(), "epochs of the older process are closed");
    let older = world.join("w1", 2, &[1000]);
    assert!(matches!(older, Err(CommandError::Stale { .. })), "{older:?}");
    assert!(!world.lose("w1", 2).expect("older loss").changed);
    assert_eq!(world.state.nodes()[&NodeId::from("w1")].phase, NodePhase::Ready);
    assert!(world.lose("w1", 3).expect("loss").changed);
    assert!(!world.lose("w1", 3).expect("again").changed);
    assert!(world.join("w1", 3, &[1000]).expect("the lease ran out, the process lives").changed);
    let mut twin = worker("w1", 3, &[1000]);
    twin.address = "elsewhere:7100".into();
    assert!(matches!(world.run(Command::JoinNode { spec: Box::new(twin) }), Err(CommandError::Conflict { .. })));
}

#[test]
fn a_removed_node_comes_back_only_anew() {
    let mut world = ready(1);
    let remove = || Command::RemoveNode { node: NodeId::from("w1") };
    assert!(matches!(world.run(remove()), Err(CommandError::Conflict { .. })));
    world.lose("w1", 1).expect("lost");
    assert!(world.run(remove()).expect("removed").changed);
    assert!(matches!(world.join("w1", 1, &[1000]), Err(CommandError::Stale { .. })));
    assert!(world.join("w1", 2, &[1000]).expect("anew").changed);
}

#[test]
fn a_name_for_clients_belongs_to_one_service() {
    let mut world = World::new();
    let named = |name: Option<&str>| ModelServiceSpec { model_name: name.map(str::to_owned), ..Default::default() };
    world.apply("first", named(Some("chat"))).expect("applies");
    let refused = world.apply("second", named(Some("chat")));
    assert!(matches!(&refused, Err(CommandError::Invalid { field, .. }) if field == "spec.modelName"), "{refused:?}");
    let refused = world.apply("chat", named(None));
    assert!(matches!(&refused, Err(CommandError::Invalid { field, .. }) if field == "metadata.name"), "{refused:?}");
    assert!(world.apply("second", named(Some("first"))).is_err());
    // A model may be served twice: its own name stands for the older service, and an event says so.
    world.apply("second", named(Some("draft"))).expect("applies");
    let shared = |world: &World| world.state.notices().filter(|notice| notice.reason == "ModelNameShared").count();
    assert_eq!(shared(&world), 1);
    world.apply("first", named(Some("talk"))).expect("applies");
    world.apply("third", named(Some("chat"))).expect("the name is free again");
    let created = |name: &str| world.state.services()[&ServiceName::from(name)].created;
    assert!(created("first") < created("second") && created("second") < created("third"));
    assert_eq!(shared(&world), 2);
}

#[test]
fn the_same_wish_changes_nothing_and_scaling_is_no_new_generation() {
    let mut world = ready(1);
    let revision = world.state.revision();
    let wish = ModelServiceSpec { replicas: 1, ..Default::default() };
    assert!(!world.apply("demo", wish.clone()).expect("same").changed);
    assert_eq!(world.state.revision(), revision);
    world.run(Command::ScaleService { name: ServiceName::from("demo"), replicas: 3 }).expect("scaled");
    assert_eq!((demo(&world).generation, demo(&world).service.spec.replicas), (1, 3));
    assert!(matches!(demo(&world).facts, Facts::Known { .. }));
    place(&mut world, "w1", 0, 1);
    world.apply("demo", ModelServiceSpec { max_batch_size: 8, replicas: 3, ..wish }).expect("changed");
    assert_eq!((demo(&world).generation, &demo(&world).facts), (2, &Facts::NEW));
    assert_eq!(demo(&world).older[0].service.spec.max_batch_size, 32);
    assert_eq!(demo(&world).older[0].weights_digest, "d1");
}

#[test]
fn wrong_wishes_name_field_and_remedy() {
    let mut world = World::new();
    let mut field = |name: &str, spec: ModelServiceSpec| match world.apply(name, spec) {
        Err(CommandError::Invalid { field, reason }) => {
            assert!(!reason.is_empty());
            field
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(field("a/b", Default::default()), "metadata.name");
    assert_eq!(field("a", ModelServiceSpec { replicas: 0, ..Default::default() }), "spec.replicas");
    assert_eq!(field("a", ModelServiceSpec { replicas: 5_000, ..Default::default() }), "spec.replicas");
    assert_eq!(
        field("a", ModelServiceSpec { layout: Layout { tensor: 9, ..Layout::default() }, ..Default::default() }),
        "spec.layout.tensor"
    );
    assert_eq!(field("a", ModelServiceSpec { chat_template: Some("x".repeat(70_000)), ..Default::default() }), "spec");
}

#[test]
fn the_nearest_name_is_offered() {
    let mut world = ready(1);
    let error = world.run(Command::ScaleService { name: ServiceName::from("dem"), replicas: 1 }).expect_err("unknown");
    assert!(error.to_string().contains("did you mean \"demo\""), "{error}");
}

#[test]
fn facts_of_another_generation_change_nothing_and_a_failed_model_is_tried_again_when_wished_again() {
    let mut world = ready(1);
    let name = ServiceName::from("demo");
    let stale = Command::RecordFacts { name: name.clone(), generation: 7, facts: Err("no".into()) };
    assert!(!world.run(stale).expect("stale").changed);
    world.apply("demo", ModelServiceSpec { block_size: 32, ..Default::default() }).expect("changed");
    world.run(Command::RecordFacts { name: name.clone(), generation: 2, facts: Err("no such file".into()) }).expect("failed");
    assert!(matches!(&demo(&world).facts, Facts::Failed { reason } if reason == "no such file"));
    assert!(world.apply("demo", ModelServiceSpec { block_size: 32, ..Default::default() }).expect("again").changed);
    assert_eq!((demo(&world).generation, &demo(&world).facts), (2, &Facts::NEW));
    let mut lies = facts(100);
    lies.shape.layer_bytes.pop();
    let facts = Ok(Box::new(lies));
    assert!(matches!(world.run(Command::RecordFacts { name, generation: 2, facts }), Err(CommandError::Invalid { .. })));
}

#[test]
fn commits_are_checked() {
    let mut world = ready(2);
    let good = || plan_on("w1", id("demo", 0), 1, 400);
    let refused = |world: &mut World, plan: Plan, word: &str| {
        let before = world.state.services().clone();
        let command = commit(world, vec![plan], vec![]);
        let error = world.run(command).expect_err(word).to_string();
        assert!(error.contains(word), "{error}");
        assert_eq!(*world.state.services(), before);
    };
    refused(&mut world, Plan { replica: id("demo", 2), ..good() }, "beyond the 2 replicas");
    refused(&mut world, Plan { epoch: Epoch(0), ..good() }, "epoch");
    refused(&mut world, plan_on("w3", id("demo", 0), 1, 400), "takes no replicas");
    refused(&mut world, plan_on("w1", id("demo", 0), 1, 1001), "would be given");
    refused(&mut world, Plan { block_size: 8, ..good() }, "service's");
    refused(&mut world, Plan { kv_blocks: 1, ..good() }, "KV slots");
    refused(&mut world, Plan { ranks: vec![], ..good() }, "ranks");
    refused(&mut world, Plan { ranks: vec![whole_rank("w1", 0, 29, MIB)], ..good() }, "29 of 30 layers");
    refused(&mut world, Plan { ranks: vec![whole_rank("w1", 4, 30, MIB)], ..good() }, "no device 4");
    world.run(Command::CordonNode { node: NodeId::from("w2"), cordoned: true }).expect("cordoned");
    refused(&mut world, plan_on("w2", id("demo", 0), 1, 400), "takes no replicas");
    // Two at once on one device are counted together, and one of the two is not taken alone.
    let both = commit(&world, vec![plan_on("w1", id("demo", 0), 1, 600), plan_on("w1", id("demo", 1), 2, 600)], vec![]);
    world.run(both).expect_err("too much together");
    assert!(demo(&world).replicas.is_empty());
    place(&mut world, "w1", 0, 5);
    refused(&mut world, plan_on("w1", id("demo", 1), 5, 100), "epoch");
    refused(&mut world, plan_on("w1", id("demo", 1), 6, 601), "would be given");
}

#[test]
fn a_commit_on_an_old_basis_is_refused_but_progress_does_not_make_it_old() {
    let mut world = ready(2);
    place(&mut world, "w1", 0, 1);
    let second = commit(&world, vec![plan_on("w2", id("demo", 1), 2, 400)], vec![]);
    world.report(&id("demo", 0), Epoch(1), ReplicaPhase::Ready).expect("reports");
    world.run(second).expect("progress moves nothing");
    let third = commit(&world, vec![], vec![(id("demo", 1), Epoch(2))]);
    world.run(Command::CordonNode { node: NodeId::from("w2"), cordoned: true }).expect("cordoned");
    assert!(matches!(world.run(third), Err(CommandError::Stale { .. })));
}

#[test]
fn a_superseded_replica_serves_until_it_is_removed_step_by_step() {
    let mut world = ready(1);
    place(&mut world, "w1", 0, 1);
    world.report(&id("demo", 0), Epoch(1), ReplicaPhase::Ready).expect("ready");
    place(&mut world, "w2", 0, 2);
    assert_eq!((demo(&world).replicas.len(), demo(&world).leaving.len()), (1, 1));
    assert!(!demo(&world).leaving[0].is_draining);
    let old = || vec![(id("demo", 0), Epoch(1))];
    let command = commit(&world, vec![], old());
    world.run(command).expect("drains");
    assert!(demo(&world).leaving[0].is_draining);
    world.report(&id("demo", 0), Epoch(1), ReplicaPhase::Stopped).expect("ended");
    assert!(demo(&world).leaving.is_empty());
    let command = commit(&world, vec![], old());
    assert!(matches!(world.run(command), Err(CommandError::Stale { .. })));
    assert_eq!(demo(&world).replicas[0].plan.epoch, Epoch(2));
}

#[test]
fn a_deleted_service_goes_with_its_last_replica_and_its_epochs_are_not_given_again() {
    let mut world = ready(2);
    place(&mut world, "w1", 0, 1);
    place(&mut world, "w2", 1, 2);
    world.report(&id("demo", 0), Epoch(1), ReplicaPhase::Ready).expect("ready");
    let name = ServiceName::from("demo");
    world.run(Command::DeleteService { name: name.clone() }).expect("deleted");
    assert!(demo(&world).is_deleted && demo(&world).leaving.len() == 1);
    assert!(matches!(world.run(Command::DeleteService { name: name.clone() }), Err(CommandError::NotFound { .. })));
    world.report(&id("demo", 0), Epoch(1), ReplicaPhase::Stopped).expect("ended");
    assert!(world.state.services().is_empty());
    assert!(world.changes.iter().any(|change| matches!(change, Change::Deleted { kind: Kind::Service, name } if name == "demo")));
    world.apply("demo", Default::default()).expect("made again");
    assert_eq!(demo(&world).last_epoch, Epoch(2));
}

#[test]
fn reports_are_fenced_by_node_incarnation_and_epoch() {
    let mut world = ready(1);
    place(&mut world, "w1", 0, 3);
    let mut report = |node: &str, incarnation: u64, epoch: u64, phase: ReplicaPhase| {
        let status = ReplicaStatus { phase, percent: 10, ..ReplicaStatus::placed() };
        let report = ReplicaReport { replica: id("demo", 0), epoch: Epoch(epoch), status, found_memory_bytes: None };
        world
            .run(Command::ReportReplica { node: NodeId::from(node), incarnation: Incarnation(incarnation), report })
            .map(|done| done.changed)
    };
    assert_eq!(report("w1", 1, 2, ReplicaPhase::Ready), Ok(false));
    assert_eq!(report("w1", 2, 3, ReplicaPhase::Ready), Ok(false));
    assert_eq!(report("w2", 1, 3, ReplicaPhase::Ready), Ok(false));
    assert_eq!(report("w9", 1, 3, ReplicaPhase::Ready), Ok(false));
    assert_eq!(report("w1", 1, 3, ReplicaPhase::Pulling), Ok(true));
    assert_eq!(report("w1", 1, 3, ReplicaPhase::Failed), Ok(true));
    assert_eq!(report("w1", 1, 3, ReplicaPhase::Ready), Ok(false), "given up is given up");
}

#[test]
fn a_node_that_lied_about_its_memory_is_believed_no_more_than_was_found() {
    let mut world = ready(1);
    place(&mut world, "w1", 0, 1);
    let status = ReplicaStatus { phase: ReplicaPhase::Failed, ..ReplicaStatus::placed() };
    let report = ReplicaReport { replica: id("demo", 0), epoch: Epoch(1), status, found_memory_bytes: Some(300 * MIB) };
    world.run(Command::ReportReplica { node: NodeId::from("w1"), incarnation: Incarnation(1), report }).expect("reported");
    assert_eq!(world.state.nodes()[&NodeId::from("w1")].spec.devices[0].memory_bytes, 300 * MIB);
    let command = commit(&world, vec![plan_on("w1", id("demo", 0), 2, 400)], vec![]);
    world.run(command).expect_err("not again");
    world.lose("w1", 1).expect("lost");
    world.join("w1", 1, &[1000]).expect("the same process");
    assert_eq!(world.state.nodes()[&NodeId::from("w1")].spec.devices[0].memory_bytes, 300 * MIB);
    world.join("w1", 2, &[1000]).expect("a new process is believed anew");
    assert_eq!(world.state.nodes()[&NodeId::from("w1")].spec.devices[0].memory_bytes, 1000 * MIB);
}

#[test]
fn a_node_that_is_drained_by_force_is_so_after_it_begins_anew() {
    let mut world = ready(1);
    world.run(Command::DrainNode { node: NodeId::from("w1"), draining: true, is_forced: true }).expect("drained");
    for incarnation in [1, 2] {
        world.lose("w1", 1).expect("lost");
        world.join("w1", incarnation, &[1000]).expect("back");
        let node = &world.state.nodes()[&NodeId::from("w1")];
        assert_eq!((node.cordoned, node.draining, node.is_forced), (true, true, true), "incarnation {incarnation}");
    }
}

#[test]
fn refusals_are_said_once_and_until_they_are_settled() {
    let mut world = ready(1);
    let refusal = Refusal { replica: id("demo", 0), wrong_setting: None, constraints: vec![], nearest: vec![] };
    let say = |world: &World, refusals, settled| Command::CommitPlans {
        basis: world.state.revision(),
        plans: vec![],
        removed: vec![],
        refusals,
        settled,
    };
    let is_noticed = |world: &World| {
        world.changes.iter().any(|change| matches!(change, Change::Put { object: Object::Notice(n) } if n.reason == "NotPlaceable"))
    };
    let said = say(&world, vec![refusal.clone()], vec![]);
    assert!(world.run(said).expect("said").changed);
    assert!(is_noticed(&world));
    assert_eq!(demo(&world).refusal.as_ref(), Some(&refusal));
    let nothing = say(&world, vec![], vec![]);
    assert!(!world.run(nothing).expect("of others").changed);
    assert_eq!(demo(&world).refusal.as_ref(), Some(&refusal));
    let twice = say(&world, vec![refusal.clone()], vec!["demo".into()]);
    world.run(twice).expect_err("one or the other");
    let other = Refusal { wrong_setting: Some("x".into()), ..refusal };
    let said = say(&world, vec![other.clone()], vec![]);
    world.run(said).expect("said otherwise");
    assert!(!is_noticed(&world));
    assert_eq!(demo(&world).refusal, Some(other));
    let settled = say(&world, vec![], vec!["demo".into()]);
    world.run(settled).expect("unsaid");
    assert_eq!(demo(&world).refusal, None);
}

fn token(expires_ms: u64, uses_left: u32) -> JoinToken {
    JoinToken { id: "t1".into(), secret_sha256: "0".repeat(64), role: Role::Worker, expires_ms, uses_left }
}

#[test]
fn tokens_let_in_as_many_as_they_say_of_their_role_in_their_time() {
    let mut world = World::new();
    let enter = |role| Command::UseJoinToken { id: "t1".into(), role, node: "w1".into() };
    world.run(Command::PutJoinToken { token: token(world.now_ms + 60_000, 2) }).expect("kept");
    assert!(matches!(world.run(enter(Role::Gateway)), Err(CommandError::Token { .. })));
    world.run(enter(Role::Worker)).expect("first");
    let last = world.envelope(enter(Role::Worker));
    let second = world.run_envelope(&last).expect("second");
    assert!(matches!(world.run(enter(Role::Worker)), Err(CommandError::Token { .. })));
    // Whose answer was lost asks again, and is known; used up the token stays until its end.
    assert!(world.state.was_taken(&last.request_id, &last.command) && !world.state.was_taken("other", &last.command));
    assert_eq!(world.run_envelope(&last), Ok(second));
    assert_eq!(world.state.token("t1").map(|token| token.uses_left), Some(0));
    world.run(Command::PutJoinToken { token: token(world.now_ms + 60_000, 1) }).expect("kept");
    world.now_ms += 60_000;
    assert!(matches!(world.run(enter(Role::Worker)), Err(CommandError::Token { .. })));
    assert!(world.run(Command::PutJoinToken { token: token(world.now_ms, 1) }).is_err());
}

#[test]
fn tokens_that_are_used_up_make_room_for_others() {
    let mut world = World::new();
    let named = |number: usize, now_ms: u64| JoinToken { id: format!("t{number}"), ..token(now_ms + 60_000, 1) };
    for number in 0..MAX_TOKENS {
        world.run(Command::PutJoinToken { token: named(number, world.now_ms) }).expect("kept");
    }
    let one_more = Command::PutJoinToken { token: named(MAX_TOKENS, world.now_ms) };
    assert!(matches!(world.run(one_more.clone()), Err(CommandError::TooMany { .. })));
    world.run(Command::UseJoinToken { id: "t7".into(), role: Role::Worker, node: "w1".into() }).expect("lets in");
    world.run(one_more).expect("there is room");
    assert!(world.state.token("t7").is_none() && world.state.tokens().count() == MAX_TOKENS);
}

#[test]
fn a_clock_that_jumped_leaves_tokens_and_records_usable() {
    let mut world = World::new();
    let now_ms = world.now_ms;
    let record = |key: &str, expires_ms| IdempotencyRecord {
        tenant: "k".into(),
        key: key.into(),
        body_sha256: "0".repeat(64),
        clock_s: 1,
        numerics_id: "n".into(),
        expires_ms,
    };
    world.run(Command::RecordIdempotency { record: record("before", now_ms + 900_000) }).expect("kept");
    world.now_ms = now_ms + 3_600_000;
    world.run(Command::PutMember { member: MemberRecord::new(1, "c1", "c1:7000", Default::default()) }).expect("an hour ahead");
    assert!(world.state.idempotency("k", "before").is_some(), "a jump does not end a record");
    world.now_ms = now_ms + 1_000;
    world.run(Command::PutJoinToken { token: token(now_ms + 61_000, 1) }).expect("is not born dead");
    world.run(Command::RecordIdempotency { record: record("after", now_ms - 1) }).expect("a gateway's clock may be behind");
    assert!(world.state.token("t1").is_some() && world.state.idempotency("k", "after").is_some());
    world.now_ms += 60_000;
    assert!(world.run(Command::UseJoinToken { id: "t1".into(), role: Role::Worker, node: "w".into() }).is_err(), "and not immortal");
}

#[test]
fn an_idempotent_request_finds_its_first_record() {
    let mut world = World::new();
    let record = |body: &str| IdempotencyRecord {
        tenant: "k".into(),
        key: "a key".into(),
        body_sha256: body.repeat(64),
        clock_s: 1,
        numerics_id: "n".into(),
        expires_ms: world.now_ms + 900_000,
    };
    let (first, second) = (record("0"), record("1"));
    assert_eq!(world.run(Command::RecordIdempotency { record: first.clone() }).expect("new").existing, None);
    assert_eq!(world.run(Command::RecordIdempotency { record: second }).expect("known").existing, Some(first.clone()));
    // Any replica could answer a retry of one without numerics, with other tokens.
    let unbound = IdempotencyRecord { key: "other".into(), numerics_id: String::new(), ..first };
    let refused = world.run(Command::RecordIdempotency { record: unbound });
    assert!(matches!(&refused, Err(CommandError::Invalid { field, .. }) if field == "record.numericsId"), "{refused:?}");
}

#[test]
fn keys_and_members_keep_their_names() {
    let mut world = World::new();
    let key = ApiKeyRecord {
        id: "abcd".into(),
        name: "team".into(),
        created_s: 1,
        revoked_s: None,
        rpm: None,
        tpm: None,
        salt: "0".repeat(32),
        hash: "1".repeat(64),
    };
    let put = |key: &ApiKeyRecord| Command::PutKey { key: Box::new(key.clone()) };
    world.run(put(&key)).expect("new");
    world.run(put(&ApiKeyRecord { rpm: Some(5), ..key.clone() })).expect("limits may change");
    world.run(put(&ApiKeyRecord { hash: "2".repeat(64), ..key.clone() })).expect_err("another secret");
    world.run(put(&ApiKeyRecord { name: "other".into(), ..key.clone() })).expect_err("the same id");
    world.run(Command::RevokeKey { name: "team".into() }).expect("revoked");
    assert!(!world.run(Command::RevokeKey { name: "team".into() }).expect("again").changed);
    world.run(put(&key)).expect_err("revoked for good");
    let member = |id, name: &str| Command::PutMember { member: MemberRecord::new(id, name, "c:7000", Default::default()) };
    world.run(member(1, "c1")).expect("new");
    world.run(member(2, "c1")).expect_err("one name");
    world.run(member(0, "c0")).expect_err("no id");
    world.run(Command::RemoveMember { id: 1 }).expect("removed");
    world.run(Command::RemoveMember { id: 1 }).expect_err("gone");
}

#[test]
fn notices_are_a_ring() {
    let mut world = World::new();
    for number in 0..MAX_NOTICES as u64 {
        world.join("w1", number + 1, &[10]).expect("newer");
    }
    world.join("w1", 5_000, &[10]).expect("newer");
    assert_eq!(world.state.notices().count(), MAX_NOTICES);
    assert_eq!(world.state.notices().last().map(|notice| notice.number), Some(MAX_NOTICES as u64 + 1));
}

#[test]
fn snapshots_are_read_as_written_and_damage_is_refused() {
    let mut world = ready(2);
    place(&mut world, "w1", 0, 1);
    world.run(Command::PutJoinToken { token: token(world.now_ms + 60_000, 2) }).expect("kept");
    let bytes = world.state.encode();
    let read = ClusterState::decode(&bytes).expect("own bytes");
    assert_eq!(read, world.state);
    assert_eq!(read.encode(), bytes);
    let newer = String::from_utf8(bytes.clone()).expect("text").replacen("state 2 ", "state 3 ", 1);
    assert_eq!(ClusterState::decode(newer.as_bytes()), Err(StateError::Newer { found: 3, known: 2 }));
    for end in (0..bytes.len()).step_by(97) {
        assert!(matches!(ClusterState::decode(&bytes[..end]), Err(StateError::Damaged { .. })), "{end}");
    }
    let mut flipped = bytes.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    assert!(matches!(ClusterState::decode(&flipped), Err(StateError::Damaged { .. })));
}
