//! Certificates over their lives: renewed under what runs, revoked, signed by another CA. The clock by which they end is
//! moved ahead; nothing here waits for one.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use forge_cluster::api::{ClusterApi, ClusterError, WatchItem};
use forge_cluster::client::{RemoteCluster, keep_certificates};
use forge_cluster::tls::{
    CA_KEY_FILE, CertificateClock, Credentials, JoinTokenText, JoinWish, NODE_LIFETIME, SharedCredentials, ca_digest, join,
};
use forge_shared::cluster::certificate::{CertificateRecord, Holder, Trust};
use forge_shared::cluster::command::{Command, CommandError};
use forge_shared::cluster::event::{Kind, Object};
use forge_shared::cluster::node::{NodeLoad, Role};
use forge_shared::cluster::session::{NodeDown, NodeUp};
use tokio::task::JoinHandle;

use crate::support::{Cluster, SOON, credentials, execute, now_s, start, worker_spec};

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
        let tasks = vec![tokio::spawn(keep_certificates(cluster.clone(), folder, |_| ()))];
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
    cluster.members.push(start(options).await);
    let fresh_s = clock.now_s() + NODE_LIFETIME.as_secs() - 3600;
    let begun = Instant::now();
    while ends_s(&cluster.path("w1")) < fresh_s {
        assert!(begun.elapsed() < 3 * SOON, "it is renewed once it can be");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn certificates(cluster: &RemoteCluster) -> Vec<CertificateRecord> {
    let listing = cluster.read(Kind::Certificate, None, SOON).await.expect("it answers");
    let records = listing.objects.into_iter().filter_map(|object| match object {
        Object::Certificate(record) => Some(*record),
        _ => None,
    });
    records.collect()
}

async fn trust(cluster: &RemoteCluster) -> Trust {
    let listing = cluster.read(Kind::Trust, None, SOON).await.expect("it answers");
    match listing.objects.into_iter().next() {
        Some(Object::Trust(trust)) => *trust,
        other => panic!("{other:?}"),
    }
}

fn revoke_all(role: Role, name: &str) -> Command {
    Command::RevokeCertificates { serials: Default::default(), holder: Some(Holder { role, name: name.into() }), force: false }
}

/// Has a command applied once it is not refused as coming too early; what was said before. The operator `without`
/// is taken out whenever it is in the way: certificates that were made by hand are known only once they are seen.
async fn once_safe(cluster: &RemoteCluster, command: Command, without: &str) -> Vec<String> {
    let (begun, mut refusals) = (Instant::now(), Vec::new());
    loop {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let id = format!("once-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        match cluster.execute(id, command.clone(), SOON).await {
            Ok(_) => return refusals,
            Err(ClusterError::Command(CommandError::Unsafe { reason })) => {
                if reason.contains(&format!("admin/{without}")) {
                    execute(cluster, revoke_all(Role::Admin, without)).await;
                }
                refusals.push(reason);
            }
            Err(other) => panic!("{other}"),
        }
        assert!(begun.elapsed() < 2 * SOON, "{refusals:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_revoked_is_cut_and_refused_by_all_coordinators() {
    let cluster = Cluster::of_three().await;
    let mut worker = Kept::start(&cluster, Role::Worker, "w1");
    let operator = Kept::start(&cluster, Role::Admin, "o1");
    let answers = worker.live("w1").await;
    goes_on(&answers).await;
    // Certificates that were made by hand are known once the leader has seen them.
    let begun = Instant::now();
    let known = loop {
        let known = certificates(&operator.cluster).await;
        let holders = ["worker/w1", "admin/o1", "coordinator/c1", "coordinator/c2", "coordinator/c3"];
        if holders.iter().all(|holder| known.iter().any(|record| record.holder() == *holder)) {
            break known;
        }
        assert!(begun.elapsed() < SOON, "{known:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let serials = |role: Role| known.iter().filter(|record| record.role == role).map(|record| record.serial.clone()).collect();
    let revoke = |role| Command::RevokeCertificates { serials: serials(role), holder: None, force: false };
    for role in [Role::Admin, Role::Coordinator] {
        match operator.cluster.execute(format!("revoke-{role}"), revoke(role), SOON).await {
            Err(ClusterError::Command(CommandError::Unsafe { reason })) => assert!(reason.contains("--force"), "{reason}"),
            other => panic!("{role}: {other:?}"),
        }
    }
    execute(&operator.cluster, revoke(Role::Worker)).await;
    until("its session is cut", || answers.load(Ordering::Relaxed) == u64::MAX).await;
    for address in cluster.addresses() {
        let alone = RemoteCluster::new(&[address], worker.cluster.credentials()).expect("a client");
        let begun = Instant::now();
        loop {
            match alone.read(Kind::Member, None, Duration::from_secs(3)).await {
                Err(ClusterError::Forbidden { reason }) if reason.contains("was revoked") && reason.contains("new token") => break,
                other => assert!(begun.elapsed() < SOON, "{other:?}"),
            }
        }
    }
    operator.cluster.read(Kind::Member, None, SOON).await.expect("others go on");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_a_stolen_key_does_not_outrun_its_revocation() {
    let cluster = Cluster::of_three().await;
    let mut worker = Kept::start(&cluster, Role::Worker, "w1");
    let operator = Kept::start(&cluster, Role::Admin, "o1");
    worker.live("w1").await;
    // Asks for one certificate with the other, as fast as it is given them.
    let stolen = Credentials::load(&cluster.path("w1")).expect("whole");
    let thief = cluster.client_with(stolen);
    let (taken, wanted) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(6)));
    let (count, most) = (taken.clone(), wanted.clone());
    let flood = tokio::spawn(async move {
        let mut serials = Vec::new();
        while count.load(Ordering::Relaxed) < most.load(Ordering::Relaxed) + 20 {
            let Ok(renewed) = thief.renew(Duration::from_secs(3)).await else { break };
            serials.push(renewed.serial().expect("its number"));
            thief.credentials().replace(renewed).expect("its own");
            count.fetch_add(1, Ordering::Relaxed);
        }
        serials
    });
    until("some are there", || taken.load(Ordering::Relaxed) >= wanted.load(Ordering::Relaxed)).await;
    execute(&operator.cluster, revoke_all(Role::Worker, "w1")).await;
    let serials = flood.await.expect("it ends");
    let revoked = trust(&operator.cluster).await.revoked;
    assert!(serials.iter().all(|serial| revoked.contains(serial)), "{serials:?} but for {revoked:?}");
    assert!(serials.len() < 26, "it was cut");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_waits_for_who_cannot_keep_what_he_is_given() {
    let cluster = Cluster::of_three().await;
    let mut worker = Kept::start(&cluster, Role::Worker, "w1");
    let operator = Kept::start(&cluster, Role::Admin, "o1");
    worker.live("w1").await;
    let (folder, away) = (cluster.path("w1"), cluster.path("w1-away"));
    // As a full disk: nothing can be written there.
    let fill = || {
        std::fs::rename(&folder, &away).expect("moved");
        std::fs::write(&folder, "no folder").expect("written");
    };
    let mend = || {
        std::fs::remove_file(&folder).expect("there");
        std::fs::rename(&away, &folder).expect("moved back");
    };
    let refused = async |command: &Command| {
        let begun = Instant::now();
        let mut alone = 0;
        while alone < 5 {
            let id = format!("early-{:?}-{:?}", std::mem::discriminant(command), begun.elapsed());
            match operator.cluster.execute(id, command.clone(), SOON).await {
                Err(ClusterError::Command(CommandError::Unsafe { reason })) => {
                    alone = if reason.contains("shut out: worker/w1;") { alone + 1 } else { 0 };
                    if reason.contains("admin/operator") {
                        execute(&operator.cluster, revoke_all(Role::Admin, "operator")).await;
                    }
                }
                other => panic!("{other:?}"),
            }
            assert!(begun.elapsed() < SOON, "it is named, and all others have followed");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    };
    // It is known before its disk is full, and nobody else lags.
    certificates_in_use(&operator.cluster, &["worker/w1", "admin/o1", "admin/operator"]).await;
    execute(&operator.cluster, revoke_all(Role::Admin, "operator")).await;
    fill();
    let to = operator.cluster.begin_ca_rotation(SOON).await.expect("begun");
    refused(&Command::SwitchCa { to: to.clone(), force: false }).await;
    mend();
    let begun = Instant::now();
    let has_said = |record: &CertificateRecord| record.holder() == "worker/w1" && record.is_used && record.believes.contains(&to);
    while !certificates(&operator.cluster).await.iter().any(has_said) {
        assert!(begun.elapsed() < 2 * SOON, "it is tried again");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    fill();
    once_safe(&operator.cluster, Command::SwitchCa { to: to.clone(), force: false }, "operator").await;
    // Certificates of the new CA are signed for it, and none is kept.
    refused(&Command::FinishCaRotation { to: to.clone(), force: false }).await;
    mend();
    once_safe(&operator.cluster, Command::FinishCaRotation { to, force: false }, "operator").await;
    until("the old CA is gone from its files", || {
        Credentials::load(&folder).is_ok_and(|kept| kept.ca_pem().matches("BEGIN CERTIFICATE").count() == 1)
    })
    .await;
}

/// Waits until the cluster knows that these are used.
async fn certificates_in_use(cluster: &RemoteCluster, holders: &[&str]) {
    let begun = Instant::now();
    loop {
        let known = certificates(cluster).await;
        if holders.iter().all(|holder| known.iter().any(|record| record.is_used && record.holder() == *holder)) {
            return;
        }
        assert!(begun.elapsed() < SOON, "{known:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ca_is_rotated_under_load_and_the_old_one_is_worth_nothing_afterwards() {
    let mut cluster = Cluster::of_three().await;
    let mut worker = Kept::start(&cluster, Role::Worker, "w1");
    let operator = Kept::start(&cluster, Role::Admin, "o1");
    worker.live("w1").await;
    // Known to the cluster, and off.
    Kept::start(&cluster, Role::Worker, "w2").live("w2").await;
    let old_token = cluster.token(Role::Worker, 1).await;
    let old = cluster.admin();
    old.read(Kind::Member, None, SOON).await.expect("it is still good");

    let load = operator.cluster.clone();
    let (written, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (count, over) = (written.clone(), is_over.clone());
    let load = tokio::spawn(async move {
        while over.load(Ordering::Relaxed) == 0 {
            let cordoned = count.fetch_add(1, Ordering::Relaxed) % 2 == 0;
            execute(&load, Command::CordonNode { node: "w1".into(), cordoned }).await;
        }
    });

    let new_sha256 = operator.cluster.begin_ca_rotation(SOON).await.expect("begun");
    let begun = Instant::now();
    let refusal = loop {
        match operator
            .cluster
            .execute(format!("switch-{:?}", begun.elapsed()), Command::SwitchCa { to: new_sha256.clone(), force: false }, SOON)
            .await
        {
            Err(ClusterError::Command(CommandError::Unsafe { reason })) if reason.contains("shut out: worker/w2, admin/operator;") => {
                break reason;
            }
            other => assert!(begun.elapsed() < SOON, "{other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    assert!(refusal.contains("--force"), "{refusal}");
    // What lags comes back, or is taken out.
    let _late = Kept::start(&cluster, Role::Worker, "w2");
    once_safe(&operator.cluster, Command::SwitchCa { to: new_sha256.clone(), force: false }, "operator").await;
    once_safe(&operator.cluster, Command::FinishCaRotation { to: new_sha256.clone(), force: false }, "operator").await;
    let trust = trust(&operator.cluster).await;
    assert!(trust.rotation.is_none() && trust.cas.len() == 1 && trust.cas[0].sha256 == new_sha256, "{trust:?}");

    let before = written.load(Ordering::Relaxed);
    until("commands go on", || written.load(Ordering::Relaxed) > before + 5).await;
    is_over.store(1, Ordering::Relaxed);
    load.await.expect("no command failed");
    worker.cluster.read(Kind::Member, None, SOON).await.expect("it has followed");
    let live = worker.live("w1").await;
    goes_on(&live).await;

    // The old CA: its certificates and its tokens.
    let late = SharedCredentials::new(credentials(&cluster.ca, Role::Admin, "late", now_s(), NODE_LIFETIME));
    let late = RemoteCluster::new(&cluster.addresses(), &late).expect("a client");
    match late.read(Kind::Member, None, Duration::from_secs(3)).await {
        Err(ClusterError::Forbidden { reason }) => assert!(reason.contains("not of this cluster's CA"), "{reason}"),
        other => panic!("{other:?}"),
    }
    let wish = JoinWish { role: Role::Worker, name: "w3".into(), address: String::new(), build: Default::default() };
    let old_token = JoinTokenText::parse(&old_token).expect("a token");
    match join(&old_token, &wish, Duration::from_secs(2)).await {
        Err(ClusterError::Forbidden { reason }) => assert!(reason.contains("CA"), "{reason}"),
        other => panic!("{other:?}"),
    }
    let digest = ca_digest(&trust.cas[0].certificate_pem).expect("a CA");
    let token = JoinTokenText::generate(digest, cluster.addresses()).expect("a token");
    let record = token.record(Role::Worker, (now_s() + 600) * 1000, 1);
    execute(&operator.cluster, Command::PutJoinToken { token: record }).await;
    join(&token, &wish, SOON).await.expect("let in by the new CA");

    // Files are those of the new CA alone, and a coordinator starts from them.
    let old_key = cluster.ca.key_pem();
    for name in ["c1", "c2", "c3"] {
        let keys = cluster.path(&format!("{name}/tls")).join(CA_KEY_FILE);
        until("the old key is gone", || !std::fs::read_to_string(&keys).expect("there").contains(old_key.trim())).await;
    }
    let third = cluster.members.pop().expect("three");
    let address = third.address.clone();
    third.stop().await;
    let options = forge_coordinator::RunOptions { listen: address.parse().expect("one"), address, ..cluster.options("c3").await };
    let again = start(options).await;
    until("it is heard again", || again.coordinator.readiness().is_ok()).await;
    cluster.members.push(again);
}
