//! `NodeActor`: this node. It feeds the [`Agent`] core with orders, supervision events and time, and carries
//! out its actions.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forge_shared::ids::{Epoch, Incarnation, NodeId};
use forge_shared::link::EngineLink;
use forge_shared::plan::Plan;
use forge_shared::telemetry::{Metrics, model_label};
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use tokio::sync::mpsc;

use crate::WorkerError;
use crate::actors::replica::{Launch, ReplicaActor, ReplicaArguments, ReplicaMessage};
use crate::agent::{Agent, AgentAction, AgentInput, ReplicaKey, RestartLimits};
use crate::link::ReplicaLink;

/// Messages of the node's actor.
pub enum NodeMessage {
    /// A plan for this node; the reply says whether it was taken.
    Assign(Box<Plan>, RpcReplyPort<Result<(), String>>),
    /// A replica can answer.
    ReplicaReady {
        /// Which.
        replica: ReplicaKey,
        /// Its epoch.
        epoch: Epoch,
    },
    /// Stop all replicas, letting each finish within this time.
    Drain(Duration),
    /// Time the core asked for has come.
    Tick,
}

/// What the node tells whoever placed its replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeEvent {
    /// A replica can answer, for the first time or again.
    Ready(ReplicaKey),
    /// A replica died and will be started again.
    Died(ReplicaKey, String),
    /// A replica will not come back under its plan.
    GaveUp(ReplicaKey, String),
    /// All replicas are stopped.
    Drained,
}

/// What the node's actor starts with.
pub struct NodeArguments {
    /// This node.
    pub node: NodeId,
    /// Grows at each start of the process.
    pub incarnation: Incarnation,
    /// When a dying replica is given up.
    pub limits: RestartLimits,
    /// How replicas are started.
    pub launcher: Arc<dyn Launch>,
    /// Where each replica's engine is offered.
    pub links: HashMap<ReplicaKey, Arc<ReplicaLink>>,
    /// Where restarts are counted.
    pub metrics: Metrics,
    /// Receives events; few per replica, read by the process's owner.
    pub events: mpsc::UnboundedSender<NodeEvent>,
}

/// See the module documentation.
pub struct NodeActor;

/// State of the node's actor.
pub struct NodeState {
    agent: Agent,
    started: Instant,
    launcher: Arc<dyn Launch>,
    links: HashMap<ReplicaKey, Arc<ReplicaLink>>,
    metrics: Metrics,
    children: HashMap<ActorId, Child>,
    events: mpsc::UnboundedSender<NodeEvent>,
    drain_timeout: Duration,
}

struct Child {
    replica: ReplicaKey,
    epoch: Epoch,
    actor: ActorRef<ReplicaMessage>,
}

impl NodeState {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn tell(&self, event: NodeEvent) {
        // The owner may have stopped listening during shutdown; there is nobody else to tell.
        let _ = self.events.send(event);
    }
}

impl Actor for NodeActor {
    type Msg = NodeMessage;
    type State = NodeState;
    type Arguments = NodeArguments;

    async fn pre_start(&self, _myself: ActorRef<NodeMessage>, arguments: NodeArguments) -> Result<NodeState, ActorProcessingErr> {
        Ok(NodeState {
            agent: Agent::new(arguments.node, arguments.incarnation, arguments.limits),
            started: Instant::now(),
            launcher: arguments.launcher,
            links: arguments.links,
            metrics: arguments.metrics,
            children: HashMap::new(),
            events: arguments.events,
            drain_timeout: Duration::ZERO,
        })
    }

    async fn handle(&self, myself: ActorRef<NodeMessage>, message: NodeMessage, state: &mut NodeState) -> Result<(), ActorProcessingErr> {
        match message {
            NodeMessage::Assign(plan, reply) => {
                let refused = feed(&myself, state, AgentInput::Assign(*plan)).await?;
                if !reply.is_closed() {
                    reply.send(refused.map_or(Ok(()), Err))?;
                }
            }
            NodeMessage::ReplicaReady { replica, epoch } => {
                feed(&myself, state, AgentInput::Ready { replica: replica.clone(), epoch }).await?;
                state.tell(NodeEvent::Ready(replica));
            }
            NodeMessage::Drain(timeout) => {
                state.drain_timeout = timeout;
                feed(&myself, state, AgentInput::Drain).await?;
            }
            NodeMessage::Tick => {
                feed(&myself, state, AgentInput::Tick).await?;
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<NodeMessage>,
        event: SupervisionEvent,
        state: &mut NodeState,
    ) -> Result<(), ActorProcessingErr> {
        let (cell, failure): (ActorCell, Option<ActorProcessingErr>) = match event {
            SupervisionEvent::ActorTerminated(cell, _, _) => (cell, None),
            SupervisionEvent::ActorFailed(cell, error) => (cell, Some(error)),
            _ => return Ok(()),
        };
        let Some(child) = state.children.remove(&cell.get_id()) else { return Ok(()) };
        let Child { replica, epoch, .. } = child;
        let input = match failure {
            None => AgentInput::Stopped { replica, epoch },
            Some(error) => {
                // A panic carries no WorkerError; it is a death like any other.
                let restartable = error.downcast_ref::<WorkerError>().is_none_or(WorkerError::restartable);
                let reason = error.to_string();
                tracing::error!(%replica, epoch = epoch.0, restartable, reason, "replica died");
                if let Some(link) = state.links.get(&replica) {
                    link.detach("the engine died and is being restarted");
                }
                state.tell(NodeEvent::Died(replica.clone(), reason.clone()));
                AgentInput::Died { replica, epoch, reason, restartable }
            }
        };
        feed(&myself, state, input).await?;
        Ok(())
    }
}

/// Feeds the core and carries out what it says. Returns the reason if the input was refused.
async fn feed(myself: &ActorRef<NodeMessage>, state: &mut NodeState, input: AgentInput) -> Result<Option<String>, ActorProcessingErr> {
    let restarting = matches!(input, AgentInput::Tick);
    let mut refused = None;
    for action in state.agent.handle(state.now_ms(), input) {
        match action {
            AgentAction::Start(plan) => start(myself, state, plan, restarting).await?,
            AgentAction::Stop { replica, epoch } => {
                let timeout = state.drain_timeout;
                let children = state.children.values().filter(|child| child.replica == replica && child.epoch == epoch);
                for child in children {
                    child.actor.cast(ReplicaMessage::Stop(timeout))?;
                }
            }
            AgentAction::GiveUp { replica, reason, .. } => {
                if let Some(link) = state.links.get(&replica) {
                    link.detach(&format!("the replica was given up: {reason}"));
                }
                state.tell(NodeEvent::GaveUp(replica, reason));
            }
            AgentAction::Refused { reason } => refused = Some(reason),
            AgentAction::Drained => state.tell(NodeEvent::Drained),
        }
    }
    if let Some(at_ms) = state.agent.next_tick_ms() {
        let wait = Duration::from_millis(at_ms.saturating_sub(state.now_ms()) + 1);
        myself.send_after(wait, || NodeMessage::Tick);
    }
    Ok(refused)
}

async fn start(myself: &ActorRef<NodeMessage>, state: &mut NodeState, plan: Plan, restarting: bool) -> Result<(), ActorProcessingErr> {
    let replica = plan.replica.to_string();
    let epoch = plan.epoch;
    let Some(link) = state.links.get(&replica).cloned() else {
        return Err(WorkerError::Actor { actor: "replica", reason: format!("no link was made for {replica}") }.into());
    };
    if restarting {
        link.count_restart();
        state.metrics.engine_restarts.get_or_create(&model_label(&link.card().name)).inc();
    }
    let arguments = ReplicaArguments { plan, launcher: state.launcher.clone(), link, node: myself.clone() };
    let (actor, _) = Actor::spawn_linked(None, ReplicaActor, arguments, myself.get_cell()).await?;
    state.children.insert(actor.get_id(), Child { replica, epoch, actor });
    Ok(())
}
