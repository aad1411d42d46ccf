//! The shell of a request's [`Course`]: it submits, waits and listens as that says.
//!
//! It is pulled by the response body: dropping it drops the engine's stream, which cancels the request. It decides nothing.
//! Every wait ends at the request's deadline, or when the gateway breaks off.

use std::pin::Pin;
use std::sync::Arc;

use forge_shared::generate::{EngineEvent, GenerateRequest};
use forge_shared::link::EventStream;
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tracing::{Instrument, Span};

use crate::course::{Course, Step, Stop, Terms};
use crate::error::ApiError;
use crate::gateway::GatewayState;
use crate::models::Model;

/// One request at an engine.
pub(crate) struct Driver {
    gateway: Arc<GatewayState>,
    model: Arc<Model>,
    course: Course,
    /// Of the engine that has it.
    events: Option<EventStream>,
    deadline: Pin<Box<Sleep>>,
    span: Span,
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
        let terms = Terms {
            model: model.clone(),
            request,
            affinity,
            deadline: gateway.now() + remaining,
            deadline_s: gateway.config.timeouts.request_s,
            numerics_id,
            may_be_shortened,
            retries: gateway.retries.clone(),
        };
        let (course, mut step) = Course::begin(terms, gateway.now());
        let mut driver = Driver { gateway, model, course, events: None, deadline: Box::pin(sleep_until(deadline)), span };
        loop {
            match step {
                Step::Listen => return Ok(driver),
                Step::Fail(error) => return Err(error),
                other => step = driver.carry_out(other).await,
            }
        }
    }

    /// Numerics of the engine that admitted it.
    pub(crate) fn numerics_id(&self) -> &str {
        self.course.numerics_id()
    }

    /// The next event for the client; `Done` or an error is the last, then `None`.
    pub(crate) async fn next(&mut self) -> Option<Result<EngineEvent, ApiError>> {
        if self.course.is_over() {
            return None;
        }
        let mut step = Step::Listen;
        let event = loop {
            match step {
                Step::Forward(event) => break Ok(event),
                Step::Fail(error) => break Err(error),
                other => step = self.carry_out(other).await,
            }
        };
        if self.course.is_over() {
            self.events = None;
        }
        Some(event)
    }

    /// Does what a step says, and gives what follows; a step that is for the client is given back.
    async fn carry_out(&mut self, step: Step) -> Step {
        let done = match step {
            Step::Submit { replica, request } => {
                let submission = replica.link().submit(*request).instrument(self.span.clone());
                let submitted = bounded(&self.gateway, &mut self.deadline, submission).await;
                submitted.map(|answer| {
                    let answer = answer.map(|events| self.events = Some(events));
                    self.course.submitted(answer, self.gateway.now())
                })
            }
            Step::Replay { reason, wait } => {
                self.events = None;
                tracing::warn!(request = %self.course.id(), reason, "engine lost; submitting again");
                self.gateway.metrics.requests_replayed.get_or_create(&self.model.label).inc();
                let waited = bounded(&self.gateway, &mut self.deadline, sleep(wait)).await;
                waited.map(|()| self.course.waited(self.gateway.now()))
            }
            Step::Wait(wait) => {
                let waited = bounded(&self.gateway, &mut self.deadline, sleep(wait)).await;
                waited.map(|()| self.course.waited(self.gateway.now()))
            }
            Step::Listen => {
                let heard = match &mut self.events {
                    None => Ok(None),
                    Some(events) => bounded(&self.gateway, &mut self.deadline, events.recv()).await,
                };
                heard.map(|event| self.course.heard(event, self.gateway.now()))
            }
            for_client @ (Step::Forward(_) | Step::Fail(_)) => Ok(for_client),
        };
        done.unwrap_or_else(|stop| Step::Fail(self.course.stop(stop)))
    }
}

/// Awaits `future`, at most until the deadline or until the gateway breaks off. These come first: an engine ahead of a
/// slow reader always has a value ready, and the request would never end.
async fn bounded<T>(gateway: &GatewayState, deadline: &mut Pin<Box<Sleep>>, future: impl Future<Output = T>) -> Result<T, Stop> {
    tokio::select! {
        biased;
        () = deadline.as_mut() => Err(Stop::Deadline),
        () = gateway.lifecycle.broken_off().cancelled() => Err(Stop::BrokenOff),
        value = future => Ok(value),
    }
}
