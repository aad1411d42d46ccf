//! The actors with a scripted launcher: deaths, restarts, giving up, draining.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use forge_shared::cluster::Revision;
use forge_shared::cluster::service::{ReplicaPhase, ReplicaStatus};
use forge_shared::cluster::session::Assignment;
use forge_shared::generate::{AdmitError, GenerateRequest};
use forge_shared::ids::{Epoch, Incarnation, NodeId, ReplicaId, ServiceName};
use forge_shared::link::{EngineLink, EngineStatus, EventStream, ModelCard};
use forge_shared::plan::Plan;
use forge_shared::spec::{KvCacheDtype, ModelService, ModelServiceSpec};
use forge_shared::telemetry::Metrics;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use ractor::{Actor, ActorRef, call};
use tokio::sync::{mpsc, oneshot};

use super::*;
use crate::WorkerError;
use crate::agent::{RestartLimits, RunId};
use crate::link::ReplicaBoard;

/// What a launch does.
#[derive(Clone, Copy, PartialEq)]
enum Script {
    Live,
    DieAtOnce,
    PanicWhileLoading,
    BadFile,
    LoadForEver,
}

struct ScriptedLauncher {
    /// In order of launches; the last one repeats.
    script: Vec<Script>,
    launches: AtomicUsize,
    alive: Arc<Mutex<Vec<oneshot::Sender<Option<String>>>>>,
}

struct ScriptedEngine(Arc<ModelCard>);

impl EngineLink for ScriptedEngine {
    fn submit(&self, _request: GenerateRequest) -> BoxFuture<'_, Result<EventStream, AdmitError>> {
        Box::pin(async { Err(AdmitError::Unavailable { reason: "scripted".into() }) })
    }
    fn card(&self) -> Arc<ModelCard> {
        self.0.clone()
    }
    fn status(&self) -> EngineStatus {
        EngineStatus { ready: true, ..EngineStatus::default() }
    }
}

impl Launch for ScriptedLauncher {
    fn launch(&self, _assignment: &Assignment, watch: &LaunchWatch) -> Result<Launched, WorkerError> {
        (watch.progress)(ReplicaPhase::Loading, 0);
        let launch = self.launches.fetch_add(1, Ordering::SeqCst);
        let (end, ended) = oneshot::channel::<Option<String>>();
        match self.script[launch.min(self.script.len() - 1)] {
            Script::BadFile => return Err(WorkerError::Setting { field: "model", reason: "bad file".into() }),
            Script::PanicWhileLoading => panic!("scripted panic"),
            Script::DieAtOnce => end.send(Some("scripted death".into())).expect("the receiver is here"),
            Script::Live => self.alive.lock().push(end),
            Script::LoadForEver => {
                while !watch.cancel.is_cancelled() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                return Err(forge_store::StoreError::Cancelled.into());
            }
        }
        let alive = self.alive.clone();
        Ok(Launched {
            engine: Some(Arc::new(ScriptedEngine(Arc::new(card())))),
            numerics_id: card().numerics_id,
            fault: None,
            ended: Box::pin(async move { ended.await.unwrap_or_else(|_| Some("dropped".into())) }),
            stop: Box::new(move |_| {
                for end in alive.lock().drain(..) {
                    let _ = end.send(None);
                }
            }),
            text: None,
            prefixes: Box::new(|| mpsc::channel(1).1),
            generated_tokens: Box::new(|| 0),
        })
    }
}

/// What the engine says of itself.
fn card() -> ModelCard {
    ModelCard {
        name: "m".into(),
        names: vec!["m".into()],
        unlisted_names: Vec::new(),
        max_model_len: 8,
        vocab_size: 8,
        numerics_id: "scripted".into(),
        created_s: 0,
        default_sampling: Default::default(),
    }
}

fn plan(epoch: u64) -> Plan {
    Plan {
        replica: ReplicaId { service: ServiceName::from("m"), index: 0 },
        epoch: Epoch(epoch),
        max_model_len: 8,
        block_size: 1,
        kv_blocks: 8,
        kv_cache_dtype: KvCacheDtype::F32,
        max_step_tokens: 8,
        max_batch_size: 1,
        ranks: Vec::new(),
    }
}

struct World {
    node: ActorRef<NodeMessage>,
    events: mpsc::UnboundedReceiver<NodeEvent>,
    board: Arc<ReplicaBoard>,
    launcher: Arc<ScriptedLauncher>,
    metrics: Metrics,
}

impl World {
    async fn new(script: Vec<Script>) -> World {
        let board = Arc::new(ReplicaBoard::default());
        let launcher = Arc::new(ScriptedLauncher { script, launches: AtomicUsize::new(0), alive: Arc::default() });
        let (sender, events) = mpsc::unbounded_channel();
        let metrics = Metrics::new();
        let arguments = NodeArguments {
            node: NodeId::from("n"),
            incarnation: Incarnation(1),
            limits: RestartLimits { deaths_max: 2, window_ms: 60_000, backoff_ms: 1 },
            launcher: launcher.clone(),
            metrics: metrics.clone(),
            board: board.clone(),
            events: sender,
        };
        let (node, _) = Actor::spawn(None, NodeActor, arguments).await.expect("an actor starts");
        World { node, events, board, launcher, metrics }
    }

    /// Assigns epochs of the one replica; the revision is the newest epoch.
    async fn assign(&self, epochs: &[u64]) -> Result<(), String> {
        let assignments = epochs.iter().map(|&epoch| assignment(epoch)).collect();
        let revision = Revision(epochs.iter().copied().max().unwrap_or(100));
        call!(self.node, |reply| NodeMessage::Assign { history: "g".into(), revision, assignments, reply: Some(reply) })
            .expect("the node answers")
    }

    fn status(&self, epoch: u64) -> Option<EngineStatus> {
        self.board.get(&RunId { replica: "m/0".into(), epoch: Epoch(epoch) }).map(|link| link.status())
    }

    /// Waits for a phase of an epoch.
    async fn phase(&mut self, epoch: u64, phase: ReplicaPhase) -> ReplicaStatus {
        let wanted = async {
            loop {
                match self.events.recv().await.expect("the node lives") {
                    NodeEvent::Report(report) if report.epoch == Epoch(epoch) && report.status.phase == phase => return report.status,
                    _ => {}
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wanted).await.expect("in time")
    }

    async fn drained(&mut self) {
        let drained = async { while self.events.recv().await.expect("the node lives") != NodeEvent::Drained {} };
        tokio::time::timeout(Duration::from_secs(10), drained).await.expect("in time");
    }
}

fn assignment(epoch: u64) -> Assignment {
    let service = ModelService::new("m", ModelServiceSpec { model: "m".into(), ..Default::default() });
    Assignment { plan: plan(epoch), service: Box::new(service), weights_digest: String::new(), drain_ms: None, peers: Vec::new() }
}

#[tokio::test]
async fn a_dying_engine_is_restarted_behind_the_same_link() {
    let mut world = World::new(vec![Script::Live]).await;
    world.assign(&[1]).await.expect("taken");
    assert_eq!(world.phase(1, ReplicaPhase::Ready).await.numerics_id, "scripted");
    let link = world.board.get(&RunId { replica: "m/0".into(), epoch: Epoch(1) }).expect("it is on the board");
    assert!(link.status().ready);
    let end = world.launcher.alive.lock().pop().expect("one engine lives");
    end.send(Some("killed".into())).expect("watched");
    assert!(world.phase(1, ReplicaPhase::Loading).await.reason.contains("killed"));
    // A request that the dead engine had just admitted still needs to know which numerics it was promised.
    assert_eq!(link.card().numerics_id, "scripted");
    assert_eq!(world.phase(1, ReplicaPhase::Ready).await.restarts, 1);
    let status = link.status();
    assert!(status.ready && status.restarts == 1, "{status:?}");
    assert!(world.metrics.encode().contains("forge_engine_restarts_total{model_name=\"m\",replica=\"m/0\",epoch=\"1\"} 1"));
}

#[tokio::test]
async fn deaths_and_panics_are_given_up_after_a_few_tries() {
    let mut world = World::new(vec![Script::PanicWhileLoading, Script::DieAtOnce]).await;
    world.assign(&[1]).await.expect("taken");
    world.phase(1, ReplicaPhase::Failed).await;
    assert_eq!(world.launcher.launches.load(Ordering::SeqCst), 3);
    let status = world.status(1).expect("it is kept until the coordinators take it away");
    assert!(!status.ready && status.reason.contains("given up"), "{status:?}");
}

#[tokio::test]
async fn a_model_that_does_not_load_is_given_up_at_once() {
    let mut world = World::new(vec![Script::BadFile]).await;
    world.assign(&[1]).await.expect("taken");
    assert!(world.phase(1, ReplicaPhase::Failed).await.reason.contains("bad file"));
    assert_eq!(world.launcher.launches.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn draining_stops_the_engine_and_refuses_new_plans() {
    let mut world = World::new(vec![Script::Live]).await;
    world.assign(&[1]).await.expect("taken");
    world.phase(1, ReplicaPhase::Ready).await;
    world.node.cast(NodeMessage::Drain(Duration::from_secs(1))).expect("the node lives");
    world.drained().await;
    assert_eq!(world.status(1), None);
    assert!(world.assign(&[2]).await.is_err_and(|reason| reason.contains("draining")));
}

#[tokio::test]
async fn a_newer_epoch_comes_beside_the_older_until_that_is_taken_away() {
    let mut world = World::new(vec![Script::Live]).await;
    world.assign(&[1]).await.expect("taken");
    world.phase(1, ReplicaPhase::Ready).await;
    world.assign(&[1, 3]).await.expect("newer");
    world.phase(3, ReplicaPhase::Ready).await;
    assert!(world.status(1).is_some_and(|status| status.ready));
    assert!(world.assign(&[2]).await.is_err_and(|reason| reason.contains("revision 2")));
    assert_eq!(world.launcher.launches.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_launch_under_way_is_cancelled_when_the_plan_is_taken_away() {
    let mut world = World::new(vec![Script::LoadForEver]).await;
    world.assign(&[1]).await.expect("taken");
    world.phase(1, ReplicaPhase::Loading).await;
    world.assign(&[]).await.expect("taken");
    world.phase(1, ReplicaPhase::Stopped).await;
    assert_eq!(world.status(1), None);
}
