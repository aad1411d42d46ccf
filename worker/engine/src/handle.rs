//! `EngineHandle`: the way to an engine's thread, and the `EngineLink` of one process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::{Duration, Instant};

use forge_shared::generate::{AdmitError, GenerateRequest};
use forge_shared::link::{EngineLink, EngineStatus, EventStream, ModelCard, PrefixUpdate};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::EngineCore;
use crate::listeners::LISTENER_DEPTH;
use crate::thread::Command;

/// What the thread tells its handles. The thread writes it between steps.
#[derive(Debug)]
pub(crate) struct Shared {
    status: Mutex<EngineStatus>,
    model_ns: AtomicU64,
    other_ns: AtomicU64,
    rounds: AtomicU64,
    generated_tokens: AtomicU64,
}

impl Shared {
    pub(crate) fn new(kv_blocks_total: usize) -> Self {
        let status = EngineStatus { ready: true, kv_blocks_total, ..EngineStatus::default() };
        Shared {
            status: Mutex::new(status),
            model_ns: AtomicU64::new(0),
            other_ns: AtomicU64::new(0),
            rounds: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
        }
    }

    pub(crate) fn observe(&self, core: &EngineCore) {
        self.rounds.fetch_add(1, Ordering::Relaxed);
        self.generated_tokens.store(core.generated_tokens(), Ordering::Relaxed);
        let scheduler = core.scheduler();
        let mut status = self.status.lock();
        status.running = scheduler.running();
        status.waiting = scheduler.waiting();
        status.kv_blocks_used = scheduler.blocks().used();
    }

    pub(crate) fn set_unready(&self, reason: &str) {
        let mut status = self.status.lock();
        status.ready = false;
        status.reason = reason.to_owned();
    }

    /// The engine is gone, and with it all it held.
    pub(crate) fn set_ended(&self, reason: &str) {
        let mut status = self.status.lock();
        *status = EngineStatus { reason: reason.to_owned(), kv_blocks_total: status.kv_blocks_total, ..EngineStatus::default() };
    }

    pub(crate) fn count_time(&self, model: Duration, other: Duration) {
        self.model_ns.fetch_add(model.as_nanos() as u64, Ordering::Relaxed);
        self.other_ns.fetch_add(other.as_nanos() as u64, Ordering::Relaxed);
    }
}

/// Where an engine's time went, over all its steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineTimes {
    /// Nanoseconds in the model.
    pub model_ns: u64,
    /// Nanoseconds of steps outside the model: scheduling, sampling, detokenizing, handing out.
    pub other_ns: u64,
    /// Times the thread's loop went round; it stands still while the engine is idle.
    pub rounds: u64,
}

/// The way to an engine. Cheap to clone. When the last handle is dropped, the engine finishes what it admitted
/// and ends.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: SyncSender<Command>,
    shared: Arc<Shared>,
    card: Arc<ModelCard>,
    event_capacity: usize,
}

impl EngineHandle {
    pub(crate) fn new(commands: SyncSender<Command>, shared: Arc<Shared>, card: Arc<ModelCard>, event_capacity: usize) -> Self {
        EngineHandle { commands, shared, card, event_capacity }
    }

    /// Hands a request to the engine's thread; the answer comes between two steps.
    pub(crate) fn send(&self, request: GenerateRequest) -> Result<PendingAdmission, AdmitError> {
        let (events, stream) = mpsc::channel(self.event_capacity);
        let (reply, admitted) = oneshot::channel();
        let status = self.shared.status.lock();
        if !status.ready {
            return Err(AdmitError::Unavailable { reason: status.reason.clone() });
        }
        let waiting = status.waiting;
        drop(status);
        match self.commands.try_send(Command::Submit { request: Box::new(request), events, reply }) {
            Ok(()) => Ok(PendingAdmission { admitted, stream }),
            Err(TrySendError::Full(_)) => Err(AdmitError::Overloaded { waiting, retry_after_s: 1 }),
            Err(TrySendError::Disconnected(_)) => Err(self.gone()),
        }
    }

    pub(crate) fn gone(&self) -> AdmitError {
        AdmitError::Unavailable { reason: self.end_reason() }
    }

    /// Why the engine ended, as far as it is known.
    pub(crate) fn end_reason(&self) -> String {
        let reason = self.shared.status.lock().reason.clone();
        if reason.is_empty() { "the engine has ended".into() } else { reason }
    }

    /// Takes no more requests, finishes those admitted, and ends: at the latest after `limit`, when what is left
    /// fails with a retryable event. Returns at once; the exit receiver of [`crate::EngineThread::spawn`] tells when.
    pub fn drain(&self, limit: Duration) {
        self.shared.set_unready("the engine is draining");
        // A full inbox cannot be waited for here: a thread of its own hands the command over. If the engine
        // has ended already there is nothing to drain.
        let command = Command::Drain { deadline: Instant::now() + limit };
        if let Err(TrySendError::Full(command)) = self.commands.try_send(command) {
            let commands = self.commands.clone();
            std::thread::spawn(move || commands.send(command));
        }
    }

    /// Changes of the prefix cache, beginning with everything it knows; a reader that falls behind begins anew. Ends with
    /// the engine.
    pub fn prefixes(&self) -> mpsc::Receiver<PrefixUpdate> {
        let (updates, receiver) = mpsc::channel(LISTENER_DEPTH);
        // Refused by an engine that has ended, or whose inbox is full of requests: the channel closes, and a caller that
        // still wants to know asks again.
        let _ = self.commands.try_send(Command::Listen { updates });
        receiver
    }

    /// Tokens drawn since the engine began.
    pub fn generated_tokens(&self) -> u64 {
        self.shared.generated_tokens.load(Ordering::Relaxed)
    }

    /// Where the time went so far.
    pub fn times(&self) -> EngineTimes {
        EngineTimes {
            model_ns: self.shared.model_ns.load(Ordering::Relaxed),
            other_ns: self.shared.other_ns.load(Ordering::Relaxed),
            rounds: self.shared.rounds.load(Ordering::Relaxed),
        }
    }
}

/// A request on its way into the engine. Dropping it takes the request back.
pub(crate) struct PendingAdmission {
    pub(crate) admitted: oneshot::Receiver<Result<(), AdmitError>>,
    pub(crate) stream: EventStream,
}

impl EngineLink for EngineHandle {
    fn submit(&self, request: GenerateRequest) -> BoxFuture<'_, Result<EventStream, AdmitError>> {
        Box::pin(async move {
            let pending = self.send(request)?;
            match pending.admitted.await {
                Ok(result) => result.map(|()| pending.stream),
                Err(_) => Err(self.gone()),
            }
        })
    }

    fn card(&self) -> Arc<ModelCard> {
        self.card.clone()
    }

    fn status(&self) -> EngineStatus {
        self.shared.status.lock().clone()
    }
}
