//! The actors with a scripted launcher: deaths, restarts, giving up, draining.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use forge_shared::generate::{AdmitError, GenerateRequest};
use forge_shared::ids::{Epoch, Incarnation, NodeId, ReplicaId, ServiceName};
use forge_shared::link::{EngineLink, EngineStatus, EventStream, ModelCard};
use forge_shared::plan::Plan;
use forge_shared::spec::KvCacheDtype;
use forge_shared::telemetry::Metrics;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use ractor::{Actor, ActorRef, call};
use tokio::sync::{mpsc, oneshot};

use super::*;
use crate::WorkerError;
use crate::agent::RestartLimits;
use crate::link::ReplicaLink;

/// What a launch does.
#[derive(Clone, Copy, PartialEq)]
enum Script {
    Live,
    DieAtOnce,
    PanicWhileLoading,
    BadFile,
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
    fn launch(&self, _plan: &Plan) -> Result<Launched, WorkerError> {
        let launch = self.launches.fetch_add(1, Ordering::SeqCst);
        let (end, ended) = oneshot::channel::<Option<String>>();
        match self.script[launch.min(self.script.len() - 1)] {
            Script::BadFile => return Err(WorkerError::Setting { field: "model", reason: "bad file".into() }),
            Script::PanicWhileLoading => panic!("scripted panic"),
            Script::DieAtOnce => end.send(Some("scripted death".into())).expect("the receiver is here"),
            Script::Live => self.alive.lock().push(end),
        }
        let alive = self.alive.clone();
        Ok(Launched {
            engine: Arc::new(ScriptedEngine(Arc::new(card()))),
            ended: Box::pin(async move { ended.await.unwrap_or_else(|_| Some("dropped".into())) }),
            stop: Box::new(move |_| {
                for end in alive.lock().drain(..) {
                    let _ = end.send(None);
                }
            }),
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
    link: Arc<ReplicaLink>,
    launcher: Arc<ScriptedLauncher>,
    metrics: Metrics,
}

impl World {
    async fn new(script: Vec<Script>) -> World {
        let link = Arc::new(ReplicaLink::new(ModelCard { numerics_id: String::new(), ..card() }));
        let launcher = Arc::new(ScriptedLauncher { script, launches: AtomicUsize::new(0), alive: Arc::default() });
        let (sender, events) = mpsc::unbounded_channel();
        let metrics = Metrics::new();
        let arguments = NodeArguments {
            node: NodeId::from("n"),
            incarnation: Incarnation(1),
            limits: RestartLimits { deaths_max: 2, window_ms: 60_000, backoff_ms: 1 },
            launcher: launcher.clone(),
            metrics: metrics.clone(),
            links: HashMap::from([("m/0".to_owned(), link.clone())]),
            events: sender,
        };
        let (node, _) = Actor::spawn(None, NodeActor, arguments).await.expect("an actor starts");
        World { node, events, link, launcher, metrics }
    }

    async fn assign(&self, epoch: u64) -> Result<(), String> {
        call!(self.node, |reply| NodeMessage::Assign(Box::new(plan(epoch)), reply)).expect("the node answers")
    }

    async fn event(&mut self) -> NodeEvent {
        let event = tokio::time::timeout(Duration::from_secs(10), self.events.recv()).await.expect("an event in time");
        event.expect("the node lives")
    }
}

#[tokio::test]
async fn a_dying_engine_is_restarted_behind_the_same_link() {
    let mut world = World::new(vec![Script::Live]).await;
    assert!(!world.link.status().ready);
    world.assign(1).await.expect("taken");
    assert_eq!(world.event().await, NodeEvent::Ready("m/0".into()));
    assert!(world.link.status().ready);
    assert_eq!(world.link.card().numerics_id, "scripted");
    let end = world.launcher.alive.lock().pop().expect("one engine lives");
    end.send(Some("killed".into())).expect("watched");
    assert!(matches!(world.event().await, NodeEvent::Died(_, reason) if reason.contains("killed")));
    // A request that the dead engine had just admitted still needs to know which numerics it was promised.
    assert_eq!(world.link.card().numerics_id, "scripted");
    assert_eq!(world.event().await, NodeEvent::Ready("m/0".into()));
    let status = world.link.status();
    assert!(status.ready && status.restarts == 1, "{status:?}");
    assert!(world.metrics.encode().contains("forge_engine_restarts_total{model_name=\"m\"} 1"));
}

#[tokio::test]
async fn deaths_and_panics_are_given_up_after_a_few_tries() {
    let mut world = World::new(vec![Script::PanicWhileLoading, Script::DieAtOnce]).await;
    world.assign(1).await.expect("taken");
    loop {
        match world.event().await {
            NodeEvent::GaveUp(replica, _) => break assert_eq!(replica, "m/0"),
            NodeEvent::Drained => panic!("nobody drained"),
            NodeEvent::Died(..) | NodeEvent::Ready(_) => {}
        }
    }
    assert_eq!(world.launcher.launches.load(Ordering::SeqCst), 3);
    let status = world.link.status();
    assert!(!status.ready && status.reason.contains("given up"), "{status:?}");
}

#[tokio::test]
async fn a_model_that_does_not_load_is_given_up_at_once() {
    let mut world = World::new(vec![Script::BadFile]).await;
    world.assign(1).await.expect("taken");
    assert!(matches!(world.event().await, NodeEvent::Died(..)));
    assert!(matches!(world.event().await, NodeEvent::GaveUp(_, reason) if reason.contains("bad file")));
    assert_eq!(world.launcher.launches.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn draining_stops_the_engine_and_refuses_new_plans() {
    let mut world = World::new(vec![Script::Live]).await;
    world.assign(1).await.expect("taken");
    assert_eq!(world.event().await, NodeEvent::Ready("m/0".into()));
    world.node.cast(NodeMessage::Drain(Duration::from_secs(1))).expect("the node lives");
    assert_eq!(world.event().await, NodeEvent::Drained);
    assert!(!world.link.status().ready);
    assert!(world.assign(2).await.is_err_and(|reason| reason.contains("draining")));
}

#[tokio::test]
async fn a_newer_plan_replaces_the_older() {
    let mut world = World::new(vec![Script::Live]).await;
    world.assign(1).await.expect("taken");
    assert_eq!(world.event().await, NodeEvent::Ready("m/0".into()));
    world.assign(3).await.expect("newer");
    assert_eq!(world.event().await, NodeEvent::Ready("m/0".into()));
    assert!(world.assign(2).await.is_err_and(|reason| reason.contains("epoch")));
    assert_eq!(world.launcher.launches.load(Ordering::SeqCst), 2);
}
