//! `ReplicaActor`: one replica of a model service on this node.
//!
//! It launches the replica off the async threads, puts its engine into the [`ReplicaLink`], and ends with an
//! error when the engine dies: restarting is its supervisor's decision, not its own.

use std::sync::Arc;
use std::time::Duration;

use forge_shared::ids::Epoch;
use forge_shared::link::EngineLink;
use forge_shared::plan::Plan;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::oneshot;

use crate::WorkerError;
use crate::actors::node::NodeMessage;
use crate::link::ReplicaLink;

/// Ends an engine: finish what runs within the time given, then free everything. Blocking.
pub type StopEngine = Box<dyn FnOnce(Duration) + Send>;

/// A running replica.
pub struct Launched {
    /// The way to its engine.
    pub engine: Arc<dyn EngineLink>,
    /// Receives the reason if the engine ends by itself; a dropped sender is a death too.
    pub death: oneshot::Receiver<String>,
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
    /// The engine ended by itself.
    EngineDied(String),
    /// Finish running requests within this time, then end.
    Stop(Duration),
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
        Ok(ReplicaState { arguments, stop: None })
    }

    async fn handle(
        &self,
        myself: ActorRef<ReplicaMessage>,
        message: ReplicaMessage,
        state: &mut ReplicaState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ReplicaMessage::Launch => launch(&myself, state).await.map_err(ActorProcessingErr::from),
            ReplicaMessage::EngineDied(reason) => Err(WorkerError::EngineDied { reason }.into()),
            ReplicaMessage::Stop(timeout) => {
                state.arguments.link.detach("the replica is stopping");
                if let Some(stop) = state.stop.take() {
                    // The engine is stopped off the async threads; its own deadline bounds the wait.
                    tokio::task::spawn_blocking(move || stop(timeout)).await?;
                }
                myself.stop(Some("stopped".into()));
                Ok(())
            }
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
    let launched = tokio::task::spawn_blocking(move || launcher.launch(&plan)).await.map_err(|failure| WorkerError::EngineDied {
        reason: format!("while loading: {failure}"),
    })??;
    state.stop = Some(launched.stop);
    state.arguments.link.attach(launched.engine);
    let replica = myself.clone();
    tokio::spawn(async move {
        let reason = launched.death.await.unwrap_or_else(|_| "its thread ended".into());
        // A replica that is already gone needs no word of its engine's end.
        let _ = replica.cast(ReplicaMessage::EngineDied(reason));
    });
    let ready = NodeMessage::ReplicaReady { replica: state.arguments.plan.replica.to_string(), epoch: state.epoch() };
    state.arguments.node.cast(ready).map_err(|error| WorkerError::Actor { actor: "node", reason: error.to_string() })
}
