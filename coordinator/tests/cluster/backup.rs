//! Backups and what is made of them.

use forge_cluster::api::ClusterApi;
use forge_coordinator::{CoordinatorError, read_backup, restore};
use forge_shared::cluster::command::Command;
use forge_shared::cluster::event::{Kind, Object};
use forge_shared::cluster::node::Role;
use forge_shared::cluster::session::NodeDown;

use crate::support::{Cluster, SOON, Worker, execute, service, start, wait_ready, wish, worker_spec};

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_becomes_a_new_group_that_old_members_do_not_enter() {
    let mut cluster = Cluster::of_three().await;
    let admin = cluster.admin();
    let before = Worker::start(cluster.client(Role::Worker, "a"), worker_spec("a", 1));
    let applied = execute(&admin, Command::ApplyService { service: Box::new(wish("kept", 2)) }).await;
    wait_ready(&admin, "kept", &["a", "a"]).await;
    let mut parts = admin.backup(SOON).await.expect("a backup");
    let mut file = Vec::new();
    while let Some(part) = parts.recv().await {
        file.extend_from_slice(&part.expect("it comes whole"));
    }
    let (header, _) = read_backup(&file).expect("it is one");
    assert!(header.revision >= applied.revision && header.cluster_id == "test");
    for cut in [0, 10, file.len() / 2, file.len() - 1] {
        assert!(read_backup(&file[..cut]).is_err(), "cut at {cut}");
    }
    let mut damaged = file.clone();
    let last = damaged.len() - 2;
    damaged[last] ^= 1;
    assert!(matches!(read_backup(&damaged), Err(CoordinatorError::Backup { .. })));

    execute(&admin, Command::ApplyService { service: Box::new(wish("later", 1)) }).await;
    let path = cluster.path("backup");
    std::fs::write(&path, &file).expect("written");
    let data = cluster.path("c1/restored");
    restore(&path, &data).expect("restored");
    assert!(matches!(restore(&path, &data), Err(CoordinatorError::Backup { .. })), "a folder in use is refused");

    // The first one comes back alone, with what was in the backup; its old companions do not disturb it.
    let old = cluster.members.remove(0);
    let mut options = cluster.options("c1").await;
    old.kill().await;
    options.data_dir = data;
    let restored = start(options).await;
    let companions = std::mem::replace(&mut cluster.members, vec![restored]);
    cluster.leader().await;
    let admin = cluster.admin();
    assert!(service(&admin, "kept").await.is_some());
    assert!(service(&admin, "later").await.is_none());
    execute(&admin, Command::ApplyService { service: Box::new(wish("new", 1)) }).await;
    let begun = std::time::Instant::now();
    let listed = loop {
        let listed = admin.read(Kind::Member, None, SOON).await.expect("it answers");
        let names: Vec<_> = listed.objects.iter().map(Object::name).collect();
        assert!(names.is_empty() || names == ["c1"], "{names:?}");
        if !names.is_empty() {
            break listed;
        }
        assert!(begun.elapsed() < SOON, "it writes itself into the list");
    };
    assert!(listed.revision > header.revision, "watchers of the old group begin again");
    for companion in companions {
        companion.kill().await;
    }

    // Its leader's requests are new ones though its terms are the old group's, and its epochs nobody has seen.
    before.kill();
    let _after = Worker::start(cluster.client(Role::Worker, "b"), worker_spec("b", 1));
    wait_ready(&admin, "kept", &["b", "b"]).await;
    let kept = service(&admin, "kept").await.expect("it is there");
    assert!(kept.replicas.iter().all(|replica| replica.plan.epoch.0 > header.revision.0 + (1 << 36)), "{kept:?}");

    // And it grows again.
    cluster.add("c5").await;
    let begun = std::time::Instant::now();
    while cluster.members[1].coordinator.group_status().members.iter().filter(|member| member.is_voter).count() < 2 {
        assert!(begun.elapsed() < SOON, "{:?}", cluster.members[1].coordinator.group_status());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Which history's assignments a worker gets.
async fn history(cluster: &Cluster) -> String {
    let mut session = cluster.client(Role::Worker, "w").session(worker_spec("w", 1), SOON).await.expect("a session");
    loop {
        let down = tokio::time::timeout(SOON, session.down.recv()).await.expect("in time");
        if let NodeDown::Assignments { history, .. } = down.expect("the session goes on") {
            return history;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_cluster_s_assignments_are_of_another_history() {
    let mut cluster = Cluster::found().await;
    let first = history(&cluster).await;
    assert_eq!(history(&cluster).await, first);
    let mut parts = cluster.admin().backup(SOON).await.expect("a backup");
    let mut file = Vec::new();
    while let Some(part) = parts.recv().await {
        file.extend_from_slice(&part.expect("it comes whole"));
    }
    let (path, data) = (cluster.path("backup"), cluster.path("c1/restored"));
    std::fs::write(&path, &file).expect("written");
    restore(&path, &data).expect("restored");
    let mut options = cluster.options("c1").await;
    cluster.members.remove(0).kill().await;
    options.data_dir = data;
    cluster.members.push(start(options).await);
    cluster.leader().await;
    // A worker compares neither revisions nor epochs with what it has seen of the other.
    assert_ne!(history(&cluster).await, first);
}
