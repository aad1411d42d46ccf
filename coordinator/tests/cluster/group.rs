//! The group: commands, reads, watches over a leader's death, members that come and go.

use std::time::{Duration, Instant};

use forge_cluster::api::{ClusterApi, WatchItem};
use forge_cluster::client::{MemberAction, RemoteCluster};
use forge_cluster::status::from_status;
use forge_cluster::tls::{ChannelOptions, PeerName, SharedCredentials, channel};
use forge_coordinator::{CoordinatorError, RunOptions};
use forge_proto::cluster::cluster_client::ClusterClient;
use forge_proto::cluster::{ExecuteRequest, WatchRequest};
use forge_shared::cluster::command::Command;
use forge_shared::cluster::event::{Change, Kind};
use forge_shared::cluster::node::Role;
use tokio::sync::mpsc;

use crate::support::{Cluster, SOON, credentials, execute, now_s, service, start, wish};

#[tokio::test(flavor = "multi_thread")]
async fn three_coordinators_serve_one_state() {
    let cluster = Cluster::of_three().await;
    let admin = cluster.admin();
    let apply = || Command::ApplyService { service: Box::new(wish("a", 1)) };
    let first = admin.execute("same".into(), apply(), SOON).await.expect("applied");
    let again = admin.execute("same".into(), apply(), SOON).await.expect("answered");
    assert_eq!(first, again, "a request id answers the same twice");
    assert!(!execute(&admin, apply()).await.changed, "the same wish again changes nothing");

    // Every one of them answers with all that was acknowledged before.
    for member in &cluster.members {
        let identity = SharedCredentials::new(credentials(&cluster.ca, Role::Admin, "operator", now_s(), Duration::from_secs(600)));
        let one = RemoteCluster::new(std::slice::from_ref(&member.address), &identity).expect("a client");
        let record = service(&one, "a").await.expect("it is there");
        assert!(record.revision <= first.revision);
        let status = one.status(SOON).await.expect("it answers");
        assert_eq!(status.cluster_id, "test");
        assert!(status.leader_id != 0);
    }
    for member in &cluster.members {
        assert_eq!(member.coordinator.readiness(), Ok(()));
    }

    // A follower says who leads, and proposes nothing.
    let leader = cluster.leader().await;
    let follower = &cluster.members[(leader + 1) % 3];
    let identity = SharedCredentials::new(credentials(&cluster.ca, Role::Admin, "operator", now_s(), Duration::from_secs(600)));
    let to = channel(&follower.address, &PeerName::Any(Role::Coordinator), &identity, ChannelOptions::default()).expect("a channel");
    let command_json = serde_json::to_vec(&apply()).expect("JSON").into();
    let refused = ClusterClient::new(to).execute(ExecuteRequest { request_id: "direct".into(), command_json }).await.expect_err("not here");
    let failure = from_status(&refused, "coordinator.forge");
    assert_eq!(failure.leader.as_deref(), Some(cluster.members[leader].address.as_str()), "{refused:?}");
    assert!(failure.is_retryable && !failure.may_have_happened);
}

async fn next(items: &mut mpsc::Receiver<WatchItem>) -> WatchItem {
    tokio::time::timeout(SOON, items.recv()).await.expect("an item comes").expect("the watch goes on")
}

/// Names of services put until `name` is.
async fn put_until(items: &mut mpsc::Receiver<WatchItem>, name: &str) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        match next(items).await {
            WatchItem::Event(event) => {
                if let Change::Put { object } = event.change {
                    seen.push(object.name());
                    if object.name() == name {
                        return seen;
                    }
                }
            }
            WatchItem::Reset => panic!("no reset after {seen:?}"),
            WatchItem::Current(_) => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_and_commands_go_on_over_the_leaders_death() {
    let mut cluster = Cluster::of_three().await;
    let admin = cluster.admin();
    let mut items = admin.watch(vec![Kind::Service], None);
    assert_eq!(next(&mut items).await, WatchItem::Reset);
    for name in ["a", "b"] {
        execute(&admin, Command::ApplyService { service: Box::new(wish(name, 1)) }).await;
    }
    put_until(&mut items, "b").await;

    let leader = cluster.leader().await;
    let dead = cluster.members.remove(leader);
    dead.kill().await;
    let begun = Instant::now();
    execute(&admin, Command::ApplyService { service: Box::new(wish("c", 1)) }).await;
    let away = begun.elapsed();
    println!("a command after the leader's death took {} ms", away.as_millis());
    assert!(away < Duration::from_secs(8), "{away:?}");
    let seen = put_until(&mut items, "c").await;
    assert!(!seen.contains(&"a".to_owned()), "nothing is told twice: {seen:?}");
    cluster.leader().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_are_removed_and_added_and_hand_over() {
    let mut cluster = Cluster::of_three().await;
    let admin = cluster.admin();
    let leader = cluster.leader().await;
    let heir = &cluster.members[(leader + 1) % 3];
    let heir_id = heir.coordinator.group_status().member_id;
    admin.change_members(MemberAction::TransferLeadership(heir_id), SOON).await.expect("handed over");
    let begun = Instant::now();
    while !heir.is_leader() {
        assert!(begun.elapsed() < SOON);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    let gone = cluster.members.remove(leader);
    let gone_id = gone.coordinator.group_status().member_id;
    admin.change_members(MemberAction::Remove(gone_id), SOON).await.expect("removed");
    gone.kill().await;
    let status = admin.status(SOON).await.expect("it answers");
    assert!(status.members.iter().all(|member| member.id != gone_id), "{status:?}");
    let listed = admin.read(Kind::Member, None, SOON).await.expect("it answers");
    assert_eq!(listed.objects.len(), 2, "{listed:?}");

    cluster.add("c4").await;
    execute(&admin, Command::ApplyService { service: Box::new(wish("a", 1)) }).await;
    let begun = Instant::now();
    loop {
        let status = cluster.members[2].coordinator.group_status();
        if status.members.iter().filter(|member| member.is_voter).count() == 3 && status.applied_index >= status.commit_index {
            break;
        }
        assert!(begun.elapsed() < SOON, "the new one votes: {status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_replaced_under_its_name_leads_and_the_one_before_is_not_heard() {
    let mut cluster = Cluster::of_three().await;
    let admin = cluster.admin();
    let first_id = cluster.members[0].coordinator.group_status().member_id;
    let second = cluster.members[1].coordinator.group_status().member_id;
    if cluster.leader().await == 1 {
        admin.change_members(MemberAction::TransferLeadership(first_id), SOON).await.expect("handed over");
    }
    admin.change_members(MemberAction::Remove(second), SOON).await.expect("removed");
    // The one before goes on, and asks for votes, until it is told.
    let before = cluster.members.remove(1);
    let token = cluster.token(Role::Coordinator, 1).await;
    let options = cluster.options("c2").await;
    let folders = (cluster.path("c2-again/data"), cluster.path("c2-again/tls"));
    let again = RunOptions { data_dir: folders.0, tls_dir: folders.1, join_token: Some(token), ..options };
    cluster.members.push(start(again).await);
    let heir = cluster.members[2].coordinator.group_status().member_id;
    assert_ne!(heir, second);
    let begun = Instant::now();
    while admin.change_members(MemberAction::TransferLeadership(heir), Duration::from_secs(5)).await.is_err() {
        assert!(begun.elapsed() < SOON, "it votes and leads: {:?}", cluster.members[0].coordinator.group_status());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    // A member that came when the one before was there, and has missed something, catches up with its successor.
    let third = cluster.members.remove(1);
    let options = RunOptions { listen: third.address.parse().expect("one"), address: third.address.clone(), ..cluster.options("c3").await };
    third.kill().await;
    let applied = execute(&admin, Command::ApplyService { service: Box::new(wish("a", 1)) }).await;
    cluster.members.push(start(options).await);
    let begun = Instant::now();
    while cluster.members[2].coordinator.group_status().revision < applied.revision {
        assert!(begun.elapsed() < SOON, "it follows: {:?}", cluster.members[2].coordinator.group_status());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let end = before.end().await;
    assert!(matches!(&end, Err(CoordinatorError::Removed { name, .. }) if name == "c2"), "it is told, and says so: {end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_was_away_answers_a_leader_that_was_let_in_meanwhile() {
    let mut cluster = Cluster::of_three().await;
    let admin = cluster.admin();
    if cluster.leader().await == 2 {
        let first = cluster.members[0].coordinator.group_status().member_id;
        admin.change_members(MemberAction::TransferLeadership(first), SOON).await.expect("handed over");
    }
    let away = cluster.members.remove(2);
    let options = RunOptions { listen: away.address.parse().expect("one"), address: away.address.clone(), ..cluster.options("c3").await };
    away.kill().await;
    cluster.add("c4").await;
    let heir = cluster.members[2].coordinator.group_status().member_id;
    let begun = Instant::now();
    while admin.change_members(MemberAction::TransferLeadership(heir), Duration::from_secs(5)).await.is_err()
        || !cluster.members[2].is_leader()
    {
        assert!(begun.elapsed() < SOON, "it votes and leads: {:?}", cluster.members[2].coordinator.group_status());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let applied = execute(&admin, Command::ApplyService { service: Box::new(wish("a", 1)) }).await;
    cluster.members.push(start(options).await);
    let begun = Instant::now();
    while cluster.members[3].coordinator.group_status().revision < applied.revision {
        assert!(begun.elapsed() < SOON, "it follows: {:?}", cluster.members[3].coordinator.group_status());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(cluster.members[2].is_leader(), "the one it did not know leads on");
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_end_at_a_coordinator_that_hears_of_no_leader() {
    let mut cluster = Cluster::of_three().await;
    let leader = cluster.leader().await;
    let alone = cluster.members.remove((leader + 1) % 3);
    let identity = SharedCredentials::new(credentials(&cluster.ca, Role::Admin, "operator", now_s(), Duration::from_secs(600)));
    let to = channel(&alone.address, &PeerName::Any(Role::Coordinator), &identity, ChannelOptions::default()).expect("a channel");
    let mut client = ClusterClient::new(to);
    let request = WatchRequest { after_revision: 0, kinds: vec!["service".into()] };
    let mut batches = client.watch(request.clone()).await.expect("it is heard").into_inner();
    batches.message().await.expect("a batch").expect("what there is");
    for other in cluster.members.drain(..) {
        other.kill().await;
    }
    let ended = tokio::time::timeout(SOON, async { while let Ok(Some(_)) = batches.message().await {} }).await;
    ended.expect("the watch ends");
    let refused = client.watch(request).await.expect_err("others may know more");
    assert!(from_status(&refused, "coordinator.forge").is_retryable, "{refused:?}");
    alone.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_told_to_stop_hands_over() {
    let mut cluster = Cluster::of_three().await;
    let admin = cluster.admin();
    let leader = cluster.leader().await;
    let old = cluster.members.remove(leader);
    let begun = Instant::now();
    old.stop().await;
    let stopped = begun.elapsed();
    let begun = Instant::now();
    execute(&admin, Command::ApplyService { service: Box::new(wish("a", 1)) }).await;
    println!("stopped in {} ms; the next command took {} ms", stopped.as_millis(), begun.elapsed().as_millis());
    assert!(stopped < Duration::from_secs(15), "{stopped:?}");
}
