//! What must not harm a cluster: each gets a typed error, and the cluster goes on.

use std::time::{Duration, Instant};

use forge_cluster::api::{ClusterApi, ClusterError, Session};
use forge_cluster::tls::{ChannelOptions, NODE_LIFETIME, PeerName, SharedCredentials, channel};
use forge_coordinator::raft::transport::stating;
use forge_proto::raft as wire;
use forge_proto::raft::raft_client::RaftClient;
use forge_shared::cluster::command::Command;
use forge_shared::cluster::event::{Kind, Object};
use forge_shared::cluster::node::{NodeRecord, NodeSpec, Role};
use forge_shared::cluster::service::{ReplicaPhase, ReplicaReport, ReplicaStatus};
use forge_shared::cluster::session::{NodeDown, NodeUp};
use forge_shared::ids::{Epoch, ReplicaId};
use forge_shared::spec::ByteSize;
use forge_shared::version::Build;
use tonic::{Code, Status};

use crate::support::{
    CLUSTER, Cluster, SOON, Worker, credentials, execute, facts, now_s, ready_on, service, wait_ready, wish, worker_spec,
};

fn join(cluster: &Cluster, name: &str) -> Worker {
    Worker::start(cluster.client(Role::Worker, name), worker_spec(name, 1))
}

async fn node(admin: &dyn ClusterApi, name: &str) -> NodeRecord {
    let begun = Instant::now();
    loop {
        let listing = admin.read(Kind::Node, Some(name.into()), SOON).await.expect("it answers");
        if let Some(Object::Node(record)) = listing.objects.into_iter().next() {
            return *record;
        }
        assert!(begun.elapsed() < SOON, "{name} joins");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A session by hand, welcomed.
async fn session(cluster: &Cluster, spec: NodeSpec) -> Session {
    let client = cluster.client(Role::Worker, &spec.id.0);
    let mut session = client.session(spec, SOON).await.expect("it is answered");
    let first = tokio::time::timeout(SOON, session.down.recv()).await.expect("in time");
    assert!(matches!(first, Some(NodeDown::Welcome { .. })), "{first:?}");
    session
}

fn replica(phase: ReplicaPhase, epoch: u64, found_memory_bytes: Option<u64>) -> NodeUp {
    let status = ReplicaStatus { phase, ..ReplicaStatus::placed() };
    let replica = ReplicaId { service: "s".into(), index: 0 };
    NodeUp::Replica { report: Box::new(ReplicaReport { replica, epoch: Epoch(epoch), status, found_memory_bytes }) }
}

/// What a coordinator answers to a batch of messages from this caller.
async fn push(cluster: &Cluster, role: Role, name: &str, batch: wire::MessageBatch) -> Status {
    let identity = SharedCredentials::new(credentials(&cluster.ca, role, name, now_s(), NODE_LIFETIME));
    let to = PeerName::Any(Role::Coordinator);
    let channel = channel(&cluster.members[0].address, &to, &identity, ChannelOptions::default()).expect("a channel");
    let mut client = RaftClient::new(channel).max_encoding_message_size(64 << 20);
    client.messages(stating(&Build::default(), futures::stream::iter([batch]))).await.expect_err("it is refused")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_message_of_a_member_is_refused_and_the_group_goes_on() {
    let cluster = Cluster::found().await;
    let batch = |messages| wire::MessageBatch { cluster_id: CLUSTER.into(), messages };
    let message = |kind| wire::Message { kind, from: 1, to: 1, term: 9, ..wire::Message::default() };
    for role in [Role::Worker, Role::Gateway, Role::Admin] {
        let refused = push(&cluster, role, "c1", batch(vec![message(8)])).await;
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
        assert!(refused.message().contains("coordinator"), "{refused:?}");
    }
    let stranger = push(&cluster, Role::Coordinator, "c9", batch(vec![message(8)])).await;
    assert_eq!(stranger.code(), Code::PermissionDenied, "{stranger:?}");
    // An enum number that raft-rs would panic at.
    let unknown = push(&cluster, Role::Coordinator, "c1", batch(vec![message(99)])).await;
    assert_eq!(unknown.code(), Code::InvalidArgument, "{unknown:?}");
    assert!(unknown.message().contains("99"), "{unknown:?}");
    let unknown = wire::Entry { kind: 77, term: 9, index: 5, ..wire::Entry::default() };
    let unknown = push(&cluster, Role::Coordinator, "c1", batch(vec![wire::Message { entries: vec![unknown], ..message(3) }])).await;
    assert_eq!(unknown.code(), Code::InvalidArgument, "{unknown:?}");
    let many = push(&cluster, Role::Coordinator, "c1", batch(vec![message(8); 5_000])).await;
    assert_eq!(many.code(), Code::InvalidArgument, "{many:?}");
    let large = wire::Message { context: vec![0; 9 << 20].into(), ..message(8) };
    let large = push(&cluster, Role::Coordinator, "c1", batch(vec![large])).await;
    assert_eq!(large.code(), Code::OutOfRange, "{large:?}");
    let foreign = wire::MessageBatch { cluster_id: "other".into(), messages: vec![message(8)] };
    let foreign = push(&cluster, Role::Coordinator, "c1", foreign).await;
    assert!(foreign.code() == Code::FailedPrecondition && foreign.message().contains("other"), "{foreign:?}");

    // Half of a snapshot.
    let identity = SharedCredentials::new(credentials(&cluster.ca, Role::Coordinator, "c1", now_s(), NODE_LIFETIME));
    let to = PeerName::Any(Role::Coordinator);
    let channel = channel(&cluster.members[0].address, &to, &identity, ChannelOptions::default()).expect("a channel");
    let half = wire::SnapshotChunk {
        cluster_id: CLUSTER.into(),
        message: Some(message(7)),
        total_bytes: 100,
        data: vec![0; 50].into(),
        ..wire::SnapshotChunk::default()
    };
    // Who says nothing of its build is of the first, and this cluster is further.
    let old = RaftClient::new(channel.clone()).install_snapshot(futures::stream::iter([half.clone()])).await.expect_err("too old");
    assert!(old.code() == Code::FailedPrecondition && old.message().contains("start a newer"), "{old:?}");
    let half = stating(&Build::default(), futures::stream::iter([half]));
    let half = RaftClient::new(channel).install_snapshot(half).await.expect_err("it is half of one");
    assert!(half.code() == Code::InvalidArgument && half.message().contains("ends before"), "{half:?}");

    assert!(execute(&cluster.admin(), Command::ApplyService { service: Box::new(wish("s", 1)) }).await.changed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_twin_of_a_live_worker_is_refused_and_the_worker_goes_on() {
    let cluster = Cluster::found().await;
    let admin = cluster.admin();
    let worker = join(&cluster, "a");
    execute(&admin, Command::ApplyService { service: Box::new(wish("s", 1)) }).await;
    wait_ready(&admin, "s", &["a"]).await;

    let twin = NodeSpec { address: "127.0.0.1:7999".into(), ..worker_spec("a", 1) };
    let mut session = cluster.client(Role::Worker, "a").session(twin, SOON).await.expect("it is answered");
    let first = tokio::time::timeout(SOON, session.down.recv()).await.expect("in time");
    assert!(matches!(&first, Some(NodeDown::Refused { reason }) if reason.contains("\"a\"")), "{first:?}");
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(worker.refused.lock().is_none());
    assert_eq!(ready_on(&admin, "s").await, ["a"], "longer than a lease later");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_worker_with_a_stale_epoch_changes_nothing() {
    let cluster = Cluster::found().await;
    let admin = cluster.admin();
    let old = join(&cluster, "a");
    execute(&admin, Command::ApplyService { service: Box::new(wish("s", 1)) }).await;
    wait_ready(&admin, "s", &["a"]).await;
    let stale = old.assignments.lock()[0].plan.epoch;
    let _new = join(&cluster, "b");
    node(&admin, "b").await;
    old.kill();
    wait_ready(&admin, "s", &["b"]).await;
    let before = service(&admin, "s").await.expect("it is there");

    // The same process was cut off, and speaks of what it ran.
    let mut session = session(&cluster, worker_spec("a", 1)).await;
    for phase in [ReplicaPhase::Ready, ReplicaPhase::Failed] {
        session.up.send(replica(phase, stale.0, None)).await.expect("it is heard");
    }
    let told = tokio::time::timeout(SOON, session.down.recv()).await.expect("in time");
    assert!(matches!(&told, Some(NodeDown::Assignments { assignments, .. }) if assignments.is_empty()), "{told:?}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = service(&admin, "s").await.expect("it is there");
    assert_eq!((after.replicas, after.last_epoch), (before.replicas, before.last_epoch));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_fits_nowhere_waits_with_its_reason_and_others_are_placed() {
    let cluster = Cluster::found().await;
    let admin = cluster.admin();
    let _worker = join(&cluster, "a");
    node(&admin, "a").await;
    let mut large = wish("s", 1);
    // The device has one GiB.
    large.spec.kv_memory = Some(ByteSize(4 << 30));
    let refused = admin.plan(large.clone(), SOON).await;
    let Err(ClusterError::NotPlaceable(refusal)) = &refused else { panic!("it does not fit: {refused:?}") };
    assert!(!refusal.constraints.is_empty(), "{refusal:?}");
    execute(&admin, Command::ApplyService { service: Box::new(large) }).await;
    let begun = Instant::now();
    while service(&admin, "s").await.and_then(|service| service.refusal).is_none() {
        assert!(begun.elapsed() < SOON, "the refusal is told");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    execute(&admin, Command::ApplyService { service: Box::new(wish("small", 1)) }).await;
    wait_ready(&admin, "small", &["a"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_lied_about_its_memory_is_believed_less_and_its_replica_moves() {
    let cluster = Cluster::found().await;
    let admin = cluster.admin();
    let mut boaster = worker_spec("a", 1);
    boaster.devices[0].memory_bytes = 64 << 30;
    let mut session = session(&cluster, boaster).await;
    execute(&admin, Command::ApplyService { service: Box::new(wish("s", 1)) }).await;
    let found = 1 << 20;
    let live = async {
        let mut beat = tokio::time::interval(Duration::from_millis(200));
        let mut number = 0;
        loop {
            let answer = tokio::select! {
                _ = beat.tick() => {
                    number += 1;
                    Some(NodeUp::Heartbeat { number, load: Default::default(), usage: Vec::new() })
                }
                down = session.down.recv() => match down.expect("the session goes on") {
                    NodeDown::Inspect { number, .. } => Some(NodeUp::Inspected { number, result: Ok(Box::new(facts())) }),
                    // At load it finds less than it had said.
                    NodeDown::Assignments { assignments, .. } => {
                        assignments.first().map(|assignment| replica(ReplicaPhase::Failed, assignment.plan.epoch.0, Some(found)))
                    }
                    _ => None,
                },
            };
            if let Some(answer) = answer {
                session.up.send(answer).await.expect("the session goes on");
            }
        }
    };
    let moved = async {
        let begun = Instant::now();
        while node(&admin, "a").await.spec.devices[0].memory_bytes != found {
            assert!(begun.elapsed() < SOON, "it is believed no more than it found");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let _honest = join(&cluster, "b");
        wait_ready(&admin, "s", &["b"]).await;
    };
    tokio::select! {
        () = live => {}
        () = moved => {}
    }
}
