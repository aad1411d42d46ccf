//! `LocalCluster`: a node with one replica inside this process, for `forgectl run`.
//!
//! It is the same node actor, agent, launcher and board that a cluster's worker runs; only the assignment comes from a
//! function call, the model is open already, and the link is a channel.

use std::sync::Arc;
use std::time::Duration;

use forge_shared::cluster::Revision;
use forge_shared::cluster::service::{ReplicaPhase, ReplicaStatus};
use forge_shared::cluster::session::Assignment;
use forge_shared::ids::{Incarnation, NodeId};
use forge_shared::link::EngineLink;
use forge_shared::plan::Plan;
use forge_shared::spec::ModelService;
use forge_shared::telemetry::Metrics;
use forge_text::{ChatTemplate, Tokenizer};
use ractor::{Actor, ActorRef, rpc::CallResult};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::WorkerError;
use crate::actors::{NodeActor, NodeArguments, NodeEvent, NodeMessage};
use crate::agent::{RestartLimits, RunId};
use crate::launcher::{ModelLauncher, card};
use crate::ledger::{Ledger, LedgerDevice};
use crate::link::{ReplicaBoard, ReplicaLink};
use crate::machine;
use crate::models::{OpenModel, ServedNames};
use crate::prepare::PreparedModel;
use crate::time::now_s;

/// An assignment is answered by the core at once; a longer silence is a defect.
const ASSIGN_TIMEOUT: Duration = Duration::from_secs(10);

/// What a gateway or a chat needs to use the replica.
#[derive(Clone)]
pub struct Served {
    /// The way to its engine; stays the same over restarts.
    pub link: Arc<dyn EngineLink>,
    /// Tokenizer.
    pub tokenizer: Tokenizer,
    /// Chat template, if the model has a usable one.
    pub chat_template: Option<ChatTemplate>,
}

/// Everything [`LocalCluster::start`] needs.
pub struct LocalOptions {
    /// The opened model.
    pub model: PreparedModel,
    /// The wish.
    pub service: ModelService,
    /// The coordinator's decision.
    pub plan: Plan,
    /// Names it answers to.
    pub names: ServedNames,
    /// Where everything is counted.
    pub metrics: Metrics,
}

/// A running node with one replica. See the module documentation.
pub struct LocalCluster {
    served: Served,
    node: ActorRef<NodeMessage>,
    joined: JoinHandle<()>,
    events: mpsc::UnboundedReceiver<NodeEvent>,
}

impl LocalCluster {
    /// Starts the node and assigns the plan; the model loads in the background. Wait with [`Self::ready`].
    ///
    /// # Errors
    /// The node did not start or refused the plan.
    pub async fn start(options: LocalOptions) -> Result<Self, WorkerError> {
        let LocalOptions { model, service, plan, names, metrics } = options;
        // Offered before it is assigned, so that a gateway can be built on it while the model loads.
        let link = Arc::new(ReplicaLink::new(card(&model, &plan, names.clone())?, plan.block_size));
        let board = Arc::new(ReplicaBoard::default());
        board.put(RunId::of(&plan), link.clone());
        let served = Served { link, tokenizer: model.text.tokenizer().clone(), chat_template: model.text.chat_template().ok().cloned() };
        let (event_sender, events) = mpsc::unbounded_channel();
        let node = plan.ranks.first().map_or_else(|| NodeId::from("local"), |rank| rank.node.clone());
        // Placement has just looked at the machine; whoever asks for more than is free by hand gets what was asked for.
        let memory_bytes = plan.ranks.iter().map(|rank| rank.memory.total_bytes()).sum::<u64>().max(machine::free_bytes());
        let device = LedgerDevice { index: plan.ranks.first().map_or(0, |rank| rank.device), memory_bytes, cores: Vec::new(), niceness: 0 };
        let launcher = ModelLauncher {
            node: node.clone(),
            fabric: None,
            models: Arc::new(OpenModel { model, names }),
            ledger: Ledger::new(vec![device], Box::new(move || memory_bytes)),
            metrics: metrics.clone(),
        };
        let arguments = NodeArguments {
            node,
            incarnation: Incarnation(now_s()),
            limits: RestartLimits::default(),
            launcher: Arc::new(launcher),
            board,
            metrics,
            events: event_sender,
        };
        let spawned = Actor::spawn(None, NodeActor, arguments).await;
        let actor_error = |reason: String| WorkerError::Actor { actor: "node", reason };
        let (node, joined) = spawned.map_err(|error| actor_error(error.to_string()))?;
        let cluster = LocalCluster { served, node, joined, events };
        let assignment = Assignment { plan, service: Box::new(service), weights_digest: String::new(), drain_ms: None, peers: Vec::new() };
        let assign = |reply| NodeMessage::Assign {
            history: String::new(),
            revision: Revision(1),
            assignments: vec![assignment],
            reply: Some(reply),
        };
        let answer = cluster.node.call(assign, Some(ASSIGN_TIMEOUT)).await.map_err(|error| actor_error(error.to_string()))?;
        match answer {
            CallResult::Success(Ok(())) => Ok(cluster),
            CallResult::Success(Err(reason)) => Err(actor_error(reason)),
            CallResult::Timeout => Err(actor_error("it did not answer an assignment".into())),
            CallResult::SenderError => Err(actor_error("it ended while being assigned a plan".into())),
        }
    }

    /// What to serve it with.
    pub fn served(&self) -> Served {
        self.served.clone()
    }

    /// Waits until the replica can answer.
    ///
    /// # Errors
    /// It was given up: the reason says what is wrong with the model or the machine.
    pub async fn ready(&mut self) -> Result<(), WorkerError> {
        loop {
            let (replica, status) = self.report().await?;
            match status.phase {
                ReplicaPhase::Ready => return Ok(()),
                ReplicaPhase::Failed => return Err(WorkerError::GivenUp { replica, reason: status.reason }),
                ReplicaPhase::Loading if status.restarts > 0 => {
                    tracing::warn!(replica, reason = status.reason, "replica died while starting");
                }
                _ => {}
            }
        }
    }

    /// Waits until the replica cannot come back; never returns while it runs or is being restarted.
    pub async fn failed(&mut self) -> WorkerError {
        loop {
            match self.report().await {
                Ok((replica, status)) => match status.phase {
                    ReplicaPhase::Ready => tracing::info!(replica, "replica is ready again"),
                    ReplicaPhase::Failed => return WorkerError::GivenUp { replica, reason: status.reason },
                    ReplicaPhase::Loading if !status.reason.is_empty() => {
                        tracing::warn!(replica, reason = status.reason, "replica died and will be restarted");
                    }
                    _ => {}
                },
                Err(error) => return error,
            }
        }
    }

    async fn report(&mut self) -> Result<(String, ReplicaStatus), WorkerError> {
        match self.events.recv().await {
            Some(NodeEvent::Report(report)) => Ok((report.replica.to_string(), report.status)),
            Some(NodeEvent::Drained) | None => Err(WorkerError::Actor { actor: "node", reason: "it ended".into() }),
        }
    }

    /// Stops the replica, letting running requests finish within `timeout`.
    pub async fn shutdown(mut self, timeout: Duration) {
        if self.node.cast(NodeMessage::Drain(timeout)).is_ok() {
            let drained = async {
                while let Some(event) = self.events.recv().await {
                    if event == NodeEvent::Drained {
                        break;
                    }
                }
            };
            // The engine keeps its own deadline; the margin covers joining its thread.
            if tokio::time::timeout(timeout + Duration::from_secs(5), drained).await.is_err() {
                tracing::warn!("the replica did not stop in time");
            }
        }
        self.node.stop(None);
        if tokio::time::timeout(Duration::from_secs(5), self.joined).await.is_err() {
            tracing::warn!("the node's actor did not end in time");
        }
    }
}
