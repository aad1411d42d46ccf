//! A replica of a resolved model inside this process: opened, placed on this machine and started.
//!
//! It only puts the worker's and the coordinator's parts in order. Invariant: while a [`Replica`] lives, the store
//! keeps its model.

use std::pin::Pin;
use std::time::Duration;

use forge_coordinator::Wish;
use forge_gateway::ServedModel;
use forge_model::ModelError;
use forge_shared::ids::{Epoch, NodeId, ReplicaId, ServiceName};
use forge_shared::plan::{Plan, Refusal};
use forge_shared::spec::ModelService;
use forge_shared::telemetry::Metrics;
use forge_store::ResolvedModel;
use forge_worker::WorkerError;
use forge_worker::local::{LocalCluster, LocalOptions, Served, ServedNames};
use forge_worker::machine;
use forge_worker::prepare::PreparedModel;
use ractor::ActorCell;

use crate::failure::{Exit, Failure, Result};

/// What runs, and the facts of it that are worth showing.
pub struct Replica {
    cluster: LocalCluster,
    /// Where it was placed, with how much memory.
    pub plan: Plan,
    /// What kind of model it is.
    pub facts: Facts,
    /// Held, so that the store keeps the files.
    _model: ResolvedModel,
}

/// Facts of a model for banners.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Name of its family.
    pub family: &'static str,
    /// Parameters.
    pub parameters: u64,
    /// Type most of its weights have.
    pub quantization: String,
}

impl Replica {
    /// Opens and places a model and starts its engine, which loads in the background: see [`Replica::ready`].
    /// With a `supervisor`, the node's actor is linked to it.
    ///
    /// # Errors
    /// A model that cannot be used, or that does not fit this machine ([`Exit::NotPlaceable`]).
    pub async fn start(
        service: &ModelService,
        model: ResolvedModel,
        names: ServedNames,
        metrics: Metrics,
        supervisor: Option<ActorCell>,
    ) -> Result<Self> {
        let spec = &service.spec;
        let prepared = prepare(service, &model).await?;
        let summary = prepared.model.summary();
        let facts = Facts {
            family: summary.family,
            parameters: summary.parameters as u64,
            quantization: summary.quantization.main_type().to_owned(),
        };
        let plan = place(service, &prepared)?;
        let options = LocalOptions {
            model: prepared,
            plan: plan.clone(),
            names,
            max_waiting: spec.max_waiting,
            prefix_cache: spec.prefix_cache,
            metrics,
        };
        let cluster = LocalCluster::start(options, supervisor).await.map_err(failed)?;
        Ok(Replica { cluster, plan, facts, _model: model })
    }

    /// What to speak to it with.
    pub fn served(&self) -> Served {
        self.cluster.served()
    }

    /// The same for a gateway.
    pub fn served_model(&self) -> ServedModel {
        let Served { link, tokenizer, chat_template } = self.served();
        ServedModel { link, tokenizer, chat_template }
    }

    /// Waits until it can answer.
    ///
    /// # Errors
    /// It cannot be loaded.
    pub async fn ready(&mut self) -> Result<()> {
        self.cluster.ready().await.map_err(failed)
    }

    /// Waits until it is dead for good; never returns while it runs or is being restarted.
    pub async fn failed(&mut self) -> Failure {
        failed(self.cluster.failed().await)
    }

    /// Stops it, letting running requests finish within `timeout`.
    pub async fn shutdown(self, timeout: Duration) {
        self.cluster.shutdown(timeout).await;
    }
}

/// Whether a service with this model could be served here: its files are read, and it is placed.
///
/// # Errors
/// As [`Replica::start`].
pub async fn check(service: &ModelService, model: &ResolvedModel) -> Result<Plan> {
    place(service, &prepare(service, model).await?)
}

fn place(service: &ModelService, prepared: &PreparedModel) -> Result<Plan> {
    let spec = &service.spec;
    if spec.replicas != 1 {
        return Err(Failure::new(format!("spec.replicas is {}, and this process is one worker", spec.replicas))
            .help("this would fit: --set replicas=1")
            .exit(Exit::NotPlaceable));
    }
    let replica = ReplicaId { service: ServiceName(service.metadata.name.clone()), index: 0 };
    let devices = [machine::cpu_device(NodeId::from("local"))];
    let wish = Wish { replica: &replica, epoch: Epoch::default().next(), spec, facts: &prepared.facts };
    forge_coordinator::plan(&devices, wish).map_err(not_placeable)
}

async fn prepare(service: &ModelService, model: &ResolvedModel) -> Result<PreparedModel> {
    let (path, digest, spec) = (model.path().to_owned(), model.digest().to_string(), service.spec.clone());
    let opened = tokio::task::spawn_blocking(move || PreparedModel::open(&path, &digest, &spec)).await;
    let opened = opened.map_err(|error| Failure::of(&error).while_doing("an internal task died"))?;
    opened.map_err(|error| unusable(error, model))
}

/// Why a resolved model cannot be used, and how to get a whole one where its files are damaged.
pub fn unusable(error: WorkerError, model: &ResolvedModel) -> Failure {
    let damaged = matches!(error, WorkerError::Model(ModelError::Malformed { .. } | ModelError::NonFinite { .. }));
    let failure = failed(error).while_doing(&format!("cannot use the model '{}' at {}", model.name(), model.path().display()));
    match (damaged, model.manifest()) {
        (false, _) => failure,
        (true, Some(_)) => failure.help(format!(
            "if the file is damaged, download it again: `forgectl rm {0}` and `forgectl pull {0}`; `forgectl show {0} --verify` tells",
            model.name()
        )),
        (true, None) => failure.help("if the file is damaged, download it again; compare its size and checksum with its source's"),
    }
}

/// What a worker's error is to the command line.
pub fn failed(error: WorkerError) -> Failure {
    match error {
        WorkerError::Refused(refusal) => not_placeable(refusal),
        error @ WorkerError::Setting { .. } => Failure::of(&error).exit(Exit::Usage),
        error => Failure::of(&error),
    }
}

fn not_placeable(refusal: Refusal) -> Failure {
    let mut failure = Failure::new(format!("{} does not fit this machine", refusal.replica)).exit(Exit::NotPlaceable);
    for failed in &refusal.constraints {
        failure = failure.cause(failed.constraint.clone());
    }
    if refusal.nearest.is_empty() {
        return failure.help("no smaller setting of this model fits; choose a smaller model from `forgectl catalogue`");
    }
    let nearest: Vec<String> = refusal.nearest.iter().map(|(key, value)| format!("--set {key}={value}")).collect();
    failure.help(format!("this would fit: {}", nearest.join(" ")))
}

/// Waits for `work` as long as the replica can still do it.
///
/// # Errors
/// The replica is dead for good.
pub async fn unless_failed<T>(replica: &mut Replica, work: impl Future<Output = T>) -> Result<T> {
    tokio::select! {
        biased;
        done = work => Ok(done),
        failure = replica.failed() => Err(failure),
    }
}

/// Waits for `work`, or for `stop`, which can be waited for again if the work ends first.
///
/// # Errors
/// The work's own, or that it was stopped.
pub async fn unless_stopped<T>(stop: Pin<&mut impl Future<Output = ()>>, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        biased;
        result = work => result,
        () = stop => Err(Failure::new("stopped before the model was ready")),
    }
}

#[cfg(test)]
mod tests {
    use forge_shared::plan::FailedConstraint;

    use super::*;

    #[test]
    fn a_refusal_says_what_would_fit() {
        let refusal = Refusal {
            replica: ReplicaId { service: ServiceName::from("demo"), index: 0 },
            constraints: vec![FailedConstraint { constraint: "9 GiB needed, 1 GiB free".into(), failed_devices: 1, devices: 1 }],
            nearest: vec![("maxModelLen".into(), "512".into())],
        };
        let failure = not_placeable(refusal);
        let text = failure.to_string();
        assert!(text.contains("cause: 9 GiB needed, 1 GiB free\n  help: this would fit: --set maxModelLen=512"), "{text}");
        assert_eq!(failure.code(), std::process::ExitCode::from(3));
    }
}
