//! A group whose members are restarted one by one as a newer build: one build stands for two.

use std::time::Instant;

use forge_cluster::api::{ClusterApi, ClusterError};
use forge_coordinator::{RunOptions, prepare};
use forge_shared::cluster::command::{Command, CommandError};
use forge_shared::cluster::node::Role;
use forge_shared::rollout::{Portion, RolloutSpec};
use forge_shared::spec::ModelService;

use super::support::*;

const NAMES: [&str; 3] = ["c1", "c2", "c3"];

/// A wish that only the new level can write down.
fn newer() -> ModelService {
    let mut wish = wish("demo", 1);
    wish.spec.rollout = RolloutSpec { max_surge: Portion::Count(2), ..RolloutSpec::default() };
    wish
}

async fn apply(cluster: &Cluster, wish: ModelService) -> Result<(), ClusterError> {
    let id = format!("apply-{:?}", Instant::now()).replace(|sign: char| !sign.is_ascii_alphanumeric(), "-");
    cluster.admin().execute(id, Command::ApplyService { service: Box::new(wish) }, SOON).await.map(|_| ())
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < SOON, "{what}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_member_that_is_restarted_raises_the_level_and_older_ones_stay_out() {
    let mut cluster = Cluster::of_three_at(1).await;
    apply(&cluster, wish("demo", 1)).await.expect("known to all");
    for (position, name) in NAMES.into_iter().enumerate() {
        let refused = apply(&cluster, newer()).await.expect_err("too new");
        assert!(matches!(&refused, ClusterError::Command(CommandError::Level { needed: 2, level: 1, .. })), "{refused:?}");
        assert!(refused.to_string().contains(&format!("coordinator {name} runs")), "{refused}");

        let old = cluster.members.remove(position);
        let options =
            RunOptions { address: old.address.clone(), listen: old.address.parse().expect("an address"), ..cluster.options(name).await };
        old.stop().await;
        let new = start(RunOptions { build: Default::default(), ..options }).await;
        cluster.members.insert(position, new);
        until("it is written down with its level", async || {
            let leader = &cluster.members[cluster.leader().await].coordinator;
            leader.group_status().members.iter().any(|member| member.name == name && member.level == 2)
        })
        .await;
    }
    until("all are at the new level", async || cluster.members.iter().all(|member| member.coordinator.group_status().level == 2)).await;
    apply(&cluster, newer()).await.expect("known to all");
    assert!(cluster.members.iter().all(|member| member.coordinator.group_status().older.is_empty()));

    // A new coordinator of the old build is not let in, and its token not used up.
    let token = cluster.token(Role::Coordinator, 1).await;
    cluster.level = 1;
    let options = RunOptions { join_token: Some(token), ..cluster.options("c4").await };
    let refused = prepare(options.clone()).await.expect_err("too old").to_string();
    assert!(refused.contains("start a newer forge-coordinator"), "{refused}");
    // One that was upgraded does not go back.
    let new = cluster.members.remove(2);
    let back = RunOptions { address: new.address.clone(), listen: new.address.parse().expect("an address"), ..cluster.options("c3").await };
    new.stop().await;
    let ended = match prepare(back).await {
        // It stops before the first entry that it does not know.
        Ok(prepared) => tokio::time::timeout(SOON, prepared.run(std::future::pending())).await.expect("it ends").expect_err("too old"),
        Err(error) => error,
    };
    assert!(ended.to_string().contains("level 2") && ended.to_string().contains("start a newer one"), "{ended}");
    let joined = prepare(RunOptions { build: Default::default(), ..options }).await;
    assert!(joined.is_ok(), "{:?}", joined.err());
}
