//! `ReplicaLink`: the in-process way to a run's engine, stable over the engine's deaths; and `ReplicaBoard`, where the
//! node's runs are found by replica and epoch.
//!
//! Whoever uses a replica holds a link for as long as its plan stands; the replica's actor puts each new engine in and
//! takes a dead one out. Invariant: while there is no engine, a submission is refused as unavailable, never
//! queued here.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use forge_shared::cluster::node::ReplicaLoad;
use forge_shared::cluster::session::Assignment;
use forge_shared::generate::{AdmitError, GenerateRequest};
use forge_shared::ids::Epoch;
use forge_shared::link::{EngineLink, EngineStatus, EventStream, ModelCard, PrefixUpdate};
use forge_text::ModelText;
use futures::future::BoxFuture;
use parking_lot::RwLock;
use tokio::sync::{Notify, mpsc};

use crate::actors::{CountTokens, ListenPrefixes};
use crate::agent::RunId;
use crate::time::now_s;

/// See the module documentation.
pub struct ReplicaLink {
    /// As known before the model is loaded, then the last engine's: a request admitted by an engine that has just
    /// died still needs its numerics id.
    card: RwLock<Arc<ModelCard>>,
    current: RwLock<Current>,
    text: RwLock<Option<Arc<ServedText>>>,
    block_size: usize,
    /// Whether its engine will be here; else ranks without one are.
    leads: bool,
    restarts: AtomicU32,
    /// Counts changes of engine, card and text, so that watchers compare a number.
    version: AtomicU64,
    /// Told of the same, together with its board's other links.
    changed: Arc<Notify>,
}

/// A model's text, and its portable form once somebody wants it.
pub struct ServedText {
    /// Tokenizer and templates.
    pub text: ModelText,
    portable: OnceLock<Result<Arc<PortableText>, String>>,
}

/// A model's text as it goes to another process.
#[derive(Debug)]
pub struct PortableText {
    /// What [`ModelText::from_portable`] takes.
    pub bytes: Bytes,
    /// Hex of SHA-256 over them.
    pub digest: String,
}

impl ServedText {
    /// Its portable form; made at the first call, which takes a while.
    ///
    /// # Errors
    /// It would be too large.
    pub fn portable(&self) -> Result<Arc<PortableText>, String> {
        let make = || {
            let bytes = Bytes::from(self.text.to_portable().map_err(|error| error.to_string())?);
            let digest = forge_store::Digest::of(&bytes).to_string();
            Ok(Arc::new(PortableText { bytes, digest }))
        };
        self.portable.get_or_init(make).clone()
    }
}

/// The engine, or why there is none.
enum Current {
    Running { engine: Arc<dyn EngineLink>, prefixes: ListenPrefixes, tokens: CountTokens },
    Absent { reason: String },
}

impl ReplicaLink {
    /// A link without an engine yet. The card's numerics id is the engine's to know.
    pub fn new(card: ModelCard, block_size: usize) -> Self {
        ReplicaLink {
            card: RwLock::new(Arc::new(card)),
            current: RwLock::new(Current::Absent { reason: "the model is loading".into() }),
            text: RwLock::new(None),
            block_size,
            leads: true,
            restarts: AtomicU32::new(0),
            version: AtomicU64::new(0),
            changed: Arc::default(),
        }
    }

    fn count_change(&self) {
        self.version.fetch_add(1, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Puts a running engine in.
    pub fn attach(&self, engine: Arc<dyn EngineLink>, text: Option<ModelText>, prefixes: ListenPrefixes, tokens: CountTokens) {
        *self.card.write() = engine.card();
        if text.is_some() {
            *self.text.write() = text.map(|text| Arc::new(ServedText { text, portable: OnceLock::new() }));
        }
        *self.current.write() = Current::Running { engine, prefixes, tokens };
        self.count_change();
    }

    /// Takes the engine out.
    pub fn detach(&self, reason: &str) {
        *self.current.write() = Current::Absent { reason: reason.to_owned() };
        self.count_change();
    }

    /// Counts a restart.
    pub fn count_restart(&self) {
        self.restarts.fetch_add(1, Ordering::Relaxed);
    }

    /// Tokenizer and templates, once a model was loaded.
    pub fn text(&self) -> Option<Arc<ServedText>> {
        self.text.read().clone()
    }

    /// Token slots per KV block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Grows whenever an engine comes or goes.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Changes of the running engine's prefix cache; ends with that engine, and is `None` without one.
    pub fn prefixes(&self) -> Option<mpsc::Receiver<PrefixUpdate>> {
        match &*self.current.read() {
            Current::Running { prefixes, .. } => Some(prefixes()),
            Current::Absent { .. } => None,
        }
    }

    /// Tokens generated by the running engine.
    pub fn generated_tokens(&self) -> u64 {
        match &*self.current.read() {
            Current::Running { tokens, .. } => tokens(),
            Current::Absent { .. } => 0,
        }
    }

    /// Whether an engine is there.
    pub fn has_engine(&self) -> bool {
        matches!(&*self.current.read(), Current::Running { .. })
    }

    fn engine(&self) -> Result<Arc<dyn EngineLink>, AdmitError> {
        match &*self.current.read() {
            Current::Running { engine, .. } => Ok(engine.clone()),
            Current::Absent { reason } => Err(AdmitError::Unavailable { reason: reason.clone() }),
        }
    }
}

impl EngineLink for ReplicaLink {
    fn submit(&self, request: GenerateRequest) -> BoxFuture<'_, Result<EventStream, AdmitError>> {
        let engine = self.engine();
        Box::pin(async move { engine?.submit(request).await })
    }

    fn card(&self) -> Arc<ModelCard> {
        self.card.read().clone()
    }

    fn status(&self) -> EngineStatus {
        let mut status = match &*self.current.read() {
            Current::Running { engine, .. } => engine.status(),
            Current::Absent { reason } => EngineStatus { reason: reason.clone(), ..EngineStatus::default() },
        };
        status.restarts = self.restarts.load(Ordering::Relaxed);
        status
    }
}

/// The node's runs by replica and epoch.
#[derive(Default)]
pub struct ReplicaBoard {
    runs: RwLock<BTreeMap<RunId, Arc<ReplicaLink>>>,
    changed: Arc<Notify>,
}

impl ReplicaBoard {
    /// The link of a run.
    pub fn get(&self, run: &RunId) -> Option<Arc<ReplicaLink>> {
        self.runs.read().get(run).cloned()
    }

    /// The newest epoch of a replica that is here.
    pub fn newest_epoch(&self, replica: &str) -> Option<Epoch> {
        self.runs.read().keys().filter(|run| run.replica == replica).map(|run| run.epoch).max()
    }

    /// The link of a run, made where there is none yet.
    /// `leads` says whether its engine is to be on this node.
    pub fn open(&self, run: &RunId, assignment: &Assignment, leads: bool) -> Arc<ReplicaLink> {
        let link = || {
            let name = &assignment.service.metadata.name;
            let model_name = assignment.service.spec.model_name.clone().unwrap_or_else(|| name.clone());
            let card = ModelCard {
                names: vec![model_name.clone()],
                unlisted_names: Vec::new(),
                name: model_name,
                max_model_len: assignment.plan.max_model_len,
                vocab_size: 0,
                numerics_id: String::new(),
                created_s: now_s(),
                default_sampling: Default::default(),
            };
            let link = ReplicaLink::new(card, assignment.plan.block_size);
            Arc::new(ReplicaLink { changed: self.changed.clone(), leads, ..link })
        };
        self.runs.write().entry(run.clone()).or_insert_with(link).clone()
    }

    /// Resolves at the next engine that comes or goes in a link that was opened here.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Offers a link under a run before it is assigned, so that it can be handed out at once.
    pub fn put(&self, run: RunId, link: Arc<ReplicaLink>) {
        self.runs.write().insert(run, link);
    }

    /// Forgets a run.
    pub fn remove(&self, run: &RunId) {
        self.runs.write().remove(run);
    }

    /// What each run is doing.
    pub fn loads(&self) -> Vec<ReplicaLoad> {
        let load = |(run, link): (&RunId, &Arc<ReplicaLink>)| {
            let status = link.status();
            ReplicaLoad {
                replica: run.replica.clone(),
                running: status.running as u64,
                waiting: status.waiting as u64,
                kv_blocks_used: status.kv_blocks_used as u64,
                kv_blocks_total: status.kv_blocks_total as u64,
                generated_tokens: link.generated_tokens(),
            }
        };
        // What a replica does its leading worker says.
        self.runs.read().iter().filter(|(_, link)| link.leads).map(load).collect()
    }
}
