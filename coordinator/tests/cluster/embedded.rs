//! A group of one in its own process, without a socket: what `forgectl serve` uses.

use forge_cluster::api::{ClusterApi, ClusterError, WatchItem};
use forge_coordinator::Coordinator;
use forge_shared::cluster::command::Command;
use forge_shared::cluster::event::Kind;

use crate::support::{SOON, execute, service, wish};

#[tokio::test(flavor = "multi_thread")]
async fn it_serves_remembers_and_holds_its_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    let first = Coordinator::embedded(folder.path(), "local").expect("it starts");
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
    assert!(Coordinator::embedded(folder.path(), "local").is_err(), "one process per folder");
    first.stop().await;
    assert!(items.recv().await.is_none_or(|item| matches!(item, WatchItem::Current(_))), "watches end with it");

    let again = Coordinator::embedded(folder.path(), "local").expect("it starts again");
    assert_eq!(service(&again, "a").await.expect("it remembers").service.spec.replicas, 2);
    again.stop().await;
    assert!(Coordinator::embedded(folder.path(), "another").is_err(), "another cluster's folder is refused");
}
