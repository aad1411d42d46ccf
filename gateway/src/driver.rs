//! Keeps one accepted request alive over as many engines as it takes.
//!
//! It is pulled by the response body: dropping it drops the engine's stream, which cancels the request. Decisions
//! are the journal's and the router's; this file only waits and submits. Every wait ends at the request's deadline.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use forge_shared::generate::{AdmitError, EngineEvent, GenerateRequest};
use forge_shared::link::EventStream;
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tracing::{Instrument, Span};

use crate::error::ApiError;
use crate::gateway::GatewayState;
use crate::journal::{Loss, Next, Recorded, RequestJournal};
use crate::models::{Model, Replica, ReplicaGuard, Wanted};

/// How often readiness is looked at while no replica can answer.
const READY_POLL: Duration = Duration::from_millis(50);

/// For how long only replicas of too little context may be left before a request that needs more is given up: a place with
/// more may be in the making.
const CONTEXT_PATIENCE: Duration = Duration::from_secs(5);

/// Why a repeated idempotency key finds no replica although some are ready.
const OTHER_NUMERICS: &str = "the replicas that are ready compute with other numerics than the one that first accepted this Idempotency-Key, \
     and would answer with other tokens; send it again later, or without the key";

/// Why none of the replicas that are ready is tried.
const HELD_BACK: &str = "its replicas could not be reached of late and are tried again in a moment";

/// One request at an engine.
pub(crate) struct Driver {
    gateway: Arc<GatewayState>,
    model: Arc<Model>,
    journal: RequestJournal,
    affinity: u64,
    numerics_id: String,
    may_be_shortened: bool,
    /// None while no engine has it.
    engine: Option<AtEngine>,
    deadline: Pin<Box<Sleep>>,
    ended: bool,
    span: Span,
}

/// A request at a replica's engine.
struct AtEngine {
    events: EventStream,
    replica: Arc<Replica>,
    _guard: ReplicaGuard,
}

/// What a request needs beside itself.
pub(crate) struct Admission {
    /// Requests of equal affinity prefer the same replica.
    pub(crate) affinity: u64,
    /// When the client is told that it took too long.
    pub(crate) deadline: Instant,
    /// Only replicas of these numerics may admit it, if given.
    pub(crate) numerics_id: Option<Arc<str>>,
    /// The client set no bound on its answer, which is then what the context leaves, also of a replica that takes over.
    pub(crate) may_be_shortened: bool,
    /// The request's: engines' spans are below it.
    pub(crate) span: Span,
}

impl Driver {
    /// Submits a request to the replicas in order of preference until one admits it.
    ///
    /// # Errors
    /// The last replica's refusal, or that none is ready.
    pub(crate) async fn admit(
        gateway: Arc<GatewayState>,
        model: Arc<Model>,
        request: GenerateRequest,
        admission: Admission,
    ) -> Result<Driver, ApiError> {
        let Admission { affinity, deadline, numerics_id, may_be_shortened, span } = admission;
        let remaining = deadline.saturating_duration_since(Instant::now());
        let journal = RequestJournal::admit(request.clone(), gateway.now() + remaining);
        let mut driver = Driver {
            numerics_id: String::new(),
            gateway,
            model,
            journal,
            affinity,
            may_be_shortened,
            engine: None,
            deadline: Box::pin(sleep_until(deadline)),
            ended: false,
            span,
        };
        driver.gateway.retries.lock().earn();
        let mut tried = Vec::new();
        let mut refusal = AdmitError::Unavailable { reason: "no replica is ready".into() };
        loop {
            let Some(replica) = driver.pick(&request, &tried, numerics_id.as_deref()) else {
                // Another prompt of this list, perhaps, tries the only replica that is left; it is about to tell.
                if !driver.model.is_probing(&driver.wanted(&request, &tried, numerics_id.as_deref())) {
                    break;
                }
                bounded(&driver.gateway, &mut driver.deadline, sleep(READY_POLL)).await?;
                continue;
            };
            if !tried.is_empty() && !driver.gateway.retries.lock().spend(driver.gateway.now()) {
                tracing::debug!(request = %request.id, "no retry left in the gateway's budget");
                break;
            }
            match driver.submit(&replica, request.clone()).await? {
                Ok(()) => {
                    driver.numerics_id = replica.link.card().numerics_id.clone();
                    return Ok(driver);
                }
                Err(error @ (AdmitError::Overloaded { .. } | AdmitError::Unavailable { .. })) => refusal = error,
                Err(error) => return Err(error.into()),
            }
            tried.push(replica);
        }
        if tried.is_empty() {
            let is_held_back = driver.model.is_held_back(&driver.wanted(&request, &tried, numerics_id.as_deref()));
            let other_numerics = || numerics_id.map(|_| OTHER_NUMERICS.to_owned());
            let reason = driver.model.unready_reason().or_else(|| is_held_back.then(|| HELD_BACK.to_owned())).or_else(other_numerics);
            refusal = reason.map_or(refusal, |reason| AdmitError::Unavailable { reason });
        }
        Err(refusal.into())
    }

    /// Numerics of the engine that admitted it.
    pub(crate) fn numerics_id(&self) -> &str {
        &self.numerics_id
    }

    fn pick(&self, request: &GenerateRequest, tried: &[Arc<Replica>], numerics_id: Option<&str>) -> Option<Arc<Replica>> {
        self.model.pick(&self.wanted(request, tried, numerics_id))
    }

    fn wanted<'a>(&self, request: &'a GenerateRequest, tried: &'a [Arc<Replica>], numerics_id: Option<&'a str>) -> Wanted<'a> {
        let context_tokens = request.prompt_tokens.len().saturating_add(request.params.max_tokens as usize);
        Wanted { request, context_tokens, affinity: self.affinity, tried, numerics_id, now: self.gateway.now() }
    }

    /// A replica that can go on with a request whose engine died, and the request for it. Where all that are left have
    /// less context than the one that admitted it, an answer without a bound of its own ends where theirs does.
    fn pick_successor(&self, request: &GenerateRequest) -> Option<(Arc<Replica>, GenerateRequest)> {
        let wanted = self.wanted(request, &[], Some(&self.numerics_id));
        if let Some(replica) = self.model.pick_successor(&wanted) {
            return Some((replica, request.clone()));
        }
        let context_tokens = self.least_context(request);
        if context_tokens >= wanted.context_tokens {
            return None;
        }
        let replica = self.model.pick_successor(&Wanted { context_tokens, ..wanted })?;
        let mut request = request.clone();
        let prompt = request.prompt_tokens.len();
        let room = replica.link.card().max_model_len.saturating_sub(prompt);
        request.params.max_tokens = request.params.max_tokens.min(u32::try_from(room).unwrap_or(u32::MAX));
        Some((replica, request))
    }

    /// The least context in tokens with which a request can go on: less than it wants where the client set no bound.
    fn least_context(&self, request: &GenerateRequest) -> usize {
        let wanted = request.params.max_tokens as usize;
        let emitted = request.choices.iter().map(|choice| choice.emitted_tokens.len()).max().unwrap_or(0);
        let answer = match self.may_be_shortened {
            true => emitted.saturating_add(1).max(request.params.min_tokens as usize).min(wanted),
            false => wanted,
        };
        request.prompt_tokens.len().saturating_add(answer)
    }

    /// Why a request cannot go on, if all that is left of its numerics has too little context for it.
    fn too_short(&self, request: &GenerateRequest) -> Option<ApiError> {
        let (needed, longest) = (self.least_context(request), self.model.longest_successor(&self.numerics_id)?);
        let message = format!(
            "the replica that answered is gone, and those that are left have a context of {longest} tokens, of which this request needs \
             {needed}: send it again with a shorter prompt or a smaller max_tokens"
        );
        let (param, code) = (Some("max_tokens".to_owned()), Some("context_length_exceeded"));
        (longest < needed).then_some(ApiError::Invalid { param, message, code })
    }

    /// Submits to one replica, bounded by the deadline and the gateway's end.
    async fn submit(&mut self, replica: &Arc<Replica>, request: GenerateRequest) -> Result<Result<(), AdmitError>, ApiError> {
        // Counted from now on, so that prompts submitted at the same time spread over the replicas.
        let guard = replica.occupy();
        let attempt = replica.attempt();
        let submission = replica.link.submit(request).instrument(self.span.clone());
        let submitted = bounded(&self.gateway, &mut self.deadline, submission).await;
        let now = self.gateway.now();
        match &submitted {
            Ok(Err(AdmitError::Unavailable { .. })) => attempt.failed(now),
            // Any other refusal is an answer.
            Ok(_) => attempt.succeeded(),
            // The deadline, or the gateway's end: it says nothing of the replica.
            Err(_) => drop(attempt),
        }
        Ok(submitted?.map(|events| self.engine = Some(AtEngine { events, replica: replica.clone(), _guard: guard })))
    }

    /// The next event for the client; `Done` or an error is the last, then `None`.
    pub(crate) async fn next(&mut self) -> Option<Result<EngineEvent, ApiError>> {
        if self.ended {
            return None;
        }
        let event = self.advance().await;
        if matches!(event, Ok(EngineEvent::Done(_)) | Err(_)) {
            self.ended = true;
            self.engine = None;
        }
        Some(event)
    }

    async fn advance(&mut self) -> Result<EngineEvent, ApiError> {
        loop {
            let (reason, has_died) = match self.receive().await? {
                Some(EngineEvent::Failed { reason, retryable: true }) => (reason, false),
                Some(EngineEvent::Failed { reason, .. }) => return Err(ApiError::EngineFailed { reason }),
                None => ("its stream ended".to_owned(), true),
                Some(mut event) => match self.journal.record(&mut event) {
                    Ok(Recorded::Forward) => return Ok(event),
                    Ok(Recorded::Repeated) => continue,
                    Err(violation) => (violation.to_string(), true),
                },
            };
            if let Some(done) = self.replace_engine(&reason, has_died).await? {
                return Ok(done);
            }
        }
    }

    async fn receive(&mut self) -> Result<Option<EngineEvent>, ApiError> {
        match &mut self.engine {
            None => Ok(None),
            Some(engine) => bounded(&self.gateway, &mut self.deadline, engine.events.recv()).await,
        }
    }

    /// After an engine died or went away: submits the rest of the request to the next one that can take it.
    async fn replace_engine(&mut self, reason: &str, has_died: bool) -> Result<Option<EngineEvent>, ApiError> {
        let mut replica = String::new();
        if let Some(lost) = self.engine.take() {
            lost.replica.breaker().failed(self.gateway.now());
            replica = lost.replica.key().to_owned();
        }
        let loss = if has_died { Loss::Died(&replica) } else { Loss::Away };
        let (request, wait) = match self.journal.engine_lost(loss, self.gateway.now()) {
            Next::Resubmit { request, wait } => (request, wait),
            Next::Complete(usage) => return Ok(Some(EngineEvent::Done(usage))),
            Next::DeadlineOver => return Err(ApiError::Deadline { seconds: self.gateway.config.timeouts.request_s }),
            Next::GiveUp => {
                let reason = format!("it gave this request up {} times, the last time because: {reason}", self.journal.submissions());
                return Err(ApiError::EngineFailed { reason });
            }
        };
        tracing::warn!(request = %request.id, reason, "engine lost; submitting again");
        self.gateway.metrics.requests_replayed.get_or_create(&self.model.label).inc();
        bounded(&self.gateway, &mut self.deadline, sleep(wait)).await?;
        let mut short_since: Option<Instant> = None;
        loop {
            // Only an engine of the same numerics goes on with the same tokens; until one is ready, the client waits.
            if let Some((replica, request)) = self.pick_successor(&request) {
                match self.submit(&replica, request).await? {
                    Ok(()) => return Ok(None),
                    Err(AdmitError::Overloaded { .. } | AdmitError::Unavailable { .. }) => {}
                    Err(error) => return Err(ApiError::EngineFailed { reason: error.to_string() }),
                }
            }
            short_since = match self.too_short(&request) {
                None => None,
                Some(error) if short_since.is_some_and(|since| since.elapsed() >= CONTEXT_PATIENCE) => return Err(error),
                Some(_) => short_since.or_else(|| Some(Instant::now())),
            };
            bounded(&self.gateway, &mut self.deadline, sleep(READY_POLL)).await?;
        }
    }
}

/// Awaits `future`, at most until the deadline or until the gateway breaks off. These come first: an engine ahead of a
/// slow reader always has a value ready, and the request would never end.
async fn bounded<T>(gateway: &GatewayState, deadline: &mut Pin<Box<Sleep>>, future: impl Future<Output = T>) -> Result<T, ApiError> {
    tokio::select! {
        biased;
        () = deadline.as_mut() => Err(ApiError::Deadline { seconds: gateway.config.timeouts.request_s }),
        () = gateway.lifecycle.broken_off().cancelled() => Err(shutting_down()),
        value = future => Ok(value),
    }
}

fn shutting_down() -> ApiError {
    ApiError::Unavailable { message: "the server is shutting down; send the request again".into(), retry_after_s: 5 }
}
