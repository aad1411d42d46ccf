//! `LocalCluster`: a node with one replica inside this process, for `forgectl serve` and `forgectl run`.
//!
//! It is the same node actor, agent and link that a cluster's worker runs; only the plan comes from a function
//! call and the link is a channel.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use forge_shared::ids::{Incarnation, NodeId};
use forge_shared::link::{EngineLink, ModelCard};
use forge_shared::plan::Plan;
use forge_shared::telemetry::Metrics;
use forge_text::{ChatTemplate, Tokenizer};
use ractor::{Actor, ActorCell, ActorRef, rpc::CallResult};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::WorkerError;
use crate::actors::{NodeActor, NodeArguments, NodeEvent, NodeMessage};
use crate::agent::RestartLimits;
use crate::launcher::ModelLauncher;
use crate::link::ReplicaLink;
use crate::prepare::PreparedModel;

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
    /// The coordinator's decision.
    pub plan: Plan,
    /// Names it answers to.
    pub names: ServedNames,
    /// Requests waiting before overload.
    pub max_waiting: usize,
    /// Reuse of equal prompt prefixes.
    pub prefix_cache: bool,
    /// Where everything is counted.
    pub metrics: Metrics,
}

/// What clients may call a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServedNames {
    /// Shown to clients; the first one leads.
    pub listed: Vec<String>,
    /// Accepted and not shown: paths of this machine.
    pub unlisted: Vec<String>,
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
    /// With a `supervisor`, the node's actor is linked to it.
    ///
    /// # Errors
    /// The node did not start or refused the plan.
    pub async fn start(options: LocalOptions, supervisor: Option<ActorCell>) -> Result<Self, WorkerError> {
        let LocalOptions { model, plan, names, max_waiting, prefix_cache, metrics } = options;
        let card = card(&model, &plan, names)?;
        let link = Arc::new(ReplicaLink::new(card.clone()));
        let served = Served {
            link: link.clone(),
            tokenizer: model.text.tokenizer().clone(),
            chat_template: model.text.chat_template().ok().cloned(),
        };
        let (event_sender, events) = mpsc::unbounded_channel();
        let arguments = NodeArguments {
            node: plan.ranks.first().map_or_else(|| NodeId::from("local"), |rank| rank.node.clone()),
            incarnation: Incarnation(now_s()),
            limits: RestartLimits::default(),
            metrics: metrics.clone(),
            launcher: Arc::new(ModelLauncher { model, card, max_waiting, prefix_cache, metrics }),
            links: HashMap::from([(plan.replica.to_string(), link)]),
            events: event_sender,
        };
        let spawned = match supervisor {
            Some(supervisor) => Actor::spawn_linked(None, NodeActor, arguments, supervisor).await,
            None => Actor::spawn(None, NodeActor, arguments).await,
        };
        let actor_error = |reason: String| WorkerError::Actor { actor: "node", reason };
        let (node, joined) = spawned.map_err(|error| actor_error(error.to_string()))?;
        let cluster = LocalCluster { served, node, joined, events };
        let answer = cluster
            .node
            .call(|reply| NodeMessage::Assign(Box::new(plan), reply), Some(ASSIGN_TIMEOUT))
            .await
            .map_err(|error| actor_error(error.to_string()))?;
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
            match self.events.recv().await {
                Some(NodeEvent::Ready(_)) => return Ok(()),
                Some(NodeEvent::Died(replica, reason)) => tracing::warn!(replica, reason, "replica died while starting"),
                Some(NodeEvent::GaveUp(replica, reason)) => return Err(WorkerError::GivenUp { replica, reason }),
                Some(NodeEvent::Drained) | None => {
                    return Err(WorkerError::Actor { actor: "node", reason: "it ended before the replica was ready".into() });
                }
            }
        }
    }

    /// Waits until the replica cannot come back; never returns while it runs or is being restarted.
    pub async fn failed(&mut self) -> WorkerError {
        loop {
            match self.events.recv().await {
                Some(NodeEvent::Ready(replica)) => tracing::info!(replica, "replica is ready again"),
                Some(NodeEvent::Died(replica, reason)) => tracing::warn!(replica, reason, "replica died and will be restarted"),
                Some(NodeEvent::GaveUp(replica, reason)) => return WorkerError::GivenUp { replica, reason },
                Some(NodeEvent::Drained) | None => {
                    return WorkerError::Actor { actor: "node", reason: "it ended".into() };
                }
            }
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

fn card(model: &PreparedModel, plan: &Plan, names: ServedNames) -> Result<ModelCard, WorkerError> {
    let name =
        names.listed.first().cloned().ok_or(WorkerError::Setting { field: "spec.modelName", reason: "give the model a name".into() })?;
    Ok(ModelCard {
        name,
        names: names.listed,
        unlisted_names: names.unlisted,
        max_model_len: plan.max_model_len,
        vocab_size: model.model.architecture().vocab_size,
        numerics_id: String::new(),
        created_s: now_s(),
        default_sampling: model.default_sampling(),
    })
}

fn now_s() -> u64 {
    // A clock before 1970 is a misconfiguration that only makes `created` wrong.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
