//! Where a run's model comes from: the local store with whatever it pulls from, or a model that is open already.

use std::collections::HashMap;

use forge_shared::cluster::service::ReplicaPhase;
use forge_shared::cluster::session::Assignment;
use forge_shared::plan::ModelFacts;
use forge_shared::spec::ModelService;
use forge_shared::telemetry::{Metrics, model_label};
use forge_store::{CancelFlag, ContentDigest, Digest, ForgeHome, PullEvent, PullOptions, ResolvedModel, Store};
use parking_lot::Mutex;

use crate::WorkerError;
use crate::actors::LaunchWatch;
use crate::inspect::inspect;
use crate::prepare::PreparedModel;

/// Prefix of a digest that names a hub's commit instead of bytes: what is known of weights that were only looked at.
pub(crate) const SOURCE_DIGEST: &str = "source:";

/// What clients may call a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServedNames {
    /// Shown to clients; the first one leads.
    pub listed: Vec<String>,
    /// Accepted and not shown: paths of this machine.
    pub unlisted: Vec<String>,
}

/// A model that can be loaded.
pub struct ProvidedModel {
    /// Opened and checked.
    pub model: PreparedModel,
    /// Names it answers to.
    pub names: ServedNames,
    /// Keeps its files in the store.
    pub lease: Option<ResolvedModel>,
}

/// Provides models to the launcher.
pub trait ProvideModel: Send + Sync + 'static {
    /// Blocking. Must be of the digest that was planned for, where one is named.
    ///
    /// # Errors
    /// Why the model cannot be had here, or that it is another one.
    fn provide(&self, assignment: &Assignment, watch: &LaunchWatch) -> Result<ProvidedModel, WorkerError>;
}

/// One model that is open already, whatever is asked for: for a node inside `forgectl`.
pub struct OpenModel {
    /// The model.
    pub model: PreparedModel,
    /// As in [`ProvidedModel`].
    pub names: ServedNames,
}

impl ProvideModel for OpenModel {
    fn provide(&self, _assignment: &Assignment, _watch: &LaunchWatch) -> Result<ProvidedModel, WorkerError> {
        Ok(ProvidedModel { model: self.model.clone(), names: self.names.clone(), lease: None })
    }
}

/// One model that is open already for its service as it was wished then; anything else from the store.
pub struct OpenedFirst {
    /// The model.
    pub opened: OpenModel,
    /// Whose it is. How many replicas there are makes no difference.
    pub service: ModelService,
    /// For other services, and for this one once its wish is another.
    pub stored: StoredModels,
}

impl OpenedFirst {
    fn is_opened(&self, service: &ModelService) -> bool {
        let mut service = service.clone();
        service.spec.replicas = self.service.spec.replicas;
        service == self.service
    }

    /// Facts of a service's model, as [`inspect`].
    ///
    /// # Errors
    /// As [`inspect`].
    pub fn inspect(&self, service: &ModelService) -> Result<ModelFacts, String> {
        match self.is_opened(service) {
            true => Ok(self.opened.model.facts.clone()),
            false => inspect(&self.stored, service),
        }
    }
}

impl ProvideModel for OpenedFirst {
    fn provide(&self, assignment: &Assignment, watch: &LaunchWatch) -> Result<ProvidedModel, WorkerError> {
        match self.is_opened(&assignment.service) {
            true => self.opened.provide(assignment, watch),
            false => self.stored.provide(assignment, watch),
        }
    }
}

/// Models by name, from the local store; pulled where they are not there.
pub struct StoredModels {
    home: ForgeHome,
    is_offline: bool,
    /// Digests of local paths, which take a read of every byte.
    whole: Mutex<HashMap<Digest, Digest>>,
    /// Where pulled bytes are counted.
    metrics: Option<Metrics>,
}

impl StoredModels {
    /// Over Forge's data folder. Offline, only what is in the store can be had, whatever the environment says.
    pub fn new(home: ForgeHome, is_offline: bool) -> Self {
        StoredModels { home, is_offline, whole: Mutex::default(), metrics: None }
    }

    /// Counts pulled bytes there.
    #[must_use]
    pub fn counting(self, metrics: Metrics) -> Self {
        StoredModels { metrics: Some(metrics), ..self }
    }

    /// How to pull, as the environment says.
    ///
    /// # Errors
    /// A variable that cannot be read.
    pub fn options(&self, cancel: &CancelFlag) -> Result<PullOptions, WorkerError> {
        let options = PullOptions::from_environment()?;
        Ok(PullOptions { cancel: cancel.clone(), offline: options.offline || self.is_offline, ..options })
    }

    /// The store. Opened anew for each use: other processes change it too.
    ///
    /// # Errors
    /// The store's.
    pub fn store(&self) -> Result<Store, WorkerError> {
        Ok(Store::open(&self.home)?)
    }

    /// Digest of a model's content that is the same on every machine.
    ///
    /// # Errors
    /// A file that cannot be read, or a cancellation.
    pub fn digest(&self, resolved: &ResolvedModel, cancel: &CancelFlag) -> Result<String, WorkerError> {
        let digest = match resolved.digest() {
            ContentDigest::Full(digest) => digest,
            ContentDigest::Sampled(sampled) => {
                let known = self.whole.lock().get(&sampled).copied();
                match known {
                    Some(digest) => digest,
                    None => {
                        let digest = resolved.whole_digest(cancel)?;
                        self.whole.lock().insert(sampled, digest);
                        digest
                    }
                }
            }
        };
        Ok(format!("sha256:{digest}"))
    }

    /// Refuses a model that is not the one that was planned for.
    fn check(&self, expected: &str, resolved: &ResolvedModel, digest: &str) -> Result<(), WorkerError> {
        let found = match expected.strip_prefix(SOURCE_DIGEST) {
            None => digest.to_owned(),
            Some(_) => format!("{SOURCE_DIGEST}{}", resolved.manifest().map_or("a local path", |manifest| &manifest.source)),
        };
        if expected.is_empty() || expected == found {
            return Ok(());
        }
        Err(WorkerError::Digest { model: resolved.name().to_owned(), expected: expected.to_owned(), found })
    }
}

impl ProvideModel for StoredModels {
    fn provide(&self, assignment: &Assignment, watch: &LaunchWatch) -> Result<ProvidedModel, WorkerError> {
        let spec = &assignment.service.spec;
        (watch.progress)(ReplicaPhase::Pulling, 0);
        let options = self.options(&watch.cancel)?;
        let bytes = Mutex::new((HashMap::new(), HashMap::new()));
        let progress = |event: PullEvent| {
            let (files, counted) = &mut *bytes.lock();
            let pulled = pulled_bytes(counted, &event);
            if let Some(metrics) = self.metrics.as_ref().filter(|_| pulled > 0) {
                metrics.pulled_bytes.get_or_create(&model_label(&client_name(&assignment.service))).inc_by(pulled);
            }
            if let Some(percent) = percent(files, &event) {
                (watch.progress)(ReplicaPhase::Pulling, percent);
            }
        };
        let resolved = self.store()?.pull(&spec.model, &options, &progress)?;
        let digest = self.digest(&resolved, &watch.cancel)?;
        self.check(&assignment.weights_digest, &resolved, &digest)?;
        let model = PreparedModel::open(resolved.path(), &digest, spec)?;
        let names = names(&assignment.service, &resolved);
        Ok(ProvidedModel { model, names, lease: Some(resolved) })
    }
}

/// What clients call a service.
fn client_name(service: &ModelService) -> String {
    service.spec.model_name.clone().unwrap_or_else(|| service.metadata.name.clone())
}

/// The service's name for clients first; paths of this machine are taken and not shown.
fn names(service: &ModelService, resolved: &ResolvedModel) -> ServedNames {
    let (name, spec) = (&service.metadata.name, &service.spec);
    let mut names = ServedNames { listed: vec![client_name(service)], unlisted: Vec::new() };
    for name in [name.as_str(), resolved.name(), &spec.model] {
        if names.listed.iter().chain(&names.unlisted).any(|known| known == name) {
            continue;
        }
        let is_local = resolved.manifest().is_none() && name != service.metadata.name;
        let list = if is_local { &mut names.unlisted } else { &mut names.listed };
        list.push(name.to_owned());
    }
    names
}

/// Bytes that came since the last event of a file; what an earlier pull had left behind came then.
fn pulled_bytes(counted: &mut HashMap<String, u64>, event: &PullEvent) -> u64 {
    match event {
        PullEvent::FileStarted { name, resumed_at_bytes, .. } => {
            counted.insert(name.clone(), *resumed_at_bytes);
            0
        }
        PullEvent::FileBytes { name, bytes, .. } => bytes.saturating_sub(counted.insert(name.clone(), *bytes).unwrap_or(0)),
        _ => 0,
    }
}

/// Share of a pull that is done, over the files that have begun.
fn percent(files: &mut HashMap<String, (u64, u64)>, event: &PullEvent) -> Option<u8> {
    match event {
        PullEvent::FileStarted { name, total_bytes: Some(total), resumed_at_bytes } => {
            files.insert(name.clone(), (*resumed_at_bytes, *total));
        }
        PullEvent::FileBytes { name, bytes, total_bytes: Some(total) } => {
            files.insert(name.clone(), (*bytes, *total));
        }
        PullEvent::FileDone { name, bytes, .. } => {
            files.insert(name.clone(), (*bytes, *bytes));
        }
        _ => return None,
    }
    let (done, total) =
        files.values().fold((0_u64, 0_u64), |(done, total), file| (done.saturating_add(file.0), total.saturating_add(file.1)));
    // 100 is for the end: more files may follow.
    u8::try_from((u128::from(done) * 100).checked_div(u128::from(total))?).ok().map(|percent| percent.min(99))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pull_is_told_in_percent_of_what_has_begun() {
        let mut files = HashMap::new();
        let bytes = |name: &str, bytes, total| PullEvent::FileBytes { name: name.into(), bytes, total_bytes: Some(total) };
        assert_eq!(percent(&mut files, &PullEvent::Note { text: "x".into() }), None);
        assert_eq!(percent(&mut files, &bytes("a", 5, 10)), Some(50));
        assert_eq!(percent(&mut files, &bytes("b", 0, 90)), Some(5));
        assert_eq!(percent(&mut files, &bytes("b", 90, 90)), Some(95));
        assert_eq!(percent(&mut files, &bytes("a", 10, 10)), Some(99));
        assert_eq!(percent(&mut HashMap::new(), &bytes("a", 0, 0)), None);
    }

    #[test]
    fn pulled_bytes_are_counted_once() {
        let mut counted = HashMap::new();
        let bytes = |bytes| PullEvent::FileBytes { name: "a".into(), bytes, total_bytes: None };
        let started = PullEvent::FileStarted { name: "a".into(), total_bytes: None, resumed_at_bytes: 100 };
        let came: Vec<u64> = [started, bytes(130), bytes(130), bytes(150)].iter().map(|event| pulled_bytes(&mut counted, event)).collect();
        assert_eq!(came, [0, 30, 0, 20]);
    }
}
