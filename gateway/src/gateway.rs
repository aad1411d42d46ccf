//! [`Gateway`]: what `forgectl serve` and a gateway process put together and run.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use forge_shared::ids::Epoch;
use forge_shared::link::EngineLink;
use forge_shared::telemetry::Metrics;
use forge_text::{ChatTemplate, Tokenizer};
use parking_lot::{Mutex, RwLock};
use tokio::sync::Semaphore;

use crate::clock::{Clock, SystemClock};
use crate::cluster::{ClusterMember, MemberParts, SharedRecords};
use crate::config::GatewayConfig;
use crate::error::GatewayError;
use crate::health::LastProbe;
use crate::idempotency::IdempotencyRecords;
use crate::keys::KeyRing;
use crate::lifecycle::Lifecycle;
use crate::limits::RateLimits;
use crate::model_table::NameClash;
use crate::models::Models;
use crate::prefix_index::PrefixIndex;
use crate::retry_budget::RetryBudget;
use crate::server::{self, Listeners};

/// One replica of a model, with what the gateway needs to speak for it. Several with the same
/// [`forge_shared::link::ModelCard::name`] are replicas of one model.
#[derive(Clone)]
pub struct ServedModel {
    /// The way to its engine.
    pub link: Arc<dyn EngineLink>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template; without one, chat is refused and completions work.
    pub chat_template: Option<ChatTemplate>,
}

/// A replica in a cluster: [`ServedModel`] with what tells it from others, now and later.
#[derive(Clone)]
pub struct ServedReplica {
    /// Way, tokenizer and template.
    pub model: ServedModel,
    /// The service it is a copy of.
    pub service: String,
    /// Its name. With the same key and link it is the same replica still.
    pub key: String,
    /// Of the model's text parts and card; replicas of another version are another model, though of the same name.
    pub version: String,
    /// Of its plan; of two versions of equal weight, the newer answers.
    pub epoch: Epoch,
    /// What its engine has cached, where it tells.
    pub prefixes: Option<ReplicaPrefixes>,
}

/// What a replica's engine has cached, kept up to date by whoever reads its events.
#[derive(Clone, Default)]
pub struct ReplicaPrefixes {
    /// Blocks that can be reused.
    pub index: Arc<Mutex<PrefixIndex>>,
    /// Token slots of a block; 0 until known.
    pub block_size: Arc<AtomicUsize>,
}

/// The gateway. Clones share everything.
///
/// ```no_run
/// # async fn run(model: forge_gateway::ServedModel) -> Result<(), forge_gateway::GatewayError> {
/// use forge_gateway::{Gateway, GatewayConfig, KeyRing, Listeners};
/// let config = GatewayConfig::default();
/// let listeners = Listeners::bind(&config).await?;
/// let gateway = Gateway::new(config, vec![model], forge_shared::telemetry::Metrics::new(), KeyRing::none())?;
/// gateway.serve(listeners, async { tokio::signal::ctrl_c().await.unwrap_or(()) }).await
/// # }
/// ```
#[derive(Clone)]
pub struct Gateway {
    state: Arc<GatewayState>,
}

/// Everything a request handler shares with the others.
pub(crate) struct GatewayState {
    pub(crate) config: GatewayConfig,
    pub(crate) models: Models,
    pub(crate) retries: Arc<Mutex<RetryBudget>>,
    pub(crate) metrics: Metrics,
    pub(crate) keys: KeyRing,
    pub(crate) rates: Mutex<RateLimits>,
    pub(crate) idempotency: Mutex<IdempotencyRecords>,
    /// In a cluster, what other gateways know of idempotency keys.
    pub(crate) shared_records: RwLock<Option<Arc<SharedRecords>>>,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) clock: Arc<dyn Clock>,
    /// One permit per KiB of request body held.
    pub(crate) body_kib: Arc<Semaphore>,
    /// One permit per request being answered.
    pub(crate) requests: Arc<Semaphore>,
    /// One permit per thread that renders and tokenizes long prompts.
    pub(crate) preparing: Arc<Semaphore>,
    pub(crate) last_probe: LastProbe,
    started: Instant,
}

impl GatewayState {
    /// Time since the gateway began: what the cores take as time.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Gateway {
    /// Puts a gateway together. Nothing is bound or started yet.
    ///
    /// # Errors
    /// A setting out of range, no model, two models of one name, or an address beyond loopback without keys.
    pub fn new(config: GatewayConfig, models: Vec<ServedModel>, metrics: Metrics, keys: KeyRing) -> Result<Gateway, GatewayError> {
        Self::with_clock(config, models, metrics, keys, Arc::new(SystemClock))
    }

    /// As [`Gateway::new`], with another clock.
    ///
    /// # Errors
    /// As for [`Gateway::new`].
    pub fn with_clock(
        config: GatewayConfig,
        models: Vec<ServedModel>,
        metrics: Metrics,
        keys: KeyRing,
        clock: Arc<dyn Clock>,
    ) -> Result<Gateway, GatewayError> {
        if models.is_empty() {
            return Err(GatewayError::config("models", "at least one model is needed"));
        }
        let gateway = Self::empty(config, metrics, keys, clock)?;
        let named = |(index, model): (usize, ServedModel)| ServedReplica {
            service: model.link.card().name.clone(),
            key: index.to_string(),
            version: String::new(),
            epoch: Epoch(0),
            prefixes: None,
            model,
        };
        // Nobody applied these at different times: which of two is meant, only the operator can say.
        let served: Vec<ServedReplica> = models.into_iter().enumerate().map(named).collect();
        let services: Vec<String> = served.iter().map(|replica| replica.service.clone()).collect();
        let clashes = gateway.publish(&served, &services);
        clashes.first().map_or(Ok(gateway), |clash| Err(GatewayError::config("models", format!("{clash}: rename one of them"))))
    }

    /// A gateway that serves nothing until [`Gateway::publish`] or [`Gateway::join`] says what.
    ///
    /// # Errors
    /// A setting out of range, or an address beyond loopback without keys.
    pub fn empty(config: GatewayConfig, metrics: Metrics, keys: KeyRing, clock: Arc<dyn Clock>) -> Result<Gateway, GatewayError> {
        config.check(keys.required())?;
        Ok(Self::unchecked(config, metrics, keys, clock))
    }

    /// As [`Gateway::empty`], for a process that checks the configuration when the cluster's keys are known and before
    /// it listens.
    pub(crate) fn unchecked(config: GatewayConfig, metrics: Metrics, keys: KeyRing, clock: Arc<dyn Clock>) -> Gateway {
        let threads = std::thread::available_parallelism().map_or(2, |count| count.get());
        let limits = &config.limits;
        let state = GatewayState {
            models: Models::default(),
            retries: Arc::default(),
            metrics,
            keys,
            rates: Mutex::default(),
            idempotency: Mutex::new(IdempotencyRecords::new(limits.idempotency_keys)),
            shared_records: RwLock::default(),
            lifecycle: Lifecycle::default(),
            clock,
            body_kib: Arc::new(Semaphore::new(limits.total_body_bytes.max(limits.body_bytes).div_ceil(1024).min(Semaphore::MAX_PERMITS))),
            requests: Arc::new(Semaphore::new(limits.concurrent_requests.min(Semaphore::MAX_PERMITS))),
            preparing: Arc::new(Semaphore::new(threads)),
            last_probe: LastProbe::default(),
            started: Instant::now(),
            config,
        };
        Gateway { state: Arc::new(state) }
    }

    /// Joins a cluster: models, keys, limits and idempotency keys are the cluster's from now on.
    pub fn join(&self, parts: MemberParts) -> ClusterMember {
        *self.state.shared_records.write() = Some(Arc::new(SharedRecords::new(parts.api.clone())));
        ClusterMember::start(parts, self.clone())
    }

    /// Replaces what is served. Requests under way go on at the replicas that stay, or wait for new ones. A model of one
    /// of `services`, the oldest first, stays listed while it has no replica. Gives the names that two services claim:
    /// the older one has them.
    pub fn publish(&self, served: &[ServedReplica], services: &[String]) -> Vec<NameClash> {
        self.state.models.publish(served, services)
    }

    /// Serves until `shutdown` resolves, then drains as [`Gateway::drain`] does and returns.
    ///
    /// # Errors
    /// [`GatewayError::Listener`] if a listener breaks.
    pub async fn serve(&self, listeners: Listeners, shutdown: impl Future<Output = ()> + Send) -> Result<(), GatewayError> {
        server::serve(self.state.clone(), listeners, shutdown).await
    }

    /// Stops admission (503, not ready), waits for requests in flight up to `deadline`, breaks off what is left with
    /// an error, and ends [`Gateway::serve`].
    pub async fn drain(&self, deadline: Duration) {
        self.state.lifecycle.drain(deadline).await;
        self.state.lifecycle.end();
    }

    /// Requests being answered.
    pub fn in_flight(&self) -> usize {
        self.state.lifecycle.in_flight()
    }
}
