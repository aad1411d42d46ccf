//! A worker's node without a process around it, alone and joined to a cluster: what `forge-worker` and `forgectl serve` have
//! in common.
//!
//! What it is not: it opens no port and reads no signal.
//!
//! Invariant: what a node reports goes to the coordinators and to its owner, in order, as long as the owner asks for it.

use std::sync::Arc;
use std::time::Duration;

use forge_net::Fabric;
use forge_shared::cluster::node::{NodeLoad, NodeSpec};
use forge_shared::cluster::session::NodeUp;
use forge_shared::telemetry::Metrics;
use ractor::{Actor, ActorRef};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::WorkerError;
use crate::actors::{NodeActor, NodeArguments, NodeEvent, NodeMessage};
use crate::agent::RestartLimits;
use crate::launcher::ModelLauncher;
use crate::ledger::Ledger;
use crate::link::ReplicaBoard;
use crate::models::ProvideModel;
use crate::session::{ConnectCluster, InspectModel, Session, SessionOptions, SessionState};

/// For the good-bye, and for each of the parts that end after the replicas.
pub(crate) const END_TIMEOUT: Duration = Duration::from_secs(3);

/// A running worker's node: its actor and its replicas, without the ties to the outside.
pub struct WorkerNode {
    /// The node's actor.
    pub actor: ActorRef<NodeMessage>,
    /// Ends with the actor.
    pub joined: JoinHandle<()>,
    /// What it tells.
    pub events: mpsc::UnboundedReceiver<NodeEvent>,
    /// Its replicas.
    pub board: Arc<ReplicaBoard>,
}

impl WorkerNode {
    /// Starts a node that serves these models within this ledger. Without a `fabric` it takes no ranks of replicas that have
    /// others elsewhere.
    ///
    /// # Errors
    /// The actor system does not start it.
    pub async fn start(
        spec: &NodeSpec,
        ledger: Arc<Ledger>,
        models: Arc<dyn ProvideModel>,
        fabric: Option<Arc<Fabric>>,
        metrics: Metrics,
    ) -> Result<Self, WorkerError> {
        let board = Arc::new(ReplicaBoard::default());
        let (event_sender, events) = mpsc::unbounded_channel();
        let launcher = ModelLauncher { node: spec.id.clone(), fabric, models, ledger, metrics: metrics.clone() };
        let arguments = NodeArguments {
            node: spec.id.clone(),
            incarnation: spec.incarnation,
            limits: RestartLimits::default(),
            launcher: Arc::new(launcher),
            board: board.clone(),
            metrics,
            events: event_sender,
        };
        let spawned = Actor::spawn(None, NodeActor, arguments).await;
        let (actor, joined) = spawned.map_err(|error| WorkerError::Actor { actor: "node", reason: error.to_string() })?;
        Ok(WorkerNode { actor, joined, events, board })
    }

    /// What it is doing.
    pub fn load(board: &ReplicaBoard) -> NodeLoad {
        NodeLoad { resident_bytes: forge_cluster::resident_bytes(), replicas: board.loads(), requests_in_progress: 0, serves: None }
    }

    /// Joins a cluster, for as long as this lives.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn join(self, spec: NodeSpec, connect: ConnectCluster, inspect: InspectModel) -> Result<JoinedNode, WorkerError> {
        let board = self.board.clone();
        let load = Arc::new(move || WorkerNode::load(&board));
        let session = Session::start(SessionOptions { spec, connect, node: self.actor.clone(), load, inspect })?;
        Ok(JoinedNode { reports: session.reports(), session, node: self })
    }
}

/// A node of a cluster.
pub struct JoinedNode {
    node: WorkerNode,
    session: Session,
    reports: mpsc::UnboundedSender<NodeUp>,
}

impl JoinedNode {
    /// Its replicas.
    pub fn board(&self) -> &Arc<ReplicaBoard> {
        &self.node.board
    }

    /// Where its tie to the coordinators stands.
    pub fn state(&self) -> watch::Receiver<SessionState> {
        self.session.state()
    }

    /// Waits for what happens next, and tells the coordinators. Must be called again and again: nobody else reports. May be
    /// dropped while it waits.
    ///
    /// # Errors
    /// The cluster refuses this node, or its actor died.
    pub async fn next(&mut self) -> Result<NodeEvent, WorkerError> {
        tokio::select! {
            error = self.session.refused() => Err(error),
            event = self.node.events.recv() => {
                let event = event.ok_or(WorkerError::Actor { actor: "node", reason: "it ended by itself".into() })?;
                self.report(&event);
                Ok(event)
            }
        }
    }

    fn report(&self, event: &NodeEvent) {
        if let NodeEvent::Report(report) = event {
            // A session that has ended tells why by itself.
            let _ = self.reports.send(NodeUp::Replica { report: report.clone() });
        }
    }

    /// Stops the replicas, letting requests under way finish within `timeout`, says good-bye, and ends the actor. Bounded.
    pub async fn end(mut self, timeout: Duration) {
        if self.node.actor.cast(NodeMessage::Drain(timeout)).is_ok() {
            let drained = async {
                while let Some(event) = self.node.events.recv().await {
                    self.report(&event);
                    if event == NodeEvent::Drained {
                        break;
                    }
                }
            };
            // Engines keep their own deadline; the margin covers joining their threads.
            if tokio::time::timeout(timeout + END_TIMEOUT, drained).await.is_err() {
                tracing::warn!("the replicas did not end in time");
            }
        }
        let JoinedNode { node, session, .. } = self;
        session.goodbye(END_TIMEOUT).await;
        node.actor.stop(None);
        if tokio::time::timeout(END_TIMEOUT, node.joined).await.is_err() {
            tracing::warn!("the node's actor did not end in time");
        }
    }
}
