//! `ReplicaActor`: one replica of a model service on this node.
//!
//! It launches the replica off the async threads, puts its engine into the [`ReplicaLink`], and ends with an
//! error when the engine dies: restarting is its supervisor's decision, not its own.

use std::sync::Arc;
use std::time::Duration;

use forge_shared::ids::Epoch;
use forge_shared::link::EngineLink;
use forge_shared::plan::Plan;
use futures::future::BoxFuture;
use ractor::{Actor, ActorProcessingErr, ActorRef};

use crate::WorkerError;
use crate::actors::node::NodeMessage;
use crate::link::ReplicaLink;

/// Tells an engine to finish what runs within the time given and to end. Returns at once.
pub type StopEngine = Box<dyn FnOnce(Duration) + Send>;

/// How long after its own deadline an engine may take to end before its actor stops waiting.
const STOP_MARGIN: Duration = Duration::from_secs(3);

/// A running replica.
pub struct Launched {
    /// The way to its engine.
    pub engine: Arc<dyn EngineLink>,
    /// Resolves when the engine has ended: with the reason, if it died.
    pub ended: BoxFuture<'static, Option<String>>,
    /// Stops it.
    pub stop: StopEngine,
}

/// Loads and starts a replica for a plan. The production launcher loads a checkpoint; tests script deaths.
pub trait Launch: Send + Sync + 'static {
    /// Blocking; called off the async threads.
    ///
    /// # Errors
    /// What keeps the replica from running.
    fn launch(&self, plan: &Plan) -> Result<Launched, WorkerError>;
}

/// Messages of a replica's actor.
pub enum ReplicaMessage {
    /// Sent to itself at start.
    Launch,
    /// The engine has ended; with the reason, if it died.
    EngineEnded(Option<String>),
    /// Finish running requests within this time, then end.
    Stop(Duration),
    /// The engine did not end in time: end without it.
    Abandon,
}

/// What a replica's actor starts with.
pub struct ReplicaArguments {
    /// The plan to carry out.
    pub plan: Plan,
    /// How.
    pub launcher: Arc<dyn Launch>,
    /// Where its engine is offered.
    pub link: Arc<ReplicaLink>,
    /// Who is told when it is ready.
    pub node: ActorRef<NodeMessage>,
}

/// See the module documentation.
pub struct ReplicaActor;

/// State of a replica's actor.
pub struct ReplicaState {
    arguments: ReplicaArguments,
    stop: Option<StopEngine>,
    stopping: bool,
}

impl ReplicaState {
    fn epoch(&self) -> Epoch {
        self.arguments.plan.epoch
    }
}

impl Actor for ReplicaActor {
    type Msg = ReplicaMessage;
    type State = ReplicaState;
    type Arguments = ReplicaArguments;

    async fn pre_start(&self, myself: ActorRef<ReplicaMessage>, arguments: ReplicaArguments) -> Result<ReplicaState, ActorProcessingErr> {
        myself.cast(ReplicaMessage::Launch)?;
        Ok(ReplicaState { arguments, stop: None, stopping: false })
    }

    async fn handle(
        &self,
        myself: ActorRef<ReplicaMessage>,
        message: ReplicaMessage,
        state: &mut ReplicaState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ReplicaMessage::Launch => launch(&myself, state).await.map_err(ActorProcessingErr::from),
            ReplicaMessage::EngineEnded(_) | ReplicaMessage::Abandon if state.stopping => {
                myself.stop(Some("stopped".into()));
                Ok(())
            }
            ReplicaMessage::EngineEnded(reason) => {
                let reason = reason.unwrap_or_else(|| "it ended by itself".into());
                Err(WorkerError::EngineDied { reason }.into())
            }
            ReplicaMessage::Stop(timeout) => {
                state.arguments.link.detach("the replica is stopping");
                state.stopping = true;
                match state.stop.take() {
                    Some(stop) => {
                        stop(timeout);
                        myself.send_after(timeout + STOP_MARGIN, || ReplicaMessage::Abandon);
                    }
                    None => myself.stop(Some("stopped".into())),
                }
                Ok(())
            }
            ReplicaMessage::Abandon => Ok(()),
        }
    }

    async fn post_stop(&self, _myself: ActorRef<ReplicaMessage>, state: &mut ReplicaState) -> Result<(), ActorProcessingErr> {
        state.arguments.link.detach("the replica is not running");
        Ok(())
    }
}

async fn launch(myself: &ActorRef<ReplicaMessage>, state: &mut ReplicaState) -> Result<(), WorkerError> {
    let launcher = state.arguments.launcher.clone();
    let plan = state.arguments.plan.clone();
    let launched = tokio::task::spawn_blocking(move || launcher.launch(&plan))
        .await
        .map_err(|failure| WorkerError::EngineDied { reason: format!("while loading: {failure}") })??;
    state.stop = Some(launched.stop);
    state.arguments.link.attach(launched.engine);
    let replica = myself.clone();
    tokio::spawn(async move {
        let reason = launched.ended.await;
        // A replica that is already gone needs no word of its engine's end.
        let _ = replica.cast(ReplicaMessage::EngineEnded(reason));
    });
    let ready = NodeMessage::ReplicaReady { replica: state.arguments.plan.replica.to_string(), epoch: state.epoch() };
    state.arguments.node.cast(ready).map_err(|error| WorkerError::Actor { actor: "node", reason: error.to_string() })
}
