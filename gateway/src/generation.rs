//! An accepted HTTP request: one or several prompts at engines, their events merged, measured and paid for.
//!
//! Invariant: whatever way a request ends (done, failed, client gone), its seat is given back, its rate reservation is
//! replaced by what it used, and each of its answers is counted once by reason.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use forge_shared::generate::{EngineEvent, FinishReason, GenerateRequest, Logprobs, TokenEvent, Usage};
use forge_shared::ids::RequestId;
use futures::StreamExt;
use futures::future::try_join_all;
use futures::stream::{SelectAll, Stream, unfold};
use tokio::sync::OwnedSemaphorePermit;
use tracing::Span;

use crate::driver::{Admission, Driver};
use crate::error::ApiError;
use crate::gateway::GatewayState;
use crate::keys::Tenant;
use crate::meter::{Account, Meter};
use crate::models::Model;

/// A place among the requests being answered, held until the last byte of the answer.
pub(crate) struct Seat {
    _permit: OwnedSemaphorePermit,
    _counted: Counted,
}

/// Counts a request in, until dropped.
struct Counted(Arc<GatewayState>);

impl Counted {
    fn new(gateway: &Arc<GatewayState>) -> Self {
        gateway.lifecycle.enter();
        Counted(gateway.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.lifecycle.leave();
    }
}

impl Seat {
    /// Takes a place.
    ///
    /// # Errors
    /// [`ApiError::Unavailable`] while draining, [`ApiError::Overloaded`] when all are taken.
    pub(crate) fn take(gateway: &Arc<GatewayState>) -> Result<Seat, ApiError> {
        // Counted before the look: a drain that begins in between waits for this request, or this request sees it.
        let counted = Counted::new(gateway);
        if gateway.lifecycle.is_draining() {
            let message = "the server is shutting down; send the request again".into();
            return Err(ApiError::Unavailable { message, retry_after_s: 5 });
        }
        let permit = gateway.requests.clone().try_acquire_owned().map_err(|_| ApiError::Overloaded {
            message: format!("{} requests are being answered already", gateway.config.limits.concurrent_requests),
            retry_after_s: 1,
        })?;
        Ok(Seat { _permit: permit, _counted: counted })
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
    numerics_id: String,
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
    /// Only replicas of these numerics, if given.
    pub(crate) numerics_id: Option<Arc<str>>,
    /// The answer's bound is what the context leaves.
    pub(crate) may_be_shortened: bool,
    pub(crate) arrived: Instant,
    pub(crate) seat: Seat,
    /// What is done for it is below this span.
    pub(crate) span: Span,
}

impl Generation {
    /// Reserves the tenant's tokens and submits every prompt, all at once: an engine admits between its steps, and one
    /// after the other would cost a step each. `Ok` means accepted.
    ///
    /// # Errors
    /// The first refusal of a prompt; the others are cancelled.
    pub(crate) async fn start(work: Work) -> Result<Generation, ApiError> {
        let Work { gateway, model, tenant, requests, affinity, numerics_id: wanted_numerics, may_be_shortened, arrived, seat, span } = work;
        let tokens_of = |request: &GenerateRequest| {
            request.prompt_tokens.len() as u64 + u64::from(request.params.max_tokens) * request.choices.len() as u64
        };
        let prompt_tokens: usize = requests.iter().map(|request| request.prompt_tokens.len()).sum();
        let wanted = requests.iter().map(tokens_of).sum();
        let reserved = gateway.rates.lock().reserve(tenant.name(), tenant.limits, wanted, gateway.now());
        let reserved_tokens = reserved.inspect_err(|_| gateway.keys.count_refused(&tenant))?;
        let answers_per_prompt = requests.first().map_or(0, |request| request.choices.len());
        let answers = answers_per_prompt * requests.len();
        let request_id = requests.first().map_or_else(|| RequestId(String::new()), |request| request.id.clone());
        let account = Account { gateway: gateway.clone(), model: model.clone(), tenant, reserved_tokens, request_id, span: span.clone() };
        let mut meter = Meter::new(account, arrived, answers);
        let deadline = tokio::time::Instant::from_std(arrived + gateway.config.timeouts.request());
        let open_prompts = requests.len();
        let admissions = requests.into_iter().map(|request| {
            let admission = Admission { affinity, deadline, numerics_id: wanted_numerics.clone(), may_be_shortened, span: span.clone() };
            Driver::admit(gateway.clone(), model.clone(), request, admission)
        });
        let drivers = try_join_all(admissions).await.inspect_err(|error| meter.refused(error))?;
        let numerics_id = drivers.last().map(|driver| driver.numerics_id().to_owned()).unwrap_or_default();
        let events_of = |(prompt, driver): (usize, Driver)| -> Events {
            Box::pin(unfold(driver, move |mut driver| async move {
                let event = driver.next().await?;
                Some(((prompt, event), driver))
            }))
        };
        let events = drivers.into_iter().enumerate().map(events_of).collect();
        meter.accepted(prompt_tokens);
        let usage = Usage { prompt_tokens: prompt_tokens as u32, ..Usage::default() };
        Ok(Generation { events, answers_per_prompt, open_prompts, usage, meter, ended: false, numerics_id, _seat: seat })
    }

    /// Of the engine that admitted the last prompt.
    pub(crate) fn numerics_id(&self) -> &str {
        &self.numerics_id
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
        self.meter.failed();
        Err(error)
    }

    /// Waits for everything.
    pub(crate) async fn collect(&mut self) -> Result<Collected, ApiError> {
        let mut collected = Collected { answers: vec![CollectedAnswer::default(); self.meter.answers()], ..Collected::default() };
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
