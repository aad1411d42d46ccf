//! `ReplicaActor`: one run of a replica on this node.
//!
//! It launches the replica off the async threads, puts its engine into the [`ReplicaLink`], and ends with an
//! error when the engine dies: restarting is its supervisor's decision, not its own.
//!
//! Invariant: it answers `Stop` while it pulls and loads too; what a launch brings after that is stopped unused.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use forge_shared::cluster::service::ReplicaPhase;
use forge_shared::cluster::session::Assignment;
use forge_shared::ids::NodeId;
use forge_shared::link::{EngineLink, PrefixUpdate};
use forge_store::CancelFlag;
use forge_text::ModelText;
use futures::future::BoxFuture;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::mpsc;

use crate::WorkerError;
use crate::actors::node::NodeMessage;
use crate::agent::RunId;
use crate::link::ReplicaLink;

/// Tells an engine to finish what runs within the time given and to end. Returns at once.
pub type StopEngine = Box<dyn Fn(Duration) + Send>;

/// Begins to listen to an engine's prefix cache.
pub type ListenPrefixes = Box<dyn Fn() -> mpsc::Receiver<PrefixUpdate> + Send + Sync>;

/// Tells how many tokens an engine has generated.
pub type CountTokens = Box<dyn Fn() -> u64 + Send + Sync>;

/// How long after its own deadline an engine may take to end before its actor stops waiting.
const STOP_MARGIN: Duration = Duration::from_secs(3);

/// A running replica.
pub struct Launched {
    /// The way to its engine; none where another worker has it.
    pub engine: Option<Arc<dyn EngineLink>>,
    /// What computes: equal ids promise equal bits.
    pub numerics_id: String,
    /// Of a replica with ranks on several workers: by whose fault it ended, once that is known.
    pub fault: Option<Arc<OnceLock<NodeId>>>,
    /// Resolves when the engine has ended: with the reason, if it died.
    pub ended: BoxFuture<'static, Option<String>>,
    /// Stops it; again with a shorter time shortens it.
    pub stop: StopEngine,
    /// Tokenizer and templates.
    pub text: Option<ModelText>,
    /// Its prefix cache.
    pub prefixes: ListenPrefixes,
    /// Tokens generated since it began.
    pub generated_tokens: CountTokens,
}

/// What a launch tells while it runs, and how it is stopped.
pub struct LaunchWatch {
    /// Told of a phase (pulling or loading) and its percent.
    pub progress: Box<dyn Fn(ReplicaPhase, u8) + Send + Sync>,
    /// Raised when the replica is not wanted any more.
    pub cancel: CancelFlag,
}

/// Loads and starts a replica for an assignment. The production launcher loads a checkpoint; tests script deaths.
pub trait Launch: Send + Sync + 'static {
    /// Blocking; called off the async threads.
    ///
    /// # Errors
    /// What keeps the replica from running.
    fn launch(&self, assignment: &Assignment, watch: &LaunchWatch) -> Result<Launched, WorkerError>;
}

/// Messages of a replica's actor.
pub enum ReplicaMessage {
    /// The launch has ended.
    Launched(Box<Result<Launched, WorkerError>>),
    /// The engine has ended; with the reason, if it died.
    EngineEnded(Option<String>),
    /// Finish running requests within this time, then end.
    Stop(Duration),
    /// The engine did not end in time: end without it.
    Abandon,
}

/// What a replica's actor starts with.
pub struct ReplicaArguments {
    /// What to carry out.
    pub assignment: Assignment,
    /// How.
    pub launcher: Arc<dyn Launch>,
    /// Where its engine is offered.
    pub link: Arc<ReplicaLink>,
    /// Who is told how it goes.
    pub node: ActorRef<NodeMessage>,
}

/// See the module documentation.
pub struct ReplicaActor;

/// State of a replica's actor.
pub struct ReplicaState {
    link: Arc<ReplicaLink>,
    node: ActorRef<NodeMessage>,
    run: RunId,
    cancel: CancelFlag,
    stop: Option<StopEngine>,
    fault: Option<Arc<OnceLock<NodeId>>>,
    stopping: bool,
}

impl Actor for ReplicaActor {
    type Msg = ReplicaMessage;
    type State = ReplicaState;
    type Arguments = ReplicaArguments;

    async fn pre_start(&self, myself: ActorRef<ReplicaMessage>, arguments: ReplicaArguments) -> Result<ReplicaState, ActorProcessingErr> {
        let ReplicaArguments { assignment, launcher, link, node } = arguments;
        let run = RunId::of(&assignment.plan);
        let cancel = CancelFlag::default();
        let watch = LaunchWatch { progress: progress(run.clone(), node.clone()), cancel: cancel.clone() };
        tokio::spawn(async move {
            let launch = tokio::task::spawn_blocking(move || launcher.launch(&assignment, &watch)).await;
            let launched = launch.unwrap_or_else(|failure| Err(WorkerError::EngineDied { reason: format!("while loading: {failure}") }));
            // An actor that has given up waiting needs no engine: dropping it ends it.
            let _ = myself.cast(ReplicaMessage::Launched(Box::new(launched)));
        });
        Ok(ReplicaState { link, node, run, cancel, stop: None, fault: None, stopping: false })
    }

    async fn handle(
        &self,
        myself: ActorRef<ReplicaMessage>,
        message: ReplicaMessage,
        state: &mut ReplicaState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ReplicaMessage::Launched(_) | ReplicaMessage::EngineEnded(_) | ReplicaMessage::Abandon if state.stopping => {
                myself.stop(Some("stopped".into()));
                Ok(())
            }
            ReplicaMessage::Launched(launched) => begin(&myself, state, (*launched)?).map_err(ActorProcessingErr::from),
            ReplicaMessage::EngineEnded(reason) => {
                let died = WorkerError::EngineDied { reason: reason.unwrap_or_else(|| "it ended by itself".into()) };
                Err(match &state.fault {
                    None => died,
                    Some(fault) => WorkerError::Several { node: fault.get().cloned(), source: Box::new(died) },
                }
                .into())
            }
            ReplicaMessage::Stop(timeout) => {
                state.link.detach("the replica is stopping");
                state.stopping = true;
                state.cancel.cancel();
                let wait = match &state.stop {
                    Some(stop) => {
                        stop(timeout);
                        timeout
                    }
                    // The launch ends soon after it was cancelled, or after the model is loaded.
                    None => Duration::ZERO,
                };
                myself.send_after(wait + STOP_MARGIN, || ReplicaMessage::Abandon);
                Ok(())
            }
            ReplicaMessage::Abandon => Ok(()),
        }
    }

    async fn post_stop(&self, _myself: ActorRef<ReplicaMessage>, state: &mut ReplicaState) -> Result<(), ActorProcessingErr> {
        state.cancel.cancel();
        state.link.detach("the replica is not running");
        Ok(())
    }
}

/// Tells the node how a launch goes, every percent once.
fn progress(run: RunId, node: ActorRef<NodeMessage>) -> Box<dyn Fn(ReplicaPhase, u8) + Send + Sync> {
    let last = parking_lot::Mutex::new(None);
    Box::new(move |phase, percent| {
        let percent = percent.min(100);
        if last.lock().replace((phase, percent)) == Some((phase, percent)) {
            return;
        }
        // A node that is gone stops the launch by other means.
        let _ = node.cast(NodeMessage::Progress { run: run.clone(), phase, percent });
    })
}

fn begin(myself: &ActorRef<ReplicaMessage>, state: &mut ReplicaState, launched: Launched) -> Result<(), WorkerError> {
    let Launched { engine, numerics_id, fault, ended, stop, text, prefixes, generated_tokens } = launched;
    (state.stop, state.fault) = (Some(stop), fault);
    if let Some(engine) = engine {
        state.link.attach(engine, text, prefixes, generated_tokens);
    }
    let replica = myself.clone();
    tokio::spawn(async move {
        let reason = ended.await;
        // A replica that is already gone needs no word of its engine's end.
        let _ = replica.cast(ReplicaMessage::EngineEnded(reason));
    });
    let ready = NodeMessage::Ready { run: state.run.clone(), numerics_id };
    state.node.cast(ready).map_err(|error| WorkerError::Actor { actor: "node", reason: error.to_string() })
}
