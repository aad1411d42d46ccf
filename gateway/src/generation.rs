//! An accepted HTTP request: one or several prompts at engines, their events merged, measured and paid for.
//!
//! Invariant: whatever way a request ends (done, failed, client gone), its seat is given back, its rate reservation is
//! replaced by what it used, and each of its answers is counted once by reason.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use forge_shared::generate::{EngineEvent, FinishReason, GenerateRequest, Logprobs, TokenEvent, Usage};
use forge_shared::telemetry::{FinishLabel, Metrics};
use futures::StreamExt;
use futures::stream::{SelectAll, Stream, unfold};
use tokio::sync::OwnedSemaphorePermit;

use crate::driver::{Admission, Driver};
use crate::error::ApiError;
use crate::gateway::GatewayState;
use crate::keys::Tenant;
use crate::models::Model;

/// A place among the requests being answered, held until the last byte of the answer.
pub(crate) struct Seat {
    gateway: Arc<GatewayState>,
    _permit: OwnedSemaphorePermit,
}

impl Seat {
    /// Takes a place.
    ///
    /// # Errors
    /// [`ApiError::Unavailable`] while draining, [`ApiError::Overloaded`] when all are taken.
    pub(crate) fn take(gateway: &Arc<GatewayState>) -> Result<Seat, ApiError> {
        if gateway.lifecycle.is_draining() {
            let message = "the server is shutting down; send the request again".into();
            return Err(ApiError::Unavailable { message, retry_after_s: 5 });
        }
        let permit = gateway.requests.clone().try_acquire_owned().map_err(|_| ApiError::Overloaded {
            message: format!("{} requests are being answered already", gateway.config.limits.concurrent_requests),
            retry_after_s: 1,
        })?;
        gateway.lifecycle.enter();
        Ok(Seat { gateway: gateway.clone(), _permit: permit })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.gateway.lifecycle.leave();
    }
}

/// What the client is to see; indices count over all prompts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Output {
    /// Log-probabilities of a prompt's tokens from the second on.
    PromptLogprobs { prompt: usize, logprobs: Vec<Logprobs> },
    /// A token of an answer.
    Token { index: usize, token: TokenEvent },
    /// The end of an answer.
    Finished { index: usize, reason: FinishReason, text: String },
    /// The end of everything.
    Done(Usage),
}

/// What the client is to see of one answer, whole.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct CollectedAnswer {
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) logprobs: Vec<Logprobs>,
    pub(crate) reason: Option<FinishReason>,
}

/// Everything, for an answer that is not streamed.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Collected {
    pub(crate) answers: Vec<CollectedAnswer>,
    /// By prompt; empty if not asked for.
    pub(crate) prompt_logprobs: HashMap<usize, Vec<Logprobs>>,
    pub(crate) usage: Usage,
}

type Events = Pin<Box<dyn Stream<Item = (usize, Result<EngineEvent, ApiError>)> + Send>>;

/// One HTTP request's work.
pub(crate) struct Generation {
    events: SelectAll<Events>,
    answers_per_prompt: usize,
    open_prompts: usize,
    usage: Usage,
    meter: Meter,
    ended: bool,
    _seat: Seat,
}

/// What a generation is started from.
pub(crate) struct Work {
    pub(crate) gateway: Arc<GatewayState>,
    pub(crate) model: Arc<Model>,
    pub(crate) tenant: Tenant,
    /// One per prompt; all with the same number of choices.
    pub(crate) requests: Vec<GenerateRequest>,
    pub(crate) affinity: u64,
    pub(crate) arrived: Instant,
    pub(crate) seat: Seat,
}

impl Generation {
    /// Reserves the tenant's tokens and submits every prompt. `Ok` means accepted.
    ///
    /// # Errors
    /// The first prompt that is not admitted; those before it are cancelled.
    pub(crate) async fn start(work: Work) -> Result<Generation, ApiError> {
        let Work { gateway, model, tenant, requests, affinity, arrived, seat } = work;
        let tokens_of = |request: &GenerateRequest| {
            request.prompt_tokens.len() as u64 + u64::from(request.params.max_tokens) * request.choices.len() as u64
        };
        let prompt_tokens: usize = requests.iter().map(|request| request.prompt_tokens.len()).sum();
        let wanted = requests.iter().map(tokens_of).sum();
        let reserved = gateway.rates.lock().reserve(tenant.name(), tenant.limits, wanted, gateway.now())?;
        let answers_per_prompt = requests.first().map_or(0, |request| request.choices.len());
        let answers = answers_per_prompt * requests.len();
        let mut meter = Meter::new(gateway.clone(), model.clone(), tenant, reserved, arrived, answers);
        let deadline = tokio::time::Instant::from_std(arrived + gateway.config.timeouts.request());
        let mut events: SelectAll<Events> = SelectAll::new();
        let open_prompts = requests.len();
        for (prompt, request) in requests.into_iter().enumerate() {
            let admission = Admission { affinity, deadline };
            let driver = Driver::admit(gateway.clone(), model.clone(), request, admission).await.inspect_err(|error| {
                meter.refused(error);
            })?;
            events.push(Box::pin(unfold(driver, move |mut driver| async move {
                let event = driver.next().await?;
                Some(((prompt, event), driver))
            })));
        }
        meter.accepted(prompt_tokens);
        let usage = Usage { prompt_tokens: prompt_tokens as u32, ..Usage::default() };
        Ok(Generation { events, answers_per_prompt, open_prompts, usage, meter, ended: false, _seat: seat })
    }

    /// The next event; `Done` or an error is the last, then `None`.
    pub(crate) async fn next(&mut self) -> Option<Result<Output, ApiError>> {
        while !self.ended {
            let Some((prompt, event)) = self.events.next().await else {
                return Some(self.fail(ApiError::Internal("the engines' events ended without an end".into())));
            };
            let index = |choice: u32| prompt * self.answers_per_prompt + choice as usize;
            return Some(match event {
                Err(error) => self.fail(error),
                Ok(EngineEvent::PromptLogprobs(logprobs)) => Ok(Output::PromptLogprobs { prompt, logprobs }),
                Ok(EngineEvent::Token(token)) => {
                    let index = index(token.choice);
                    self.meter.token(index);
                    Ok(Output::Token { index, token })
                }
                Ok(EngineEvent::Finished { choice, reason, text }) => {
                    let index = index(choice);
                    self.meter.finished(index, &reason);
                    Ok(Output::Finished { index, reason, text })
                }
                Ok(EngineEvent::Failed { reason, .. }) => self.fail(ApiError::EngineFailed { reason }),
                Ok(EngineEvent::Done(usage)) => {
                    self.usage.cached_prompt_tokens += usage.cached_prompt_tokens;
                    self.usage.completion_tokens += usage.completion_tokens;
                    self.open_prompts -= 1;
                    if self.open_prompts > 0 {
                        continue;
                    }
                    self.ended = true;
                    self.meter.done(self.usage);
                    Ok(Output::Done(self.usage))
                }
            });
        }
        None
    }

    fn fail(&mut self, error: ApiError) -> Result<Output, ApiError> {
        self.ended = true;
        self.events = SelectAll::new();
        self.meter.failed = true;
        Err(error)
    }

    /// Waits for everything.
    pub(crate) async fn collect(&mut self) -> Result<Collected, ApiError> {
        let mut collected = Collected { answers: vec![CollectedAnswer::default(); self.meter.answers.len()], ..Collected::default() };
        while let Some(output) = self.next().await {
            match output? {
                Output::PromptLogprobs { prompt, logprobs } => drop(collected.prompt_logprobs.insert(prompt, logprobs)),
                Output::Token { index, token } => {
                    let answer = &mut collected.answers[index];
                    answer.text.push_str(&token.text);
                    answer.tokens.push(token.token);
                    answer.logprobs.extend(token.logprobs);
                }
                Output::Finished { index, reason, text } => {
                    collected.answers[index].text.push_str(&text);
                    collected.answers[index].reason = Some(reason);
                }
                Output::Done(usage) => collected.usage = usage,
            }
        }
        Ok(collected)
    }
}

/// What the meter knows of an answer.
#[derive(Debug, Clone, Default)]
struct AnswerMeter {
    tokens: u32,
    last_token: Option<Instant>,
    finished: bool,
}

/// Metrics and rate limits of one request.
struct Meter {
    gateway: Arc<GatewayState>,
    model: Arc<Model>,
    tenant: Tenant,
    reserved: u64,
    arrived: Instant,
    prompt_tokens: usize,
    answers: Vec<AnswerMeter>,
    accepted: bool,
    first_token_seen: bool,
    failed: bool,
}

impl Meter {
    fn new(gateway: Arc<GatewayState>, model: Arc<Model>, tenant: Tenant, reserved: u64, arrived: Instant, answers: usize) -> Self {
        Meter {
            gateway,
            model,
            tenant,
            reserved,
            arrived,
            prompt_tokens: 0,
            answers: vec![AnswerMeter::default(); answers],
            accepted: false,
            first_token_seen: false,
            failed: false,
        }
    }

    fn metrics(&self) -> &Metrics {
        &self.gateway.metrics
    }

    fn refused(&mut self, error: &ApiError) {
        if matches!(error, ApiError::Overloaded { .. }) {
            self.metrics().requests_rejected.get_or_create(&self.model.label).inc();
        }
    }

    fn accepted(&mut self, prompt_tokens: usize) {
        self.accepted = true;
        self.prompt_tokens = prompt_tokens;
        let metrics = self.metrics();
        metrics.requests_in_progress.get_or_create(&self.model.label).inc();
        metrics.prompt_tokens.get_or_create(&self.model.label).inc_by(prompt_tokens as u64);
        metrics.request_prompt_tokens.get_or_create(&self.model.label).observe(prompt_tokens as f64);
    }

    fn token(&mut self, index: usize) {
        let now = Instant::now();
        let label = &self.model.label;
        let metrics = &self.gateway.metrics;
        metrics.generation_tokens.get_or_create(label).inc();
        if !std::mem::replace(&mut self.first_token_seen, true) {
            let waited = now.duration_since(self.arrived).as_secs_f64();
            metrics.time_to_first_token_s.get_or_create(label).observe(waited);
        }
        let answer = &mut self.answers[index];
        answer.tokens += 1;
        if let Some(last) = answer.last_token.replace(now) {
            metrics.inter_token_latency_s.get_or_create(label).observe(now.duration_since(last).as_secs_f64());
        }
    }

    fn finished(&mut self, index: usize, reason: &FinishReason) {
        self.answers[index].finished = true;
        let tokens = f64::from(self.answers[index].tokens);
        self.metrics().request_generation_tokens.get_or_create(&self.model.label).observe(tokens);
        self.count_end(if *reason == FinishReason::Length { "length" } else { "stop" });
    }

    fn done(&mut self, usage: Usage) {
        let label = &self.model.label;
        let metrics = self.metrics();
        metrics.end_to_end_latency_s.get_or_create(label).observe(self.arrived.elapsed().as_secs_f64());
        tracing::debug!(model = %label.model_name, ?usage, "request done");
    }

    fn count_end(&self, reason: &str) {
        let label = FinishLabel { model_name: self.model.label.model_name.clone(), finished_reason: reason.to_owned() };
        self.metrics().requests_finished.get_or_create(&label).inc();
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        let generated: u64 = self.answers.iter().map(|answer| u64::from(answer.tokens)).sum();
        let used = if self.accepted { self.prompt_tokens as u64 + generated } else { 0 };
        self.gateway.rates.lock().settle(self.tenant.name(), self.reserved, used, self.gateway.now());
        if !self.accepted {
            return;
        }
        self.metrics().requests_in_progress.get_or_create(&self.model.label).dec();
        let reason = if self.failed { "error" } else { "abort" };
        for _ in self.answers.iter().filter(|answer| !answer.finished) {
            self.count_end(reason);
        }
    }
}
