//! A group of one, called in its own process: what `forgectl serve` has.

use forge_cluster::api::{ClusterApi, ClusterError, WatchItem};
use forge_coordinator::prepare;
use forge_shared::cluster::command::Command;
use forge_shared::cluster::event::Kind;

use crate::support::{Cluster, SOON, execute, service, start, wish};

#[tokio::test(flavor = "multi_thread")]
async fn it_serves_remembers_and_holds_its_folder() {
    let mut cluster = Cluster::found().await;
    let first = cluster.members[0].coordinator.clone();
    let applied = execute(&first, Command::ApplyService { service: Box::new(wish("a", 1)) }).await;
    assert!(applied.changed);
    let inner = Command::RemoveMember { id: 1 };
    assert!(matches!(first.execute("r".into(), inner, SOON).await, Err(ClusterError::Forbidden { .. })));
    let mut items = first.watch(vec![Kind::Service], Some(applied.revision));
    execute(&first, Command::ScaleService { name: "a".into(), replicas: 2 }).await;
    loop {
        match tokio::time::timeout(SOON, items.recv()).await.expect("in time").expect("it goes on") {
            WatchItem::Reset => panic!("it resumes without a reset"),
            WatchItem::Event(event) if event.revision > applied.revision => break,
            WatchItem::Event(_) | WatchItem::Current(_) => {}
        }
    }
    assert!(prepare(cluster.options("c1").await).await.is_err(), "one process per folder");
    cluster.members.remove(0).stop().await;
    assert!(items.recv().await.is_none_or(|item| matches!(item, WatchItem::Current(_))), "watches end with it");

    let again = start(cluster.options("c1").await).await;
    assert_eq!(service(&again.coordinator, "a").await.expect("it remembers").service.spec.replicas, 2);
    again.stop().await;
}
