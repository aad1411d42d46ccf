//! `EngineCore`: requests in, steps planned, logits in, events out. No clock, no model, and no threads but those that
//! help to draw, which change nothing (see the module of draws).
//!
//! ```text
//! submit ─► Scheduler ─► StepPlan ─► (model) ─► logits ─► Sampler ─► Answer ─► Outlet
//! ```
//!
//! The caller runs the model between [`EngineCore::begin_step`] and [`EngineCore::finish_step`] and gives the
//! time, so the same core serves a thread, a test and a simulator.
//!
//! Invariants: a request's events are its tokens in order and one last `Done` or `Failed`; replayed tokens are
//! never sent again; a request's failure ends that request alone; a request without a listener is gone, blocks and
//! all, when the next step begins.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use forge_model::{StepModel, StepModelInfo, StepPlan};
use forge_shared::generate::{AdmitError, EngineEvent, GenerateRequest};
use forge_shared::link::PrefixUpdate;
use forge_shared::telemetry::{Metrics, RunLabel};
use forge_text::{PrefixHasher, Tokenizer};
use tokio::sync::mpsc::Sender;

use crate::active::{Active, Next};
use crate::blocks::BlockManager;
use crate::draws::{Draw, Samplers};
use crate::listeners::Listeners;
use crate::meter::Meter;
use crate::outlet::Outlet;
use crate::retry::RetryEstimate;
use crate::scheduler::{LogitsPurpose, LogitsUse, NewRequest, Scheduler, SequenceId};
use crate::{EngineError, EngineOptions, admission};

/// See the module's documentation.
#[derive(Debug)]
pub struct EngineCore {
    info: StepModelInfo,
    options: EngineOptions,
    tokenizer: Tokenizer,
    scheduler: Scheduler,
    samplers: Samplers,
    /// By the scheduler's arrival number.
    requests: BTreeMap<u64, Active>,
    /// Ended requests whose last events did not fit in their channel yet.
    leaving: Vec<Outlet>,
    /// Steps under way, oldest first.
    plans: VecDeque<StepPlan>,
    /// A plan whose memory is used again.
    spare: StepPlan,
    /// Steps begun.
    steps: u64,
    retry: RetryEstimate,
    meter: Meter,
    listeners: Listeners,
    generated_tokens: u64,
}

impl EngineCore {
    /// A core for a model of these facts. `run` labels the metrics.
    ///
    /// # Errors
    /// [`EngineError::Option`], or [`EngineError::Thread`] if the system gives no thread.
    pub fn new(
        info: StepModelInfo,
        tokenizer: Tokenizer,
        options: EngineOptions,
        metrics: &Metrics,
        run: &RunLabel,
    ) -> Result<Self, EngineError> {
        Self::on_threads(Samplers::threads(), (info, tokenizer), options, metrics, run)
    }

    /// As [`EngineCore::new`], drawing on the caller's thread alone: for a simulator, which has no other.
    ///
    /// # Errors
    /// [`EngineError::Option`].
    pub fn on_one_thread(
        info: StepModelInfo,
        tokenizer: Tokenizer,
        options: EngineOptions,
        metrics: &Metrics,
        run: &RunLabel,
    ) -> Result<Self, EngineError> {
        Self::on_threads(1, (info, tokenizer), options, metrics, run)
    }

    fn on_threads(
        threads: usize,
        (info, tokenizer): (StepModelInfo, Tokenizer),
        options: EngineOptions,
        metrics: &Metrics,
        run: &RunLabel,
    ) -> Result<Self, EngineError> {
        let limits = options.limits(&info)?;
        let blocks = BlockManager::new(info.kv_blocks, info.block_size);
        Ok(EngineCore {
            samplers: Samplers::new(info.vocab_size, threads)?,
            scheduler: Scheduler::new(limits, blocks),
            plans: VecDeque::new(),
            spare: StepPlan::default(),
            steps: 0,
            requests: BTreeMap::new(),
            leaving: Vec::new(),
            retry: RetryEstimate::default(),
            meter: Meter::new(metrics, run),
            listeners: Listeners::default(),
            generated_tokens: 0,
            info,
            options,
            tokenizer,
        })
    }

    /// Lets so many steps be under way at once: what a `forge_model::step::Pipeline` takes.
    pub fn allow_under_way(&mut self, steps: usize) {
        self.scheduler.allow_under_way(steps);
    }

    /// Steps that were begun and not finished.
    pub fn under_way(&self) -> usize {
        self.plans.len()
    }

    /// Admits a request; its events go to `events`. `now` is the time since the engine's start.
    ///
    /// # Errors
    /// Why it is not admitted.
    pub fn submit(&mut self, request: GenerateRequest, events: Sender<EngineEvent>, now: Duration) -> Result<(), AdmitError> {
        admission::check(&self.info, &request)?;
        let waiting = self.scheduler.queued_requests();
        // One that goes on was accepted elsewhere: new ones must not keep it out. As many again are enough for a lost engine's.
        let goes_on = request.choices.iter().any(|choice| !choice.emitted_tokens.is_empty());
        let waiting_max = if goes_on { self.options.max_waiting.saturating_mul(2) } else { self.options.max_waiting };
        if waiting >= waiting_max {
            return Err(AdmitError::Overloaded { waiting, retry_after_s: self.retry.estimate_s(waiting) });
        }
        if self.requests.is_empty() {
            self.retry.busy_from(now);
        }
        let mut active = Active::new(request, Outlet::new(events), &self.tokenizer, &self.info, now)
            .map_err(|error| AdmitError::Unavailable { reason: error.to_string() })?;
        let Some(answers) = active.unfinished() else {
            self.leave(active.finish());
            return Ok(());
        };
        let request = active.request();
        let ids = self.scheduler.submit(NewRequest {
            priority: request.priority,
            prompt: request.prompt_tokens.clone(),
            answers,
            root: PrefixHasher::root(&request.tenant.0, &self.info.numerics_id),
            scores_prompt: active.scores_prompt(),
            generates: request.params.max_tokens > 0,
        });
        let arrival = ids[0].arrival;
        active.set_sequences(ids);
        self.requests.insert(arrival, active);
        Ok(())
    }

    /// Drops requests whose client went away, then plans a step. Returns whether there is one to run; there is none while
    /// as many are under way as may be.
    pub fn begin_step(&mut self, now: Duration) -> bool {
        self.sweep();
        let mut plan = std::mem::take(&mut self.spare);
        let planned = self.scheduler.plan(&mut plan);
        for started in self.scheduler.take_started() {
            if let Some(active) = self.requests.get_mut(&started.arrival) {
                active.cached_tokens = started.cached_tokens;
                self.meter.started(now.saturating_sub(active.submitted_at));
            }
        }
        if planned {
            self.steps += 1;
            (plan.epoch, plan.step) = (self.options.epoch, self.steps);
            self.meter.planned(plan.tokens.len());
            self.plans.push_back(plan);
        } else {
            self.spare = plan;
        }
        self.meter.observe(&self.scheduler);
        planned
    }

    /// The step to run after [`Self::begin_step`] returned true: the newest under way; `None` where none is.
    pub fn plan(&self) -> Option<&StepPlan> {
        self.plans.back()
    }

    /// Takes the oldest step's logits (`plan.logits_rows.len()` × `vocab_size`): scores, samples, sends.
    ///
    /// # Errors
    /// [`EngineError::LogitsCount`]; the engine cannot go on.
    pub fn finish_step(&mut self, logits: &mut [f32], now: Duration) -> Result<(), EngineError> {
        let plan = self.plans.pop_front().unwrap_or_default();
        let expected = plan.logits_rows.len() * self.info.vocab_size;
        self.spare = plan;
        if logits.len() != expected {
            return Err(EngineError::LogitsCount { expected, actual: logits.len() });
        }
        let uses = self.scheduler.complete();
        let draws = self.samplers.draw(&uses, logits, self.info.vocab_size, &self.requests);
        for (used, draw) in uses.into_iter().zip(draws) {
            let row = &logits[used.row * self.info.vocab_size..(used.row + 1) * self.info.vocab_size];
            self.use_logits(used, row, draw, now);
        }
        Ok(())
    }

    /// Begins a step, runs the model and finishes it. Returns whether there was one.
    ///
    /// # Errors
    /// [`EngineError::Model`] or [`EngineError::LogitsCount`]; the engine cannot go on.
    pub fn step(&mut self, model: &mut dyn StepModel, logits: &mut Vec<f32>, now: Duration) -> Result<bool, EngineError> {
        if !self.begin_step(now) {
            return Ok(false);
        }
        let Some(plan) = self.plan() else { return Ok(false) };
        model.step(plan, logits)?;
        self.finish_step(logits, now)?;
        Ok(true)
    }

    /// Tells `updates` of the prefix cache's changes from now on, beginning with everything it knows.
    pub fn listen(&mut self, updates: Sender<PrefixUpdate>) {
        self.listeners.add(updates);
    }

    /// Hands the changes since the last call to whoever listens. Returns whether someone waits for room in its channel.
    pub fn tell_listeners(&mut self) -> bool {
        self.listeners.tell(self.scheduler.blocks_mut());
        self.listeners.any_behind()
    }

    /// Tokens drawn so far.
    pub fn generated_tokens(&self) -> u64 {
        self.generated_tokens
    }

    /// Whether no request is left, events that wait for room in their channels included.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.leaving.is_empty()
    }

    /// Ends every request with a retryable failure.
    pub fn fail_all(&mut self, reason: &str) {
        for (_, mut active) in std::mem::take(&mut self.requests) {
            for &id in active.sequences() {
                self.scheduler.remove(id);
            }
            active.outlet.send(EngineEvent::Failed { reason: reason.into(), retryable: true });
        }
    }

    /// The scheduler, for its counts and checks.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Sets the gauges to nothing: the engine has ended.
    pub(crate) fn clear_gauges(&self) {
        self.meter.clear();
    }

    /// Adds a step's time to the metrics.
    pub(crate) fn count_time(&self, model: Duration, other: Duration) {
        self.meter.step_time(model, other);
    }

    /// Hands out events that waited for room; forgets who went away; tells the scheduler who cannot go on.
    fn sweep(&mut self) {
        self.leaving.retain_mut(|outlet| {
            outlet.flush();
            outlet.is_stalled() && !outlet.is_closed()
        });
        let mut closed = Vec::new();
        for (&arrival, active) in &mut self.requests {
            active.outlet.flush();
            if active.outlet.is_closed() {
                closed.push(arrival);
            } else {
                self.scheduler.set_stalled(arrival, active.outlet.is_stalled());
            }
        }
        for arrival in closed {
            tracing::debug!(request = %self.requests[&arrival].request().id, "client went away");
            self.remove(arrival);
        }
    }

    fn use_logits(&mut self, used: LogitsUse, row: &[f32], draw: Draw, now: Duration) {
        let arrival = used.id.arrival;
        // Another answer of the request may have failed on an earlier row.
        let Some(active) = self.requests.get_mut(&arrival) else { return };
        let next = match (used.purpose, draw) {
            (LogitsPurpose::Score { position }, _) => active.score(self.samplers.scoring(), row, position),
            (LogitsPurpose::Sample, Some(sampled)) => {
                self.generated_tokens += 1;
                sampled.and_then(|sampled| active.accept(sampled, used.id))
            }
            // There was no request to draw for.
            (LogitsPurpose::Sample, None) => return,
        };
        match next {
            Ok(Next::Scored) => {}
            Ok(Next::Continue(token)) => self.scheduler.append(used.id, token),
            Ok(Next::AnswerEnded) => self.scheduler.remove(used.id),
            Ok(Next::RequestEnded) => {
                self.retry.finished(now);
                self.end(arrival, used.id);
            }
            Err(reason) => {
                tracing::warn!(request = %active.request().id, %reason, "request failed");
                active.outlet.send(EngineEvent::Failed { reason, retryable: false });
                self.end(arrival, used.id);
            }
        }
    }

    /// Removes an ended request and keeps its outlet until it is empty.
    fn end(&mut self, arrival: u64, id: SequenceId) {
        debug_assert_eq!(arrival, id.arrival);
        if let Some(active) = self.remove(arrival) {
            self.leave(active.outlet);
        }
    }

    fn leave(&mut self, outlet: Outlet) {
        if outlet.is_stalled() {
            self.leaving.push(outlet);
        }
    }

    fn remove(&mut self, arrival: u64) -> Option<Active> {
        let active = self.requests.remove(&arrival)?;
        for &id in active.sequences() {
            self.scheduler.remove(id);
        }
        self.scheduler.set_stalled(arrival, false);
        Some(active)
    }
}
