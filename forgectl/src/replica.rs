//! A replica of a resolved model inside this process, without a cluster: opened, placed on this machine and started.
//!
//! It only puts the worker's and the coordinator's parts in order. `forgectl serve` opens and checks its model here too, and
//! has it placed by the cluster of [`crate::embedded`]. Invariant: while a [`Replica`] lives, the store
//! keeps its model.

use std::pin::Pin;
use std::time::Duration;

use forge_coordinator::placement::{self, Cluster, Wish, plan_alone};
use forge_model::{LoadProgress, ModelError};
use forge_shared::cluster::node::DeviceInfo;
use forge_shared::ids::{Epoch, NodeId, ServiceName};
use forge_shared::plan::{DeviceView, Plan, Refusal};
use forge_shared::spec::{ByteSize, ModelService};
use forge_shared::telemetry::Metrics;
use forge_store::ResolvedModel;
use forge_worker::WorkerError;
use forge_worker::local::{LocalCluster, LocalOptions, Served};
use forge_worker::machine;
use forge_worker::models::ServedNames;
use forge_worker::prepare::PreparedModel;

use crate::failure::{Exit, Failure, Result};
use crate::loading::watched;
use crate::spec_flags::{assignment, name_of};
use crate::support;

/// What runs.
pub struct Replica {
    cluster: LocalCluster,
    progress: LoadProgress,
    /// Held, so that the store keeps the files.
    _model: ResolvedModel,
}

impl Replica {
    /// Opens and places a model and starts its engine, which loads in the background: see [`Replica::ready`].
    ///
    /// # Errors
    /// A model that cannot be used, or that does not fit this machine ([`Exit::NotPlaceable`]).
    pub async fn start(service: &ModelService, model: ResolvedModel, names: ServedNames, metrics: Metrics) -> Result<Self> {
        let prepared = prepare(service, &model).await?;
        let plan = place_one(service, &prepared)?;
        let progress = prepared.progress.clone();
        let options = LocalOptions { model: prepared, service: service.clone(), plan, names, metrics };
        let cluster = LocalCluster::start(options).await.map_err(failed)?;
        Ok(Replica { cluster, progress, _model: model })
    }

    /// What to speak to it with.
    pub fn served(&self) -> Served {
        self.cluster.served()
    }

    /// Waits until it can answer, and shows how far it is.
    ///
    /// # Errors
    /// It cannot be loaded.
    pub async fn ready(&mut self) -> Result<()> {
        let name = self.cluster.served().link.card().name.clone();
        let Replica { cluster, progress, .. } = self;
        watched(&name, || progress.bytes(), cluster.ready()).await.map_err(failed)
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

/// Whether a service with this model could be served on a device: all of its replicas are placed. The cluster does the same
/// again with what it knows then.
///
/// # Errors
/// It does not fit ([`Exit::NotPlaceable`]), with what would.
pub fn check(service: &ModelService, prepared: &PreparedModel, device: &DeviceInfo) -> Result<()> {
    let view = DeviceView {
        node: NodeId::from("local"),
        device: device.index,
        free_bytes: ByteSize(device.memory_bytes),
        threads: device.cores as usize,
    };
    let (spec, name) = (&service.spec, ServiceName(service.metadata.name.clone()));
    let indices: Vec<u32> = (0..spec.replicas).collect();
    let wish = Wish {
        service: &name,
        spec,
        facts: &prepared.facts,
        indices: &indices,
        last_epoch: Epoch(0),
        standing: &[],
        avoided: &[],
        on_one_node: true,
    };
    placement::plan(&mut Cluster::of_devices(&[view]), &wish).refusal.map_or(Ok(()), |refusal| Err(not_placeable(refusal)))
}

fn place_one(service: &ModelService, prepared: &PreparedModel) -> Result<Plan> {
    let spec = &service.spec;
    if spec.replicas != 1 {
        return Err(Failure::new(format!("spec.replicas is {}, and a chat has one", spec.replicas))
            .help(format!("this would fit: {}", assignment("replicas", "1")))
            .exit(Exit::NotPlaceable));
    }
    let devices = [machine::cpu_device(NodeId::from("local"))];
    plan_alone(&devices, &ServiceName(service.metadata.name.clone()), spec, &prepared.facts).map_err(not_placeable)
}

/// Opens a resolved model under a service's settings.
///
/// # Errors
/// Why it cannot be used, and how to get a whole one where its files are damaged.
pub async fn prepare(service: &ModelService, model: &ResolvedModel) -> Result<PreparedModel> {
    let (path, digest, spec) = (model.path().to_owned(), model.digest().to_string(), service.spec.clone());
    let opened = tokio::task::spawn_blocking(move || PreparedModel::open(&path, &digest, &spec)).await;
    let opened = opened.map_err(|error| Failure::of(&error).while_doing("an internal task died"))?;
    let prepared = opened.map_err(|error| unusable(error, model))?;
    support::tell_override(&prepared.model);
    Ok(prepared)
}

/// Why a resolved model cannot be used, and how to get a whole one where its files are damaged.
pub fn unusable(error: WorkerError, model: &ResolvedModel) -> Failure {
    if matches!(error, WorkerError::Setting { .. } | WorkerError::Family { .. }) {
        return failed(error);
    }
    let damaged = matches!(error, WorkerError::Model(ModelError::Malformed { .. } | ModelError::NonFinite { .. }));
    let failure = failed(error);
    let action = cannot_use(model.name(), &model.path().display().to_string(), |text| failure.says(text));
    let failure = failure.while_doing(&action);
    match (damaged, model.manifest()) {
        (false, _) => failure,
        (true, Some(_)) => failure.help(format!(
            "if the file is damaged, download it again: `forgectl rm {0}` and `forgectl pull {0}`; `forgectl show {0} --verify` tells",
            model.name()
        )),
        (true, None) => failure.help("if the file is damaged, download it again; compare its size and checksum with its source's"),
    }
}

/// What cannot be done with a model, with its name and path, each once: a local model's name is its path, and causes
/// may name the path already.
fn cannot_use(name: &str, path: &str, caused_by: impl Fn(&str) -> bool) -> String {
    let name = if name == path { String::new() } else { format!(" '{name}'") };
    let path = if caused_by(path) { String::new() } else { format!(" at {path}") };
    format!("cannot use the model{name}{path}")
}

/// What a worker's error is to the command line.
pub fn failed(error: WorkerError) -> Failure {
    match error {
        WorkerError::Refused(refusal) => not_placeable(refusal),
        WorkerError::Setting { field, reason } => Failure::usage(format!("{}: {reason}", name_of(field))),
        WorkerError::Family { ref given, ref remedy, .. } => {
            Failure::of(&error).while_doing(&format!("{}: {given}", name_of("arch"))).help(remedy.clone()).exit(Exit::Usage)
        }
        error => Failure::of(&error),
    }
}

/// A wish that fits nowhere, or a setting that the model cannot have.
pub fn not_placeable(refusal: Refusal) -> Failure {
    let failure = match &refusal.wrong_setting {
        Some(key) => Failure::usage(format!("{}: this model cannot have it", name_of(key))),
        None => Failure::new(format!("{} does not fit this machine", refusal.replica)).exit(Exit::NotPlaceable),
    };
    let failure = refusal.constraints.iter().fold(failure, |failure, failed| failure.cause(failed.constraint.clone()));
    if refusal.nearest.is_empty() {
        return failure.help("no smaller setting of this model fits; choose a smaller model from `forgectl catalogue`");
    }
    let nearest: Vec<String> = refusal.nearest.iter().map(|(key, value)| assignment(key, value)).collect();
    let extended = match refusal.wrong_setting.as_deref() {
        Some("maxModelLen") => "; --rope-scaling (type=yarn,factor=2) extends the context of models with rotary positions",
        _ => "",
    };
    failure.help(format!("this would fit: {}{extended}", nearest.join(" ")))
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
    use forge_shared::ids::ReplicaId;
    use forge_shared::plan::FailedConstraint;

    use super::*;

    #[test]
    fn a_model_and_its_path_are_named_once() {
        assert_eq!(cannot_use("a", "/m/a.gguf", |_| false), "cannot use the model 'a' at /m/a.gguf");
        assert_eq!(cannot_use("a", "/m/a.gguf", |_| true), "cannot use the model 'a'");
        assert_eq!(cannot_use("/m/a", "/m/a", |_| false), "cannot use the model at /m/a");
        assert_eq!(cannot_use("/m/a", "/m/a", |_| true), "cannot use the model");
    }

    #[test]
    fn a_refusal_says_what_would_fit() {
        let refusal = Refusal {
            replica: ReplicaId { service: ServiceName::from("demo"), index: 0 },
            wrong_setting: None,
            constraints: vec![FailedConstraint { constraint: "9 GiB needed, 1 GiB free".into(), failed_devices: 1, devices: 1 }],
            nearest: vec![("maxModelLen".into(), "512".into()), ("layout.tensor".into(), "1".into())],
        };
        let failure = not_placeable(refusal);
        let text = failure.to_string();
        let expected = "cause: 9 GiB needed, 1 GiB free\n  help: this would fit: --max-model-len 512 --set layout.tensor=1";
        assert!(text.ends_with(expected), "{text}");
        assert_eq!(failure.code(), std::process::ExitCode::from(3));
    }
}
