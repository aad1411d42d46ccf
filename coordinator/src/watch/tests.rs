//! Watchers over a small state of notices.

use std::time::Duration;

use forge_shared::cluster::event::{Kind, Notice};
use parking_lot::Mutex;

use super::*;

/// A state that keeps every notice, published as the state machine does it.
struct World {
    hub: Arc<Hub>,
    notices: Mutex<(Revision, Vec<Notice>)>,
}

impl Source for World {
    fn visit(&self, see: &mut See<'_>) {
        let held = self.notices.lock();
        see(held.0, &|| held.1.iter().cloned().map(Object::Notice).collect());
    }
}

impl World {
    fn new(bounds: HistoryBounds) -> Arc<World> {
        let hub = Hub::new(bounds, Revision(0));
        tokio::spawn(hub.clone().run(CancellationToken::new()));
        Arc::new(World { hub, notices: Mutex::new((Revision(0), Vec::new())) })
    }

    fn write(&self, count: usize) {
        for _ in 0..count {
            let mut held = self.notices.lock();
            held.0.0 += 1;
            let notice = Notice {
                number: held.0.0,
                revision: held.0,
                at_ms: 0,
                is_warning: false,
                reason: "Test".into(),
                about: "node/a".into(),
                message: "x".repeat(1000),
            };
            held.1.push(notice.clone());
            self.hub.publish(held.0, vec![Change::Put { object: Object::Notice(notice) }]);
        }
    }

    fn watch(self: &Arc<Self>, kinds: KindSet, after: Option<u64>) -> Watcher {
        self.hub.watch(self.clone(), kinds, after.map(Revision))
    }
}

async fn soon(watcher: &mut Watcher) -> Batch {
    tokio::time::timeout(Duration::from_secs(5), watcher.next()).await.expect("a batch comes")
}

fn revisions(batch: &Batch) -> Vec<u64> {
    let notice = |published: &Arc<Published>| match &published.event.change {
        Change::Put { object: Object::Notice(notice) } => notice.revision.0,
        other => panic!("{other:?}"),
    };
    batch.events.iter().map(notice).collect()
}

#[tokio::test]
async fn begins_with_everything_and_goes_on() {
    let world = World::new(HistoryBounds::default());
    world.write(3);
    let mut watcher = world.watch(KindSet::ALL, None);
    let first = soon(&mut watcher).await;
    assert!(first.is_reset && first.is_reset_end);
    assert_eq!((revisions(&first), first.revision), (vec![1, 2, 3], Revision(3)));
    world.write(2);
    let next = soon(&mut watcher).await;
    assert_eq!((revisions(&next), next.revision, next.is_reset), (vec![4, 5], Revision(5), false));
}

#[tokio::test]
async fn resumes_after_a_revision_without_a_reset() {
    let world = World::new(HistoryBounds::default());
    world.write(9);
    let batch = soon(&mut world.watch(KindSet::ALL, Some(6))).await;
    assert_eq!((revisions(&batch), batch.is_reset), (vec![7, 8, 9], false));
}

#[tokio::test]
async fn resets_where_the_history_was_compacted() {
    let world = World::new(HistoryBounds { events: 4, json_bytes: 1 << 20 });
    world.write(9);
    let batch = soon(&mut world.watch(KindSet::ALL, Some(2))).await;
    assert!(batch.is_reset);
    assert_eq!(revisions(&batch), (1..=9).collect::<Vec<_>>());
    let batch = soon(&mut world.watch(KindSet::ALL, Some(5))).await;
    assert!(!batch.is_reset, "what is still there is given without a reset");
}

#[tokio::test]
async fn one_that_stops_reading_is_reset_and_costs_nothing() {
    let world = World::new(HistoryBounds { events: 8, json_bytes: 1 << 20 });
    let mut slow = world.watch(KindSet::ALL, None);
    assert!(soon(&mut slow).await.is_reset_end);
    world.write(100);
    let mut all = Vec::new();
    loop {
        let batch = soon(&mut slow).await;
        assert_eq!(batch.is_reset, all.is_empty());
        all.extend(revisions(&batch));
        if batch.is_reset_end {
            break;
        }
    }
    assert_eq!(all, (1..=100).collect::<Vec<_>>());
}

#[tokio::test]
async fn large_listings_come_in_parts_and_a_stalled_part_begins_again() {
    let world = World::new(HistoryBounds::default());
    world.write(600);
    let mut watcher = world.watch(KindSet::ALL, None);
    let first = soon(&mut watcher).await;
    assert!(first.is_reset && !first.is_reset_end && first.revision == Revision(0));
    // Enough passes for the next listing to replace this one.
    world.write(300);
    let mut other = world.watch(KindSet::ALL, None);
    while !soon(&mut other).await.is_reset_end {}
    let again = soon(&mut watcher).await;
    assert!(again.is_reset && revisions(&again)[0] == 1, "it begins again");
}

#[tokio::test]
async fn a_listing_is_made_once_for_all_who_begin() {
    let world = World::new(HistoryBounds::default());
    world.write(5);
    let first = soon(&mut world.watch(KindSet::ALL, None)).await;
    let second = soon(&mut world.watch(KindSet::ALL, None)).await;
    assert!(Arc::ptr_eq(&first.events[0], &second.events[0]));
}

#[tokio::test]
async fn other_kinds_are_silent_but_keep_the_place() {
    let world = World::new(HistoryBounds::default());
    let mut watcher = world.watch(KindSet::of(&[Kind::Key]), None);
    assert!(soon(&mut watcher).await.is_reset_end);
    world.write(10);
    assert!(tokio::time::timeout(Duration::from_millis(100), watcher.next()).await.is_err(), "nothing is said");
    world.write(1100);
    let batch = soon(&mut watcher).await;
    assert!(batch.events.is_empty() && batch.revision >= Revision(1000), "{batch:?}");
}

#[tokio::test]
async fn a_snapshot_resets_watchers() {
    let world = World::new(HistoryBounds::default());
    world.write(2);
    let mut watcher = world.watch(KindSet::ALL, None);
    soon(&mut watcher).await;
    world.notices.lock().0 = Revision(50);
    world.hub.reset(Revision(50));
    let batch = soon(&mut watcher).await;
    assert!(batch.is_reset && batch.revision == Revision(50));
}

/// A state whose lock is held elsewhere when a listing is made of it.
struct Held {
    state: Mutex<Revision>,
    asked: std::sync::mpsc::Sender<()>,
}

impl Source for Held {
    fn visit(&self, see: &mut See<'_>) {
        self.asked.send(()).expect("the test waits");
        let revision = self.state.lock();
        see(*revision, &Vec::new);
    }
}

#[test]
fn a_snapshot_does_not_wait_for_a_watcher_that_begins() {
    let hub = Hub::new(HistoryBounds::default(), Revision(1));
    let (asked, is_asked) = std::sync::mpsc::channel();
    let source = Arc::new(Held { state: Mutex::new(Revision(1)), asked });
    let (done, is_done) = std::sync::mpsc::channel();
    let mut held = source.state.lock();
    let beginning = std::thread::spawn({
        let (hub, source) = (hub.clone(), source.clone());
        move || hub.listing(source.as_ref()).revision
    });
    is_asked.recv_timeout(Duration::from_secs(20)).expect("a listing is begun");
    // On a thread of its own, so that a deadlock fails the test.
    std::thread::spawn({
        let hub = hub.clone();
        move || {
            hub.reset(Revision(9));
            done.send(()).expect("the test waits");
        }
    });
    is_done.recv_timeout(Duration::from_secs(20)).expect("the reset needs the state's lock alone");
    *held = Revision(9);
    drop(held);
    assert_eq!(beginning.join().expect("it ends"), Revision(9));
}

#[tokio::test]
async fn a_listing_of_before_a_snapshot_is_given_to_nobody_even_at_the_same_revision() {
    let world = World::new(HistoryBounds::default());
    world.write(2);
    assert!(soon(&mut world.watch(KindSet::ALL, None)).await.is_reset_end);
    world.hub.reset(Revision(2));
    let mut watcher = world.watch(KindSet::ALL, None);
    assert!(soon(&mut watcher).await.is_reset_end);
    world.write(1);
    let batch = soon(&mut watcher).await;
    assert_eq!((revisions(&batch), batch.is_reset), (vec![3], false));
}

#[tokio::test]
async fn a_revision_that_never_comes_is_reset() {
    let world = World::new(HistoryBounds::default());
    world.write(2);
    let mut watcher = world.watch(KindSet::ALL, Some(1000));
    let began = std::time::Instant::now();
    let batch = tokio::time::timeout(Duration::from_secs(60), watcher.next()).await.expect("it does not wait for ever");
    assert!(batch.is_reset && began.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn a_coordinator_that_is_behind_waits_for_the_revision() {
    let world = World::new(HistoryBounds::default());
    world.write(2);
    let mut watcher = world.watch(KindSet::ALL, Some(4));
    assert!(tokio::time::timeout(Duration::from_millis(50), watcher.next()).await.is_err());
    world.write(4);
    let batch = soon(&mut watcher).await;
    assert_eq!((revisions(&batch), batch.is_reset), (vec![5, 6], false));
}
