//! Certificates over their lives: renewed under what runs, revoked, signed by another CA. The clock by which they end is
//! moved ahead; nothing here waits for one.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use forge_cluster::api::{ClusterApi, ClusterError, WatchItem};
use forge_cluster::client::{RemoteCluster, keep_renewed};
use forge_cluster::tls::{CertificateClock, Credentials, NODE_LIFETIME, SharedCredentials};
use forge_shared::cluster::event::Kind;
use forge_shared::cluster::node::{NodeLoad, Role};
use forge_shared::cluster::session::{NodeDown, NodeUp};
use tokio::task::JoinHandle;

use crate::support::{Cluster, SOON, credentials, now_s, worker_spec};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// What keeps its certificate as a worker's process does.
struct Kept {
    cluster: RemoteCluster,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Kept {
    fn start(cluster: &Cluster, role: Role, name: &str) -> Kept {
        let folder = cluster.path(name);
        credentials(&cluster.ca, role, name, now_s(), NODE_LIFETIME).save(&folder).expect("saved");
        let held = Credentials::load(&folder).expect("whole");
        let held = SharedCredentials::with_clock(held, cluster.certificates.clock.clone());
        let cluster = RemoteCluster::new(&cluster.addresses(), &held).expect("a client");
        let tasks = vec![tokio::spawn(keep_renewed(cluster.clone(), folder, |_| ()))];
        Kept { cluster, tasks }
    }

    /// A worker's session with heartbeats; counts answers until it ends, then says so.
    async fn live(&mut self, name: &str) -> Arc<AtomicU64> {
        let mut session = self.cluster.session(worker_spec(name, 1), SOON).await.expect("a session");
        let answers = Arc::new(AtomicU64::new(0));
        let counted = answers.clone();
        self.tasks.push(tokio::spawn(async move {
            let mut beat = tokio::time::interval(Duration::from_millis(100));
            loop {
                tokio::select! {
                    _ = beat.tick() => {
                        let message = NodeUp::Heartbeat { number: 1, load: NodeLoad::default(), usage: Vec::new() };
                        if session.up.send(message).await.is_err() {
                            break;
                        }
                    }
                    down = session.down.recv() => match down {
                        Some(NodeDown::Ack { .. }) => {
                            counted.fetch_add(1, Ordering::Relaxed);
                        }
                        Some(_) => {}
                        None => break,
                    },
                }
            }
            counted.store(u64::MAX, Ordering::Relaxed);
        }));
        answers
    }
}

/// Until when the certificate in a folder is good.
fn ends_s(folder: &Path) -> u64 {
    Credentials::load(folder).expect("whole").ends_s()
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < SOON, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// It counts on, and has not ended.
async fn goes_on(answers: &AtomicU64) {
    let before = answers.load(Ordering::Relaxed);
    until("the session goes on", || answers.load(Ordering::Relaxed) > before + 2).await;
    assert_ne!(answers.load(Ordering::Relaxed), u64::MAX, "the session was cut");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_renew_themselves_over_and_over_and_nothing_is_cut() {
    let cluster = Cluster::of_three().await;
    let clock: CertificateClock = cluster.certificates.clock.clone();
    let mut worker = Kept::start(&cluster, Role::Worker, "w1");
    let operator = Kept::start(&cluster, Role::Admin, "o1");
    let answers = worker.live("w1").await;
    let mut watch = operator.cluster.watch(vec![Kind::Member], None);
    let folders = ["c1/tls", "c2/tls", "c3/tls", "w1", "o1"].map(|below| cluster.path(below));

    let terms = cluster.members[0].coordinator.group_status().term;
    for round in 1..=4 {
        clock.advance(61 * DAY);
        let fresh_s = clock.now_s() + NODE_LIFETIME.as_secs() - 3600;
        until("all are renewed", || folders.iter().all(|folder| ends_s(folder) > fresh_s)).await;
        goes_on(&answers).await;
        // Whose first certificate has ended: the connections of that time are not used for new calls.
        for client in [&worker.cluster, &operator.cluster] {
            client.read(Kind::Member, None, SOON).await.unwrap_or_else(|error| panic!("round {round}: {error}"));
        }
    }
    assert_eq!(cluster.members[0].coordinator.group_status().term, terms, "the group kept its leader");
    let mut resets = 0;
    while let Ok(item) = watch.try_recv() {
        resets += usize::from(item == WatchItem::Reset);
    }
    assert_eq!(resets, 1, "one watch, unbroken");

    // A client that was off for longer than its certificate lasts.
    let late = SharedCredentials::with_clock(credentials(&cluster.ca, Role::Admin, "late", now_s(), NODE_LIFETIME), clock);
    let late = RemoteCluster::new(&cluster.addresses(), &late).expect("a client");
    match late.read(Kind::Member, None, Duration::from_secs(3)).await {
        Err(ClusterError::Forbidden { reason }) => {
            assert!(reason.contains("admin late") && reason.contains("has expired") && reason.contains("join again"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_that_nobody_answers_is_tried_again_until_somebody_does() {
    let mut cluster = Cluster::found().await;
    let clock = cluster.certificates.clock.clone();
    let mut worker = Kept::start(&cluster, Role::Worker, "w1");
    worker.live("w1").await;
    let options = cluster.options("c1").await;
    let running = cluster.members.remove(0);
    let address = running.address.clone();
    running.stop().await;
    clock.advance(61 * DAY);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(ends_s(&cluster.path("w1")) < clock.now_s() + 30 * DAY.as_secs(), "nobody could");
    let options = forge_coordinator::RunOptions { listen: address.parse().expect("one"), address, ..options };
    cluster.members.push(crate::support::start(options).await);
    let fresh_s = clock.now_s() + NODE_LIFETIME.as_secs() - 3600;
    let begun = Instant::now();
    while ends_s(&cluster.path("w1")) < fresh_s {
        assert!(begun.elapsed() < 3 * SOON, "it is renewed once it can be");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
