//! Clocks that jump and disks that are slow, under a cluster that goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use forge_cluster::api::ClusterApi;
use forge_cluster::client::MemberAction;
use forge_coordinator::{BeforeSync, Surroundings};
use forge_shared::cluster::command::{Command, IdempotencyRecord};
use forge_shared::cluster::event::{Kind, Object};
use forge_shared::cluster::node::{NodePhase, Role};
use forge_shared::ids::Epoch;

use crate::support::{Cluster, SOON, Worker, execute, now_s, service, wait_ready, wish, worker_spec};

/// What a test does to one coordinator's machine.
#[derive(Clone, Default)]
struct Machine {
    ahead_ms: Arc<AtomicI64>,
    fsync_ms: Arc<AtomicU64>,
}

impl Machine {
    fn surroundings(&self) -> Surroundings {
        let Machine { ahead_ms, fsync_ms } = self.clone();
        let wait = move || std::thread::sleep(Duration::from_millis(fsync_ms.load(Ordering::Relaxed)));
        let clock = move || {
            let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_millis() as u64;
            now_ms.saturating_add_signed(ahead_ms.load(Ordering::Relaxed))
        };
        let mut surroundings = Surroundings::default().with_clock(clock);
        surroundings.before_sync = Some(BeforeSync(Arc::new(wait)));
        surroundings
    }
}

/// Three coordinators with a machine each, and a worker that runs a replica.
async fn cluster() -> (Cluster, [Machine; 3], Worker) {
    let machines: [Machine; 3] = Default::default();
    let cluster = Cluster::of_three_on([0, 1, 2].map(|number: usize| machines[number].surroundings())).await;
    let worker = Worker::start(cluster.client(Role::Worker, "a"), worker_spec("a", 1));
    let admin = cluster.admin();
    execute(&admin, Command::ApplyService { service: Box::new(wish("s", 1)) }).await;
    wait_ready(&admin, "s", &["a"]).await;
    (cluster, machines, worker)
}

/// The replica is the one it was, and its worker was never lost.
async fn stands(admin: &dyn ClusterApi, epoch: Epoch) {
    let record = service(admin, "s").await.expect("it is there");
    assert_eq!(record.last_epoch, epoch, "nothing was planned anew: {record:?}");
    let nodes = admin.read(Kind::Node, Some("a".into()), SOON).await.expect("it answers").objects;
    assert!(matches!(&nodes[..], [Object::Node(node)] if node.phase == NodePhase::Ready), "{nodes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_clock_jumps_an_hour_ahead_and_back_loses_nothing() {
    let (cluster, machines, worker) = cluster().await;
    let admin = cluster.admin();
    let epoch = service(&admin, "s").await.expect("it is there").last_epoch;
    let leader = cluster.leader().await;
    let gateway = cluster.client(Role::Gateway, "g");
    let record = |key: &str| IdempotencyRecord {
        tenant: "t".into(),
        key: key.into(),
        body_sha256: "0".repeat(64),
        clock_s: now_s(),
        numerics_id: "n".into(),
        expires_ms: (now_s() + 900) * 1000,
    };
    let remember = |key: &'static str, id: &'static str| {
        let command = Command::RecordIdempotency { record: record(key) };
        gateway.execute(id.into(), command, SOON)
    };
    let apply = || Command::ApplyService { service: Box::new(wish("t", 1)) };
    let first = admin.execute("same".into(), apply(), SOON).await.expect("applied");
    let kept = remember("k", "k-1").await.expect("remembered");
    assert!(kept.existing.is_none());

    for (round, ahead_ms) in [3_600_000_i64, 0, -3_600_000, 0].into_iter().enumerate() {
        machines[leader].ahead_ms.store(ahead_ms, Ordering::Relaxed);
        let begun = Instant::now();
        let mut number = 0;
        // Longer than a lease.
        while begun.elapsed() < Duration::from_secs(4) {
            execute(&admin, Command::ScaleService { name: "t".into(), replicas: 1 + number % 2 }).await;
            number += 1;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        stands(&admin, epoch).await;
        assert_eq!(cluster.leader().await, leader, "it leads on");
        assert_eq!(admin.execute("same".into(), apply(), SOON).await.expect("answered"), first, "a request id is remembered");
        let again = remember("k", Box::leak(format!("again-{round}").into_boxed_str())).await.expect("answered");
        assert!(again.existing.is_some(), "a record of 15 minutes outlives an hour that did not pass");
        // A token that is made now lets in now, and what the leader signs now is good now.
        let leader_s = now_s().saturating_add_signed(ahead_ms / 1000);
        let token = cluster.token_until(Role::Worker, 1, leader_s + 600).await;
        let name = format!("newcomer-{round}");
        let joined = crate::support::join_worker(&token, &name).await;
        let newcomer = cluster.client_with(joined);
        newcomer.status(SOON).await.expect("its certificate is taken");
        let renewed = cluster.client(Role::Worker, "a").renew(SOON).await.expect("renewed");
        cluster.client_with(renewed).status(SOON).await.expect("and so is a renewed one");
    }
    // Another leads, whose clock never jumped.
    let heir = cluster.members[(leader + 1) % 3].coordinator.group_status().member_id;
    admin.change_members(MemberAction::TransferLeadership(heir), SOON).await.expect("handed over");
    tokio::time::sleep(Duration::from_secs(4)).await;
    stands(&admin, epoch).await;
    assert_eq!(admin.execute("same".into(), apply(), SOON).await.expect("answered"), first);
    worker.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_disk_costs_no_replica_and_nothing_that_was_acknowledged() {
    let (cluster, machines, worker) = cluster().await;
    let admin = cluster.admin();
    let epoch = service(&admin, "s").await.expect("it is there").last_epoch;
    let mut acknowledged = Vec::new();
    let leader = cluster.leader().await;
    // A follower's, then the leader's own: each fsync takes longer than an election, and than a lease.
    for (slow, fsync_ms) in [((leader + 1) % 3, 3_500), (leader, 3_500)] {
        machines[slow].fsync_ms.store(fsync_ms, Ordering::Relaxed);
        let begun = Instant::now();
        let mut longest = Duration::ZERO;
        while begun.elapsed() < Duration::from_secs(12) {
            let name = format!("n{}", acknowledged.len());
            let asked = Instant::now();
            execute(&admin, Command::ApplyService { service: Box::new(wish(&name, 1)) }).await;
            longest = longest.max(asked.elapsed());
            acknowledged.push(name);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        println!(
            "fsync of {fsync_ms} ms on the {}: a command took {} ms at most",
            if slow == leader { "leader" } else { "follower" },
            longest.as_millis()
        );
        machines[slow].fsync_ms.store(0, Ordering::Relaxed);
        stands(&admin, epoch).await;
    }
    // Everybody has everything again.
    let begun = Instant::now();
    loop {
        let has_all = |member: &crate::support::Running| {
            let status = member.coordinator.group_status();
            status.leader_id != 0 && status.applied_index >= status.commit_index
        };
        let revision = service(&admin, acknowledged.last().expect("some")).await.expect("it is there").revision;
        if cluster.members.iter().all(|member| has_all(member) && member.coordinator.group_status().revision >= revision) {
            break;
        }
        assert!(begun.elapsed() < SOON, "{:?}", cluster.members.iter().map(|member| member.coordinator.group_status()).collect::<Vec<_>>());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for name in &acknowledged {
        assert!(service(&admin, name).await.is_some(), "{name} was acknowledged");
    }
    stands(&admin, epoch).await;
    worker.kill();
}
