//! A worker's session with a scripted leader: heartbeats, reports, assignments, questions, loss of the lease, orphans.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Models, Node, spec, until};
use forge_cluster::api::{
    ClusterApi, ClusterError, ClusterLoads, GroupStatus, Listing, PlannedService, STREAM_DEPTH, Session as ClusterSession, WatchItem,
};
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Applied, Command};
use forge_shared::cluster::event::Kind;
use forge_shared::cluster::node::NodeSpec;
use forge_shared::cluster::service::ReplicaPhase;
use forge_shared::cluster::session::{Assignment, NodeDown, NodeUp};
use forge_shared::link::EngineLink;
use forge_shared::spec::ModelService;
use forge_worker::actors::NodeEvent;
use forge_worker::inspect::inspect;
use forge_worker::node::WorkerNode;
use forge_worker::session::{Session, SessionOptions, SessionState};
use futures::future::BoxFuture;
use tokio::sync::mpsc;

const LEASE_MS: u64 = 400;

/// A leader whose every word is the test's.
struct Leader {
    sessions: mpsc::UnboundedSender<(NodeSpec, mpsc::Receiver<NodeUp>, mpsc::Sender<NodeDown>)>,
    /// Takes sessions.
    is_up: AtomicBool,
    /// Some coordinator knows a leader.
    group_lives: AtomicBool,
}

fn unavailable<T: Send + 'static>() -> BoxFuture<'static, Result<T, ClusterError>> {
    Box::pin(async { Err(ClusterError::Unavailable { waited_ms: 0, reason: "scripted".into() }) })
}

impl ClusterApi for Leader {
    fn execute(&self, _request_id: String, _command: Command, _timeout: Duration) -> BoxFuture<'_, Result<Applied, ClusterError>> {
        unavailable()
    }
    fn read(&self, _kind: Kind, _name: Option<String>, _timeout: Duration) -> BoxFuture<'_, Result<Listing, ClusterError>> {
        unavailable()
    }
    fn watch(&self, _kinds: Vec<Kind>, _after: Option<Revision>) -> mpsc::Receiver<WatchItem> {
        mpsc::channel(1).1
    }
    fn plan(&self, _service: ModelService, _timeout: Duration) -> BoxFuture<'_, Result<PlannedService, ClusterError>> {
        unavailable()
    }
    fn session(&self, hello: NodeSpec, _timeout: Duration) -> BoxFuture<'_, Result<ClusterSession, ClusterError>> {
        if !self.is_up.load(Ordering::SeqCst) {
            return unavailable();
        }
        let (up, heard) = mpsc::channel(STREAM_DEPTH);
        let (say, down) = mpsc::channel(STREAM_DEPTH);
        let _ = self.sessions.send((hello, heard, say));
        Box::pin(async move { Ok(ClusterSession { up, down }) })
    }
    fn status(&self, _timeout: Duration) -> BoxFuture<'_, Result<GroupStatus, ClusterError>> {
        if !self.group_lives.load(Ordering::SeqCst) {
            return unavailable();
        }
        let status = GroupStatus {
            cluster_id: "c".into(),
            group_id: "c".into(),
            member_id: 1,
            leader_id: 2,
            term: 1,
            commit_index: 1,
            applied_index: 1,
            revision: Revision(1),
            members: Vec::new(),
            version: "test".into(),
            level: forge_shared::version::LEVEL,
            older: Vec::new(),
        };
        Box::pin(async move { Ok(status) })
    }
    fn loads(&self, _interval: Duration) -> mpsc::Receiver<ClusterLoads> {
        mpsc::channel(1).1
    }
}

struct World {
    leader: Arc<Leader>,
    sessions: mpsc::UnboundedReceiver<(NodeSpec, mpsc::Receiver<NodeUp>, mpsc::Sender<NodeDown>)>,
    session: Session,
    models: Arc<Models>,
    board: Arc<forge_worker::link::ReplicaBoard>,
}

/// One session as the leader has it.
struct Held {
    heard: mpsc::Receiver<NodeUp>,
    say: mpsc::Sender<NodeDown>,
}

impl World {
    async fn start() -> Self {
        let models = Arc::new(Models::new());
        let Node { worker: WorkerNode { actor, mut events, board, .. }, .. } = Node::start("w", &models, 1 << 30).await;
        let (sender, sessions) = mpsc::unbounded_channel();
        let leader = Arc::new(Leader { sessions: sender, is_up: AtomicBool::new(true), group_lives: AtomicBool::new(false) });
        let (api, stored, load_board) = (leader.clone(), models.stored(), board.clone());
        let session = Session::start(SessionOptions {
            spec: spec("w"),
            connect: Box::new(move || Ok(api as Arc<dyn ClusterApi>)),
            node: actor,
            load: Arc::new(move || WorkerNode::load(&load_board)),
            inspect: Arc::new(move |service| inspect(&stored, service)),
        });
        let session = session.expect("a thread");
        let reports = session.reports();
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if let NodeEvent::Report(report) = event {
                    let _ = reports.send(NodeUp::Replica { report });
                }
            }
        });
        World { leader, sessions, session, models, board }
    }

    async fn take(&mut self) -> Held {
        let (hello, heard, say) = tokio::time::timeout(common::PATIENCE, self.sessions.recv()).await.expect("in time").expect("it lives");
        assert_eq!(hello, spec("w"));
        say.send(NodeDown::Welcome { lease_ms: LEASE_MS, heartbeat_ms: 50 }).await.expect("it listens");
        Held { heard, say }
    }

    fn plan(&self) -> Assignment {
        self.models.assignment(self.models.service("s", "llama"), 0, 1, "w")
    }

    fn serves(&self) -> bool {
        self.board
            .get(&forge_worker::agent::RunId { replica: "s/0".into(), epoch: forge_shared::ids::Epoch(1) })
            .is_some_and(|link| link.status().ready)
    }
}

impl Held {
    async fn assign(&self, revision: u64, assignments: Vec<Assignment>) {
        self.say.send(NodeDown::Assignments { history: "g".into(), revision: Revision(revision), assignments }).await.expect("it listens");
    }

    /// Answers heartbeats until a message comes that `wanted` takes.
    async fn until<T>(&mut self, wanted: impl Fn(NodeUp) -> Option<T>) -> T {
        let wait = async {
            loop {
                match self.heard.recv().await.expect("the session lives") {
                    NodeUp::Heartbeat { number, load, usage } => {
                        let _ = self.say.send(NodeDown::Ack { number, lease_ms: LEASE_MS, shares: Vec::new() }).await;
                        if let Some(found) = wanted(NodeUp::Heartbeat { number, load, usage }) {
                            return found;
                        }
                    }
                    message => {
                        if let Some(found) = wanted(message) {
                            return found;
                        }
                    }
                }
            }
        };
        tokio::time::timeout(common::PATIENCE, wait).await.expect("in time")
    }

    async fn ready(&mut self) {
        self.until(|message| match message {
            NodeUp::Replica { report } if report.status.phase == ReplicaPhase::Ready => Some(()),
            _ => None,
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_carries_out_and_reports_what_the_leader_says() {
    let mut world = World::start().await;
    let mut held = world.take().await;
    let service = Box::new(world.models.service("s", "llama"));
    held.say.send(NodeDown::Inspect { number: 7, service: service.clone() }).await.expect("it listens");
    let answer = |message| match message {
        NodeUp::Inspected { number, result } => Some((number, result)),
        _ => None,
    };
    let (number, facts) = held.until(answer).await;
    let facts = facts.expect("a good model");
    assert_eq!((number, facts.layers, facts.shape.layer_bytes.len(), facts.shape.kv_heads), (7, 3, 3, 2));
    assert!(facts.weights_digest.starts_with("sha256:"), "{}", facts.weights_digest);
    let parts = facts.shape.embedding_bytes + facts.shape.head_bytes + facts.shape.layer_bytes.iter().sum::<u64>();
    assert!(parts <= facts.weights_bytes && parts * 10 > facts.weights_bytes * 9, "{parts} of {}", facts.weights_bytes);
    let mut missing = service;
    missing.spec.model = "./nowhere".into();
    held.say.send(NodeDown::Inspect { number: 8, service: missing }).await.expect("it listens");
    let (_, refused) = held.until(answer).await;
    assert!(refused.is_err_and(|reason| reason.contains("./nowhere")));

    held.assign(1, vec![world.plan()]).await;
    held.ready().await;
    // Heartbeats tell the load.
    let total = held
        .until(|message| match message {
            NodeUp::Heartbeat { load, .. } => load.replicas.first().map(|replica| (replica.kv_blocks_total, load.resident_bytes)),
            _ => None,
        })
        .await;
    assert!(total.0 == 24 && total.1 > 0, "{total:?}");

    // A new leader hears again where everything stands, without being asked.
    drop(held);
    let mut held = world.take().await;
    held.ready().await;
    world.session.goodbye(Duration::from_secs(5)).await;
    held.until(|message| (message == NodeUp::Goodbye).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orphan_goes_on_and_one_that_was_given_up_stops() {
    let mut world = World::start().await;
    let mut held = world.take().await;
    held.assign(1, vec![world.plan()]).await;
    held.ready().await;

    // Every coordinator is away, for several leases: it goes on.
    world.leader.is_up.store(false, Ordering::SeqCst);
    drop(held);
    tokio::time::sleep(Duration::from_millis(5 * LEASE_MS)).await;
    assert!(world.serves());
    assert_eq!(*world.session.state().borrow(), SessionState::Connecting);

    // The group answers, and does not take it in: it has been given up.
    world.leader.group_lives.store(true, Ordering::SeqCst);
    until("it stops serving", || !world.serves()).await;
    until("it says so", || *world.session.state().borrow() == SessionState::Expired).await;

    // Taken in again with the same plan, it serves again.
    world.leader.is_up.store(true, Ordering::SeqCst);
    let mut held = world.take().await;
    held.assign(1, vec![world.plan()]).await;
    held.ready().await;
    assert!(world.serves());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_falls_silent_is_left_and_a_refusal_ends_the_session() {
    let mut world = World::start().await;
    let held = world.take().await;
    // No heartbeat is answered: another session is begun before long.
    let (_, _, say) = tokio::time::timeout(common::PATIENCE, world.sessions.recv()).await.expect("in time").expect("it lives");
    say.send(NodeDown::Refused { reason: "incarnation 2 of w lives".into() }).await.expect("it listens");
    let error = tokio::time::timeout(common::PATIENCE, world.session.refused()).await.expect("in time");
    assert_eq!(error.to_string(), "the cluster refuses this node: incarnation 2 of w lives");
    drop(held);
}
