//! Sessions of a leader whose other parts stand still: nobody but the session itself can end it.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use forge_proto::raft::Message;
use forge_shared::cluster::node::NodeLoad;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::*;
use crate::coordinator::CoordinatorOptions;
use crate::raft::{MemberChange, PeerTransport, RaftOptions};
use crate::state::test_support::worker;

/// For anything that must happen.
const SOON: Duration = Duration::from_secs(20);

/// Peers that are nowhere. While somebody holds the lock raft's thread stands still, as at a disk that does not answer.
#[derive(Clone, Default)]
struct Nowhere(Arc<Mutex<()>>);

impl PeerTransport for Nowhere {
    fn send(&self, _: u64, _: Vec<Message>) {
        drop(self.0.lock());
    }
    fn send_snapshot(&self, _: u64, _: Message, _: Bytes) {}
}

/// A session with a leader of its own beside the coordinator's.
struct World {
    coordinator: Coordinator,
    peers: Nowhere,
    leading: Arc<Leading>,
    up: mpsc::Sender<NodeUp>,
    down: mpsc::Receiver<NodeDown>,
    task: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

impl World {
    async fn new() -> World {
        let folder = tempfile::tempdir().expect("a folder");
        let mut raft = RaftOptions::new(1, "test", folder.path());
        raft.bootstrap = Some(vec![1]);
        let mut options = CoordinatorOptions::new(raft, "test", "c1", "");
        options.lease = Duration::from_secs(600);
        let peers = Nowhere::default();
        let coordinator = Coordinator::start(options, Arc::new(peers.clone())).expect("it starts");
        let spec = worker("a", 1, &[64]);
        let until = Instant::now() + SOON;
        while let Err(error) = submit(&coordinator, "join", Command::JoinNode { spec: Box::new(spec.clone()) }).await {
            assert!(Instant::now() < until, "it leads: {error}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let leading = Arc::new(coordinator.begin_to_lead(1));
        let (down, received) = mpsc::channel(STREAM_DEPTH);
        let (up, sent) = mpsc::channel(STREAM_DEPTH);
        let handle = leading.begin(coordinator.now_ms(), &coordinator.0.replicated.read(), &spec, down.clone()).expect("there is room");
        let running = Running { coordinator: coordinator.clone(), leading: leading.clone(), handle, spec, down, reports: Arc::default() };
        let task = tokio::spawn(running.run(sent));
        World { coordinator, peers, leading, up, down: received, task, _folder: folder }
    }

    async fn beat(&mut self, number: u64) -> NodeDown {
        self.up.send(NodeUp::Heartbeat { number, load: NodeLoad::default(), usage: Vec::new() }).await.expect("it goes on");
        self.told().await
    }

    async fn told(&mut self) -> NodeDown {
        tokio::time::timeout(SOON, self.down.recv()).await.expect("in time").expect("a message")
    }

    async fn ends(self) {
        tokio::time::timeout(SOON, self.task).await.expect("it ends").expect("it ends well");
        assert!(self.leading.sessions.workers().is_empty());
        self.coordinator.stop().await;
    }
}

async fn submit(coordinator: &Coordinator, id: &str, command: Command) -> Result<(), CoordinatorError> {
    coordinator.submit(coordinator.own(id.into(), command), SOON).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_with_the_leadership_though_nobody_finds_it_in_the_table() {
    let mut world = World::new().await;
    assert!(matches!(world.beat(1).await, NodeDown::Ack { number: 1, .. }));
    world.leading.ended.cancel();
    assert!(matches!(world.told().await, NodeDown::Moved { .. }));
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_node_gets_no_lease_for_its_heartbeat() {
    let mut world = World::new().await;
    assert!(matches!(world.beat(1).await, NodeDown::Ack { number: 1, .. }));
    let lost = Command::LoseNode { node: "a".into(), incarnation: forge_shared::ids::Incarnation(1), reason: "test".into() };
    submit(&world.coordinator, "lose", lost).await.expect("applied");
    assert!(matches!(world.beat(2).await, NodeDown::Moved { .. }));
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_stands_still_holds_no_node_and_loses_none() {
    let mut world = World::new().await;
    // Somebody to send to.
    world.coordinator.raft().change_members(MemberChange::AddLearner(9), SOON).await.expect("added");
    let is_held = Arc::new(AtomicBool::new(true));
    let holding = std::thread::spawn({
        let (peers, is_held) = (world.peers.clone(), is_held.clone());
        move || {
            let _held = peers.0.lock();
            while is_held.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    });
    let until = Instant::now() + SOON;
    while !world.coordinator.is_stalled() {
        assert!(Instant::now() < until, "raft's thread stands still");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(matches!(world.beat(1).await, NodeDown::Moved { .. }));
    assert!(matches!(world.coordinator.leading(), Err(CoordinatorError::NotLeader { leader: None })));
    is_held.store(false, Ordering::Relaxed);
    holding.join().expect("it ends");
    while world.coordinator.leading().is_err() {
        assert!(Instant::now() < until, "it goes on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    world.ends().await;
}
