//! `apply --dry-run`: what would be placed where, without doing it.
//!
//! Invariant: it proposes nothing. What is not known of a model yet, a worker is asked for, within the caller's time.

use std::time::Duration;

use forge_cluster::api::{ClusterError, PlannedService};
use forge_shared::cluster::service::Facts;
use forge_shared::ids::NodeId;
use forge_shared::plan::ModelFacts;
use forge_shared::spec::ModelService;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::control::plan_service;
use crate::coordinator::Coordinator;
use crate::error::CoordinatorError;
use crate::leading::INSPECT_WITHIN;
use crate::sessions::{Inspection, Purpose};

/// Sessions of workers begin within this time after a leader's election, or there are none.
const WORKERS_COME_WITHIN: Duration = Duration::from_secs(3);
/// Between two rounds of questions.
const ASK_PAUSE: Duration = Duration::from_millis(200);

impl Coordinator {
    /// What would be placed where. Goes to the leader: it alone has sessions with workers.
    pub(crate) async fn plan(&self, service: ModelService, timeout: Duration) -> Result<PlannedService, CoordinatorError> {
        service.check().map_err(|error| CoordinatorError::message(error.field, error.reason))?;
        self.leading()?;
        let until = Instant::now() + timeout;
        self.0.raft.read_index(timeout).await.map_err(|error| self.raft_error(error))?;
        self.0.replicated.read().check_client_names(&service).map_err(CoordinatorError::Command)?;
        let facts = match self.known_facts(&service) {
            Some(facts) => facts,
            None => self.look(&service, until, timeout).await?,
        };
        let state = self.0.replicated.read();
        plan_service(&state, &service, &facts).map_err(|error| match error {
            ClusterError::NotPlaceable(refusal) => CoordinatorError::NotPlaceable(refusal),
            ClusterError::Command(error) => CoordinatorError::Command(error),
            error => CoordinatorError::message("service", error),
        })
    }

    /// What the cluster knows of this very wish, whatever its number of replicas.
    fn known_facts(&self, service: &ModelService) -> Option<ModelFacts> {
        let state = self.0.replicated.read();
        state.services().values().find_map(|record| match &record.facts {
            Facts::Known { facts } => {
                let mut same = record.service.clone();
                same.metadata.name.clone_from(&service.metadata.name);
                same.spec.replicas = service.spec.replicas;
                (same == *service).then(|| (**facts).clone())
            }
            Facts::Unknown { .. } | Facts::Failed { .. } => None,
        })
    }

    /// Asks workers, one after the other, until one has looked.
    async fn look(&self, service: &ModelService, until: Instant, timeout: Duration) -> Result<ModelFacts, CoordinatorError> {
        let begun = Instant::now();
        let model = &service.spec.model;
        // Who was asked last and has not answered, since when.
        let mut reading: Option<(NodeId, Instant)> = None;
        loop {
            let leading = self.leading()?;
            let workers = leading.sessions.workers();
            if workers.is_empty() && begun.elapsed() >= WORKERS_COME_WITHIN {
                return Err(CoordinatorError::Away {
                    reason: format!("no worker is connected that could look at {model}: start one (`forgectl get nodes` lists them)"),
                });
            }
            for node in &workers {
                let (answer, answered) = oneshot::channel::<Inspection>();
                let asked = Instant::now();
                let within = until.saturating_duration_since(asked).min(INSPECT_WITHIN);
                let within_ms = within.as_millis() as u64;
                if !leading.sessions.ask(node, service.clone(), Purpose::DryRun(answer), within_ms, self.now_ms()) {
                    continue;
                }
                match tokio::time::timeout(within, answered).await {
                    Ok(Ok(Ok(facts))) => return Ok(*facts),
                    Ok(Ok(Err(reason))) => return Err(CoordinatorError::message("spec.model", reason)),
                    // The session ended, or the worker looks at as many models as it can: the next worker is asked.
                    Ok(Err(_)) => {}
                    Err(_) => reading = Some((node.clone(), asked)),
                }
            }
            if Instant::now() + ASK_PAUSE >= until {
                let reason = match (reading, workers.is_empty()) {
                    (Some((node, asked)), _) => format!(
                        "worker {node} is still reading the model {model} ({} s): try again, or give it more time with --timeout",
                        asked.elapsed().as_secs()
                    ),
                    (None, true) => format!("no worker is connected that could look at {model}"),
                    (None, false) => format!("all workers are busy with looking at other models than {model}: try again"),
                };
                return Err(CoordinatorError::Unfinished { waited_ms: timeout.as_millis() as u64, reason });
            }
            tokio::time::sleep(ASK_PAUSE).await;
        }
    }
}
