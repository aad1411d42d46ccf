//! `ReplicaLink`: the in-process way to a replica's engine, stable over the engine's deaths.
//!
//! The gateway holds one for as long as the process lives; the replica's actor puts each new engine in and
//! takes a dead one out. Invariant: while there is no engine, a submission is refused as unavailable, never
//! queued here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use forge_shared::generate::{AdmitError, GenerateRequest};
use forge_shared::link::{EngineLink, EngineStatus, EventStream, ModelCard};
use futures::future::BoxFuture;
use parking_lot::RwLock;

/// See the module documentation.
pub struct ReplicaLink {
    /// As known before the model is loaded, then the last engine's: a request admitted by an engine that has just
    /// died still needs its numerics id.
    card: RwLock<Arc<ModelCard>>,
    current: RwLock<Current>,
    restarts: AtomicU32,
}

/// The engine, or why there is none.
enum Current {
    Running(Arc<dyn EngineLink>),
    Absent { reason: String },
}

impl ReplicaLink {
    /// A link without an engine yet. The card's numerics id is the engine's to know.
    pub fn new(card: ModelCard) -> Self {
        ReplicaLink {
            card: RwLock::new(Arc::new(card)),
            current: RwLock::new(Current::Absent { reason: "the model is loading".into() }),
            restarts: AtomicU32::new(0),
        }
    }

    /// Puts a running engine in.
    pub fn attach(&self, engine: Arc<dyn EngineLink>) {
        *self.card.write() = engine.card();
        *self.current.write() = Current::Running(engine);
    }

    /// Takes the engine out.
    pub fn detach(&self, reason: &str) {
        *self.current.write() = Current::Absent { reason: reason.to_owned() };
    }

    /// Counts a restart.
    pub fn count_restart(&self) {
        self.restarts.fetch_add(1, Ordering::Relaxed);
    }

    fn engine(&self) -> Result<Arc<dyn EngineLink>, AdmitError> {
        match &*self.current.read() {
            Current::Running(engine) => Ok(engine.clone()),
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
            Current::Running(engine) => engine.status(),
            Current::Absent { reason } => EngineStatus { reason: reason.clone(), ..EngineStatus::default() },
        };
        status.restarts = self.restarts.load(Ordering::Relaxed);
        status
    }
}
