//! Workers: sessions, placement, loss, drain, fencing.

use std::time::{Duration, Instant};

use forge_cluster::api::{ClusterApi, ClusterError};
use forge_cluster::client::LogSource;
use forge_shared::cluster::command::Command;
use forge_shared::cluster::event::{Kind, Object};
use forge_shared::cluster::node::{NodeLoad, NodePhase, NodeSpec, Role};
use forge_shared::cluster::session::{NodeDown, NodeUp};

use crate::support::{Cluster, SOON, Worker, execute, facts, ready_on, service, wait_ready, wish, worker_spec};

fn join(cluster: &Cluster, name: &str, incarnation: u64) -> Worker {
    Worker::start(cluster.client(Role::Worker, name), worker_spec(name, incarnation))
}

async fn phase(admin: &dyn ClusterApi, name: &str) -> Option<NodePhase> {
    let listing = admin.read(Kind::Node, Some(name.into()), SOON).await.expect("it answers");
    match listing.objects.into_iter().next() {
        Some(Object::Node(record)) => Some(record.phase),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_workers_replica_is_placed_on_another() {
    let cluster = Cluster::found().await;
    let admin = cluster.admin();
    let (a, _b) = (join(&cluster, "a", 1), join(&cluster, "b", 1));
    while phase(&admin, "a").await.is_none() || phase(&admin, "b").await.is_none() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let planned = admin.plan(wish("s", 2), SOON).await.expect("it fits");
    assert_eq!(planned.plans.len(), 2);
    execute(&admin, Command::ApplyService { service: Box::new(wish("s", 2)) }).await;
    wait_ready(&admin, "s", &["a", "b"]).await;
    assert_eq!(a.assignments.lock().len(), 1);
    let before = service(&admin, "s").await.expect("it is there");

    a.kill();
    let begun = Instant::now();
    wait_ready(&admin, "s", &["b", "b"]).await;
    println!("replanned {} ms after the worker's death (lease 3 s)", begun.elapsed().as_millis());
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_eq!(phase(&admin, "a").await, Some(NodePhase::Lost));
    let after = service(&admin, "s").await.expect("it is there");
    assert!(after.last_epoch > before.last_epoch, "a new plan has a new epoch");

    // It comes again, and is drained of nothing: the placement stands.
    let _a = join(&cluster, "a", 2);
    while phase(&admin, "a").await != Some(NodePhase::Ready) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    execute(&admin, Command::DrainNode { node: "b".into(), draining: true, is_forced: false }).await;
    wait_ready(&admin, "s", &["a", "a"]).await;
    execute(&admin, Command::DeleteService { name: "s".into() }).await;
    let begun = Instant::now();
    while service(&admin, "s").await.is_some() {
        assert!(begun.elapsed() < SOON, "it is deleted");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_move_with_the_leadership_and_nobody_is_lost() {
    let mut cluster = Cluster::of_three().await;
    let admin = cluster.admin();
    let worker = join(&cluster, "a", 1);
    execute(&admin, Command::ApplyService { service: Box::new(wish("s", 1)) }).await;
    wait_ready(&admin, "s", &["a"]).await;
    let epoch = worker.assignments.lock()[0].plan.epoch;

    let leader = cluster.leader().await;
    cluster.members.remove(leader).kill().await;
    cluster.leader().await;
    // Longer than a lease: the new leader hears of the worker before it believes it lost.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(phase(&admin, "a").await, Some(NodePhase::Ready));
    assert_eq!(ready_on(&admin, "s").await, ["a"]);
    assert_eq!(worker.assignments.lock()[0].plan.epoch, epoch, "nothing was planned anew");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_workers_with_one_name_the_newer_process_stays() {
    let cluster = Cluster::found().await;
    let admin = cluster.admin();
    let old = join(&cluster, "a", 1);
    while phase(&admin, "a").await.is_none() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let new = join(&cluster, "a", 2);
    let begun = Instant::now();
    while old.refused.lock().is_none() {
        assert!(begun.elapsed() < SOON, "the old process is refused");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(new.refused.lock().is_none());

    // An old process that comes late is told so in its first message.
    let late = cluster.client(Role::Worker, "a");
    let mut session = late.session(worker_spec("a", 1), SOON).await.expect("it is answered");
    let first = tokio::time::timeout(SOON, session.down.recv()).await.expect("in time");
    assert!(matches!(&first, Some(NodeDown::Refused { .. })), "{first:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_forgotten_once_it_is_lost() {
    let cluster = Cluster::found().await;
    let admin = cluster.admin();
    let worker = join(&cluster, "a", 1);
    while phase(&admin, "a").await.is_none() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let remove = async |id: &str| admin.execute(id.into(), Command::RemoveNode { node: "a".into() }, SOON).await;
    let refused = remove("remove-1").await;
    let words = refused.expect_err("it lives").to_string();
    assert!(words.contains("drain"), "{words}");
    worker.kill();
    while phase(&admin, "a").await != Some(NodePhase::Lost) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(remove("remove-2").await.expect("it is lost").changed);
    assert_eq!(phase(&admin, "a").await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_speaks_for_itself_alone() {
    let cluster = Cluster::found().await;
    let other = cluster.client(Role::Worker, "a").session(worker_spec("b", 1), Duration::from_secs(5)).await;
    assert!(matches!(&other, Err(ClusterError::Forbidden { .. })), "{other:?}");
    let gateway = cluster.client(Role::Gateway, "a").session(worker_spec("a", 1), Duration::from_secs(5)).await;
    assert!(matches!(&gateway, Err(ClusterError::Forbidden { .. })), "{gateway:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_without_workers_says_so_in_time() {
    let cluster = Cluster::found().await;
    for (timeout_s, is_away) in [(2, false), (60, true)] {
        let begun = Instant::now();
        let planned = cluster.admin().plan(wish("s", 1), Duration::from_secs(timeout_s)).await;
        let Err(ClusterError::Unfinished { reason, .. } | ClusterError::Away { reason }) = &planned else { panic!("{planned:?}") };
        assert!(reason.contains("no worker is connected"), "{reason}");
        assert_eq!(matches!(planned, Err(ClusterError::Away { .. })), is_away);
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_waits_for_a_slow_worker_as_long_as_it_is_told() {
    let cluster = Cluster::found().await;
    let slow = cluster.client(Role::Worker, "slow");
    // It hears what it is asked and answers after seven seconds: longer than a client waits for a coordinator that is silent.
    let session = slow.session(worker_spec("slow", 1), SOON).await.expect("it is taken in");
    let worker = tokio::spawn(async move {
        let mut session = session;
        let mut beat = tokio::time::interval(Duration::from_millis(200));
        let (answers, mut due) = tokio::sync::mpsc::unbounded_channel();
        for number in 1.. {
            let up = tokio::select! {
                _ = beat.tick() => NodeUp::Heartbeat { number, load: NodeLoad::default(), usage: Vec::new() },
                Some(answer) = due.recv() => answer,
                down = session.down.recv() => {
                    if let Some(NodeDown::Inspect { number, .. }) = down {
                        let answers = answers.clone();
                        tokio::spawn(async move {
                            tokio::time::sleep(Duration::from_secs(7)).await;
                            let _ = answers.send(NodeUp::Inspected { number, result: Ok(Box::new(facts())) });
                        });
                    }
                    continue;
                }
            };
            session.up.send(up).await.expect("the leader reads");
        }
    });
    let admin = cluster.admin();
    let begun = Instant::now();
    let planned = admin.plan(wish("s", 1), Duration::from_secs(5)).await;
    let Err(ClusterError::Unfinished { waited_ms, reason }) = &planned else { panic!("{planned:?}") };
    assert!(reason.contains("worker slow is still reading the model tests/tiny ("), "{reason}");
    assert!((4_000..5_500).contains(waited_ms) && begun.elapsed() < Duration::from_secs(6), "{waited_ms}");

    let planned = admin.plan(wish("s", 1), Duration::from_secs(15)).await.expect("it has the time");
    assert_eq!(planned.plans.len(), 1);
    worker.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_a_lost_worker_for_lines_hears_that_it_is_lost() {
    let cluster = Cluster::found().await;
    let admin = cluster.admin();
    let worker = join(&cluster, "a", 1);
    while phase(&admin, "a").await.is_none() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let lines = || LogSource { target: "a".into(), is_node: true, is_following: false, tail_lines: 10 };
    for expected in ["worker a at", "it is lost"] {
        let begun = Instant::now();
        let refused = admin.logs(lines(), SOON).await.expect_err("nobody is there");
        assert!(matches!(&refused, ClusterError::Away { reason } if reason.contains(expected)), "{refused:?}");
        assert!(begun.elapsed() < Duration::from_secs(7), "{:?}", begun.elapsed());
        worker.kill();
        while phase(&admin, "a").await != Some(NodePhase::Lost) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_is_not_cordoned_or_drained() {
    let cluster = Cluster::found().await;
    let admin = cluster.admin();
    let spec = NodeSpec { role: Role::Gateway, devices: Vec::new(), ..worker_spec("g", 1) };
    let _session = cluster.client(Role::Gateway, "g").session(spec, SOON).await.expect("a session");
    while phase(&admin, "g").await.is_none() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let commands = [
        (Command::CordonNode { node: "g".into(), cordoned: true }, "cordoned"),
        (Command::DrainNode { node: "g".into(), draining: true, is_forced: false }, "drained"),
    ];
    for (command, verb) in commands {
        let refusal = admin.execute(verb.into(), command, SOON).await.expect_err("it has no replicas").to_string();
        assert!(refusal.contains("g is a gateway") && refusal.contains(verb) && refusal.contains("SIGTERM"), "{refusal}");
    }
    // The way back is open, for those that were before.
    let uncordon = Command::CordonNode { node: "g".into(), cordoned: false };
    assert!(!admin.execute("uncordon".into(), uncordon, SOON).await.expect("nothing to do").changed);
}
