//! `NodeActor`: this node. It feeds the [`Agent`] core with assignments, supervision events and time, and carries
//! out its actions.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forge_shared::cluster::Revision;
use forge_shared::cluster::service::{ReplicaPhase, ReplicaReport};
use forge_shared::cluster::session::Assignment;
use forge_shared::ids::{Incarnation, NodeId};
use forge_shared::link::EngineLink;
use forge_shared::telemetry::{Metrics, PhaseLabel, RunLabel, run_label};
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use tokio::sync::mpsc;

use crate::WorkerError;
use crate::actors::replica::{Launch, ReplicaActor, ReplicaArguments, ReplicaMessage};
use crate::agent::{Agent, AgentAction, AgentInput, Death, RestartLimits, RunId};
use crate::link::ReplicaBoard;

/// Messages of the node's actor.
pub enum NodeMessage {
    /// Everything this node is to run; the reply says what was refused of it.
    Assign {
        /// The raft group that says so.
        history: String,
        /// The state it comes from.
        revision: Revision,
        /// What is not in it ends.
        assignments: Vec<Assignment>,
        /// Answered when the core has taken it.
        reply: Option<RpcReplyPort<Result<(), String>>>,
    },
    /// A run pulls or loads.
    Progress {
        /// Which.
        run: RunId,
        /// What it does.
        phase: ReplicaPhase,
        /// Share done, 0 to 100.
        percent: u8,
    },
    /// A run can answer.
    Ready {
        /// Which.
        run: RunId,
        /// Of its engine.
        numerics_id: String,
    },
    /// A session with the leader began: say again where every run stands.
    Connected,
    /// The cluster has given this node up: stop everything.
    Expired,
    /// Stop all replicas, letting each finish within this time, and take no more.
    Drain(Duration),
    /// Time the core asked for has come.
    Tick,
}

/// What the node tells its owner.
#[derive(Debug, Clone, PartialEq)]
pub enum NodeEvent {
    /// Where a run stands now.
    Report(Box<ReplicaReport>),
    /// All replicas are stopped after `Drain`.
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
    /// Where each run's engine is offered.
    pub board: Arc<ReplicaBoard>,
    /// Where restarts are counted.
    pub metrics: Metrics,
    /// Receives events; few per replica, read by the process's owner.
    pub events: mpsc::UnboundedSender<NodeEvent>,
}

/// What runs are counted by.
const PHASES: [ReplicaPhase; 6] =
    [ReplicaPhase::Placed, ReplicaPhase::Pulling, ReplicaPhase::Loading, ReplicaPhase::Ready, ReplicaPhase::Draining, ReplicaPhase::Failed];

/// See the module documentation.
pub struct NodeActor;

/// State of the node's actor.
pub struct NodeState {
    agent: Agent,
    started: Instant,
    launcher: Arc<dyn Launch>,
    board: Arc<ReplicaBoard>,
    metrics: Metrics,
    children: HashMap<ActorId, Child>,
    events: mpsc::UnboundedSender<NodeEvent>,
}

struct Child {
    run: RunId,
    /// It shares its replica with other workers, which begin anew together under another epoch or not at all.
    is_divided: bool,
    actor: ActorRef<ReplicaMessage>,
}

impl NodeState {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The labels of what a run's engines count.
    fn label(&self, run: &RunId) -> Option<RunLabel> {
        self.board.get(run).map(|link| run_label(&link.card().name, &run.replica, run.epoch))
    }

    /// Counts the runs by where they stand; one that has ended is none any more.
    fn count_phases(&self) {
        for phase in PHASES {
            let count = self.agent.phases().filter(|found| *found == phase).count();
            let label = PhaseLabel { phase: format!("{phase:?}").to_ascii_lowercase() };
            self.metrics.replicas.get_or_create(&label).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
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
            board: arguments.board,
            metrics: arguments.metrics,
            children: HashMap::new(),
            events: arguments.events,
        })
    }

    async fn handle(&self, myself: ActorRef<NodeMessage>, message: NodeMessage, state: &mut NodeState) -> Result<(), ActorProcessingErr> {
        let (input, reply) = match message {
            NodeMessage::Assign { history, revision, assignments, reply } => {
                (AgentInput::Assignments { history, revision, assignments }, reply)
            }
            NodeMessage::Progress { run, phase, percent } => (AgentInput::Progress { run, phase, percent }, None),
            NodeMessage::Ready { run, numerics_id } => (AgentInput::Ready { run, numerics_id }, None),
            NodeMessage::Connected => (AgentInput::Connected, None),
            NodeMessage::Expired => (AgentInput::Expired, None),
            NodeMessage::Drain(timeout) => (AgentInput::Drain { timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX) }, None),
            NodeMessage::Tick => (AgentInput::Tick, None),
        };
        let refused = feed(&myself, state, input).await?;
        if let Some(reply) = reply.filter(|reply| !reply.is_closed()) {
            reply.send(refused.map_or(Ok(()), Err))?;
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
        let Some(Child { run, is_divided, .. }) = state.children.remove(&cell.get_id()) else { return Ok(()) };
        let input = match failure {
            None => AgentInput::Stopped { run },
            Some(error) => AgentInput::Died { death: death(&run, is_divided, &error, &state.board), run },
        };
        feed(&myself, state, input).await?;
        Ok(())
    }
}

fn death(run: &RunId, is_divided: bool, error: &ActorProcessingErr, board: &ReplicaBoard) -> Death {
    // A panic carries no WorkerError; it is a death like any other.
    let known = error.downcast_ref::<WorkerError>();
    let restartable = !is_divided && known.is_none_or(WorkerError::restartable);
    let reason = error.to_string();
    tracing::error!(replica = run.replica, epoch = run.epoch.0, restartable, reason, "replica died");
    if let Some(link) = board.get(run) {
        match restartable {
            true => link.detach("the engine died and is being restarted"),
            false => link.detach(&format!("the replica was given up: {reason}")),
        }
    }
    let found_memory_bytes = known.and_then(WorkerError::found_memory_bytes);
    Death { reason, restartable, found_memory_bytes, fault: known.and_then(WorkerError::fault).cloned() }
}

/// Feeds the core and carries out what it says. Returns the reason if the input was refused.
async fn feed(myself: &ActorRef<NodeMessage>, state: &mut NodeState, input: AgentInput) -> Result<Option<String>, ActorProcessingErr> {
    let mut refused = None;
    for action in state.agent.handle(state.now_ms(), input) {
        match action {
            AgentAction::Start { assignment, is_restart } => start(myself, state, *assignment, is_restart).await?,
            AgentAction::Stop { run, timeout_ms } => {
                for child in state.children.values().filter(|child| child.run == run) {
                    // One that has just ended by itself is reported as a supervision event.
                    let _ = child.actor.cast(ReplicaMessage::Stop(Duration::from_millis(timeout_ms)));
                }
            }
            AgentAction::Forget(run) => {
                let label = state.label(&run);
                state.board.remove(&run);
                if let Some(label) = label {
                    state.metrics.forget_run(&label);
                }
            }
            AgentAction::Report(report) => {
                if report.status.phase == ReplicaPhase::Failed
                    && let Some(link) = state.board.get(&RunId { replica: report.replica.to_string(), epoch: report.epoch })
                {
                    link.detach(&format!("the replica was given up: {}", report.status.reason));
                }
                state.tell(NodeEvent::Report(report));
            }
            AgentAction::Refused { reason } => {
                tracing::warn!(reason, "an assignment was refused");
                refused = Some(reason);
            }
            AgentAction::Drained => state.tell(NodeEvent::Drained),
        }
    }
    state.count_phases();
    if let Some(at_ms) = state.agent.next_tick_ms() {
        let wait = Duration::from_millis(at_ms.saturating_sub(state.now_ms()) + 1);
        myself.send_after(wait, || NodeMessage::Tick);
    }
    Ok(refused)
}

async fn start(
    myself: &ActorRef<NodeMessage>,
    state: &mut NodeState,
    assignment: Assignment,
    is_restart: bool,
) -> Result<(), ActorProcessingErr> {
    let (run, is_divided) = (RunId::of(&assignment.plan), assignment.plan.is_divided());
    let leads = assignment.plan.ranks.first().is_some_and(|first| first.node == *state.agent.node());
    let link = state.board.open(&run, &assignment, leads);
    if is_restart {
        link.count_restart();
        state.metrics.engine_restarts.get_or_create(&run_label(&link.card().name, &run.replica, run.epoch)).inc();
    }
    let arguments = ReplicaArguments { assignment, launcher: state.launcher.clone(), link, node: myself.clone() };
    let (actor, _) = Actor::spawn_linked(None, ReplicaActor, arguments, myself.get_cell()).await?;
    state.children.insert(actor.get_id(), Child { run, is_divided, actor });
    Ok(())
}
