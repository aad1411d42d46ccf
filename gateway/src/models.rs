//! The models served, and their replicas, which come and go.
//!
//! A request holds its [`Model`] to its end; replicas that are planned anew meanwhile appear in that same model, so that
//! the request can go on there. Invariant: whatever is published is served; two services that claim one name cost one of
//! them that name ([`ModelTable`]).

use std::cmp::Reverse;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use forge_shared::generate::GenerateRequest;
use forge_shared::link::{EngineLink, ModelCard};
use forge_shared::telemetry::{ModelLabel, model_label};
use forge_text::{ChatTemplate, Tokenizer};
use parking_lot::{Mutex, RwLock};
use sha2::{Digest, Sha256};

use crate::breaker::Breaker;
use crate::error::ApiError;
use crate::gateway::{ReplicaPrefixes, ServedModel, ServedReplica};
use crate::model_table::{ModelTable, NameClash};
use crate::prefix_index::PromptBlocks;
use crate::router::{ReplicaLoad, pick};

/// A model and its replicas.
pub struct Model {
    pub(crate) card: Arc<ModelCard>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) chat_template: Option<ChatTemplate>,
    pub(crate) label: ModelLabel,
    service: String,
    /// Names what the text parts and the card were made from.
    version: String,
    replicas: RwLock<Arc<[Arc<Replica>]>>,
    /// Those of every version of its service, itself included: what was accepted may go on there.
    kin: RwLock<Arc<[Arc<Replica>]>>,
}

/// One replica, how many requests this gateway has there, and how it did of late.
pub struct Replica {
    link: Arc<dyn EngineLink>,
    key: String,
    identity: u64,
    in_flight: Arc<AtomicUsize>,
    breaker: Mutex<Breaker>,
    prefixes: Option<ReplicaPrefixes>,
}

/// Counts a request at a replica until dropped.
pub(crate) struct ReplicaGuard(Arc<AtomicUsize>);

impl Drop for ReplicaGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An attempt at a replica. A client that hangs up drops it in the middle, which must not count as an open probe for ever.
pub(crate) struct Attempt {
    replica: Arc<Replica>,
    is_probe: bool,
}

impl Attempt {
    /// The replica answered.
    pub(crate) fn succeeded(mut self) {
        self.is_probe = false;
        self.replica.breaker.lock().succeeded();
    }

    /// The replica could not be reached.
    pub(crate) fn failed(mut self, now: Duration) {
        self.is_probe = false;
        self.replica.breaker.lock().failed(now);
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.is_probe {
            self.replica.breaker.lock().abandoned();
        }
    }
}

/// What a request asks of a replica beside being able to answer.
pub(crate) struct Wanted<'a> {
    pub(crate) request: &'a GenerateRequest,
    /// Context that it needs, in tokens of prompt and answer.
    pub(crate) context_tokens: usize,
    /// Requests of equal affinity prefer the same replica.
    pub(crate) affinity: u64,
    /// Those are left out.
    pub(crate) tried: &'a [Arc<Replica>],
    /// Only replicas of these numerics.
    pub(crate) numerics_id: Option<&'a str>,
    pub(crate) now: Duration,
}

impl Wanted<'_> {
    /// Whether a replica can answer, as far as it is asked.
    fn fits(&self, replica: &Arc<Replica>) -> bool {
        let card = replica.link.card();
        replica.link.status().ready
            && self.numerics_id.is_none_or(|id| card.numerics_id == id)
            && self.context_tokens <= card.max_model_len
            && !self.tried.iter().any(|tried| Arc::ptr_eq(tried, replica))
    }
}

impl Replica {
    fn new(served: &ServedReplica) -> Self {
        let mut hasher = DefaultHasher::new();
        served.key.hash(&mut hasher);
        Replica {
            link: served.model.link.clone(),
            key: served.key.clone(),
            identity: hasher.finish(),
            in_flight: Arc::default(),
            breaker: Mutex::default(),
            prefixes: served.prefixes.clone(),
        }
    }

    pub(crate) fn occupy(&self) -> ReplicaGuard {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        ReplicaGuard(self.in_flight.clone())
    }

    /// Its circuit breaker.
    pub(crate) fn breaker(&self) -> parking_lot::MutexGuard<'_, Breaker> {
        self.breaker.lock()
    }

    /// An attempt begins, which its breaker is told of: by [`Attempt::succeeded`], [`Attempt::failed`], or when dropped.
    pub(crate) fn attempt(self: &Arc<Self>) -> Attempt {
        let is_probe = self.breaker.lock().begin();
        Attempt { replica: self.clone(), is_probe }
    }

    /// The way to its engine.
    pub fn link(&self) -> &Arc<dyn EngineLink> {
        &self.link
    }

    /// Its name in the cluster.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Its numerics id in the form responses carry.
    pub(crate) fn fingerprint(&self) -> String {
        fingerprint(&self.link.card().numerics_id)
    }
}

impl Model {
    /// The service it belongs to.
    pub(crate) fn service(&self) -> &str {
        &self.service
    }

    /// The replicas of this moment.
    pub(crate) fn replicas(&self) -> Arc<[Arc<Replica>]> {
        self.replicas.read().clone()
    }

    /// Numerics of a replica that can answer, of one that its breaker does not hold back if there is any.
    pub fn numerics_id(&self, now: Duration) -> Option<String> {
        let replicas = self.replicas();
        let ready = || replicas.iter().filter(|replica| replica.link.status().ready);
        let chosen = ready().find(|replica| replica.breaker().allows(now)).or_else(|| ready().next());
        chosen.map(|replica| replica.link.card().numerics_id.clone())
    }

    /// The replica for a request.
    pub(crate) fn pick(&self, wanted: &Wanted<'_>) -> Option<Arc<Replica>> {
        pick_among(&self.replicas(), wanted)
    }

    /// The replica for a request that goes on after its engine's death: of any version of the service, since the prompt
    /// is tokens already, and the numerics say which tokens follow.
    pub(crate) fn pick_successor(&self, wanted: &Wanted<'_>) -> Option<Arc<Replica>> {
        pick_among(&self.kin.read().clone(), wanted)
    }

    /// The longest context in tokens among the replicas a request could go on at; `None` while none is ready.
    pub(crate) fn longest_successor(&self, numerics_id: &str) -> Option<usize> {
        let kin = self.kin.read().clone();
        let ready = kin.iter().filter(|replica| replica.link.status().ready).map(|replica| replica.link.card());
        ready.filter(|card| card.numerics_id == numerics_id).map(|card| card.max_model_len).max()
    }

    /// Whether a replica that a request could go to is held back only until an attempt at it is concluded.
    pub(crate) fn is_probing(&self, wanted: &Wanted<'_>) -> bool {
        self.replicas().iter().any(|replica| wanted.fits(replica) && replica.breaker().is_probing())
    }

    /// Whether a replica that a request could go to is left alone because it could not be reached of late.
    pub(crate) fn is_held_back(&self, wanted: &Wanted<'_>) -> bool {
        self.replicas().iter().any(|replica| wanted.fits(replica) && replica.breaker().is_open(wanted.now))
    }

    /// Why no replica can answer, if none can.
    pub fn unready_reason(&self) -> Option<String> {
        let mut reason = String::from("no replica is placed");
        for replica in self.replicas().iter() {
            let status = replica.link.status();
            if status.ready {
                return None;
            }
            reason = if status.reason.is_empty() { "not ready".into() } else { status.reason };
        }
        Some(reason)
    }

    /// Takes the replicas of now; those that stay keep their counts and breakers.
    fn set_replicas(&self, served: &[&ServedReplica]) {
        let old = self.replicas();
        let keep = |served: &&ServedReplica| {
            let same = old.iter().find(|replica| replica.key == served.key && Arc::ptr_eq(&replica.link, &served.model.link));
            same.cloned().unwrap_or_else(|| Arc::new(Replica::new(served)))
        };
        *self.replicas.write() = served.iter().map(keep).collect();
    }
}

fn pick_among(replicas: &[Arc<Replica>], wanted: &Wanted<'_>) -> Option<Arc<Replica>> {
    let mut prompts = HashMap::new();
    let loads: Vec<ReplicaLoad> = replicas
        .iter()
        .map(|replica| {
            let status = replica.link.status();
            let card = replica.link.card();
            let eligible = wanted.fits(replica) && replica.breaker().allows(wanted.now);
            let load = replica.in_flight.load(Ordering::Relaxed).max(status.running + status.waiting);
            let cached_blocks = match &replica.prefixes {
                // With one replica there is nothing to choose.
                Some(prefixes) if eligible && replicas.len() > 1 => prefixes.matched(&mut prompts, wanted.request, &card.numerics_id),
                _ => 0,
            };
            ReplicaLoad { identity: replica.identity, eligible, load, cached_blocks }
        })
        .collect();
    pick(&loads, wanted.affinity).map(|index| replicas[index].clone())
}

impl ReplicaPrefixes {
    /// Blocks of a request's prompt in this replica's cache. Hashes are shared among replicas of the same numerics.
    fn matched(&self, prompts: &mut HashMap<(String, usize), PromptBlocks>, request: &GenerateRequest, numerics_id: &str) -> usize {
        let block_size = self.block_size.load(Ordering::Relaxed);
        if block_size == 0 {
            return 0;
        }
        let key = (numerics_id.to_owned(), block_size);
        let prompt = prompts.entry(key).or_insert_with(|| PromptBlocks::of(request, numerics_id, block_size));
        self.index.lock().matched(prompt)
    }
}

/// `fp_` and 12 digits of a hash: short, and equal exactly where the numerics id is.
pub(crate) fn fingerprint(numerics_id: &str) -> String {
    let digest = hex::encode(Sha256::digest(numerics_id));
    format!("fp_{}", &digest[..12])
}

/// All models served, as of now.
#[derive(Default)]
pub struct Models {
    table: RwLock<Arc<ModelTable>>,
    /// Models that are no longer served and still have requests, which wait for a replica.
    retired: Mutex<Vec<Weak<Model>>>,
}

impl Models {
    /// The models of now.
    pub(crate) fn table(&self) -> Arc<ModelTable> {
        self.table.read().clone()
    }

    /// The model of a request; without a name, the first one.
    ///
    /// # Errors
    /// [`ApiError::UnknownModel`]; [`ApiError::Unavailable`] where it may still come.
    pub fn find(&self, name: Option<&str>) -> Result<Arc<Model>, ApiError> {
        self.table().find(name).cloned()
    }

    /// Replaces what is served. Models that stay are the same objects, so that their requests see new replicas. A model
    /// of one of `services`, the oldest first, that has no replica at the moment stays listed and answers that it is not
    /// ready; any other that goes loses its replicas. Gives the names that more than one service claims.
    pub fn publish(&self, served: &[ServedReplica], services: &[String]) -> Vec<NameClash> {
        let old = self.table();
        let mut retired = self.retired.lock();
        let mut groups: Vec<(Arc<Model>, Vec<&ServedReplica>)> = Vec::new();
        let old_models = || old.by_service().flatten();
        for replica in served {
            let card = replica.model.link.card();
            let same =
                |model: &Arc<Model>| model.card.name == card.name && model.service == replica.service && model.version == replica.version;
            if let Some((_, replicas)) = groups.iter_mut().find(|(model, _)| same(model)) {
                replicas.push(replica);
                continue;
            }
            let known = old_models().cloned().chain(retired.iter().filter_map(Weak::upgrade)).find(|model| same(model));
            groups.push((known.unwrap_or_else(|| Arc::new(new_model(replica, card))), vec![replica]));
        }
        for model in old_models() {
            let has_successor = groups.iter().any(|(other, _)| other.service == model.service);
            if services.contains(&model.service) && !has_successor {
                groups.push((model.clone(), Vec::new()));
            }
        }
        // By age, and within a service, where a changed wish is rolled out, what most replicas carry out, then the newest.
        let place = |service: &String| services.iter().position(|other| other == service).unwrap_or(usize::MAX);
        groups.sort_by_cached_key(|(model, replicas)| {
            let newest = replicas.iter().map(|replica| replica.epoch).max();
            (place(&model.service), model.service.clone(), Reverse((replicas.len(), newest)))
        });
        let (mut table, clashes) = ModelTable::new(groups.iter().map(|(model, _)| model.clone()).collect());
        table.await_services(services);
        for (model, replicas) in &groups {
            model.set_replicas(replicas);
        }
        let kin = |service: &str| -> Arc<[Arc<Replica>]> {
            let of_service = groups.iter().filter(|(model, _)| model.service == service);
            of_service.flat_map(|(model, _)| model.replicas().to_vec()).collect()
        };
        for (model, _) in &groups {
            *model.kin.write() = kin(&model.service);
        }
        retired.retain(|model| model.upgrade().is_some_and(|model| !groups.iter().any(|(other, _)| Arc::ptr_eq(other, &model))));
        for gone in old_models().filter(|old| !groups.iter().any(|(model, _)| Arc::ptr_eq(model, old))) {
            gone.set_replicas(&[]);
            retired.push(Arc::downgrade(gone));
        }
        for model in retired.iter().filter_map(Weak::upgrade) {
            *model.kin.write() = kin(&model.service);
        }
        *self.table.write() = Arc::new(table);
        clashes
    }
}

fn new_model(replica: &ServedReplica, card: Arc<ModelCard>) -> Model {
    let ServedModel { tokenizer, chat_template, .. } = &replica.model;
    Model {
        label: model_label(&card.name),
        card,
        tokenizer: tokenizer.clone(),
        chat_template: chat_template.clone(),
        service: replica.service.clone(),
        version: replica.version.clone(),
        replicas: RwLock::new(Arc::new([])),
        kin: RwLock::new(Arc::new([])),
    }
}
