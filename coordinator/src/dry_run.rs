//! `apply --dry-run`: what would be placed where, without doing it.
//!
//! Invariant: it proposes nothing. What is not known of a model yet, a worker is asked for, within the caller's time.

use std::time::Duration;

use forge_cluster::api::{ClusterError, PlannedService};
use forge_shared::cluster::service::Facts;
use forge_shared::plan::ModelFacts;
use forge_shared::spec::ModelService;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::control::plan_service;
use crate::coordinator::Coordinator;
use crate::error::CoordinatorError;
use crate::sessions::{Inspection, Purpose};

impl Coordinator {
    /// What would be placed where. Goes to the leader: it alone has sessions with workers.
    pub(crate) async fn plan(&self, service: ModelService, timeout: Duration) -> Result<PlannedService, CoordinatorError> {
        service.check().map_err(|error| CoordinatorError::message("service", error))?;
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
            Facts::Unknown | Facts::Failed { .. } => None,
        })
    }

    /// Asks workers, one after the other, until one has looked.
    async fn look(&self, service: &ModelService, until: Instant, timeout: Duration) -> Result<ModelFacts, CoordinatorError> {
        let late = |reason: &str| CoordinatorError::Late { waited_ms: timeout.as_millis() as u64, reason: reason.into() };
        loop {
            let leading = self.leading()?;
            let workers = leading.sessions.workers();
            for node in &workers {
                let (answer, answered) = oneshot::channel::<Inspection>();
                let within = until.saturating_duration_since(Instant::now());
                if !leading.sessions.ask(node, service.clone(), Purpose::DryRun(answer), within, Instant::now()) {
                    continue;
                }
                match tokio::time::timeout_at(until, answered).await {
                    Ok(Ok(Ok(facts))) => return Ok(*facts),
                    Ok(Ok(Err(reason))) => return Err(CoordinatorError::message("spec.model", reason)),
                    // The session ended: the next worker is asked.
                    Ok(Err(_)) => {}
                    Err(_) => return Err(late("a worker to look at the model")),
                }
            }
            if Instant::now() + Duration::from_millis(200) >= until {
                return Err(late("a worker that can look at the model: is one connected? (`forgectl get nodes`)"));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}
