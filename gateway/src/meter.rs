//! Metrics and rate limits of one request.
//!
//! Invariant: however the request ends, dropping its meter replaces its rate reservation by what it used and counts
//! every answer that had not ended, as aborted or failed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forge_cluster::tracing::trace_id;
use forge_shared::generate::{FinishReason, Usage};
use forge_shared::ids::RequestId;
use forge_shared::telemetry::{FinishLabel, Metrics};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::Histogram;
use tracing::Span;

use crate::error::ApiError;
use crate::gateway::GatewayState;
use crate::keys::Tenant;
use crate::models::Model;
use crate::trace::{self, Answered};

/// What the meter knows of an answer.
#[derive(Debug, Clone, Default)]
struct AnswerMeter {
    tokens: u32,
    last_token: Option<Instant>,
    finish_reason: Option<&'static str>,
}

/// Whose request it is, and at which model.
pub(crate) struct Account {
    pub(crate) gateway: Arc<GatewayState>,
    pub(crate) model: Arc<Model>,
    pub(crate) tenant: Tenant,
    /// Tokens set aside in the tenant's rate limit.
    pub(crate) reserved_tokens: u64,
    /// For the log line at the end.
    pub(crate) request_id: RequestId,
    /// The request's trace.
    pub(crate) span: Span,
}

/// Metrics and rate limits of one request.
pub(crate) struct Meter {
    account: Account,
    arrived: Instant,
    prompt_tokens: usize,
    answers: Vec<AnswerMeter>,
    accepted: bool,
    first_token: Option<Duration>,
    failed: bool,
    cached_tokens: u32,
    /// Handles of what is counted per token, looked up once.
    tokens: Counter,
    time_to_first_token_s: Histogram,
    inter_token_latency_s: Histogram,
}

impl Meter {
    pub(crate) fn new(account: Account, arrived: Instant, answers: usize) -> Self {
        let (metrics, label) = (&account.gateway.metrics, &account.model.label);
        Meter {
            tokens: metrics.generation_tokens.get_or_create_owned(label),
            time_to_first_token_s: metrics.time_to_first_token_s.get_or_create_owned(label),
            inter_token_latency_s: metrics.inter_token_latency_s.get_or_create_owned(label),
            account,
            arrived,
            prompt_tokens: 0,
            answers: vec![AnswerMeter::default(); answers],
            accepted: false,
            first_token: None,
            failed: false,
            cached_tokens: 0,
        }
    }

    /// Answers it counts.
    pub(crate) fn answers(&self) -> usize {
        self.answers.len()
    }

    /// The request ends with an error.
    pub(crate) fn failed(&mut self) {
        self.failed = true;
    }

    fn metrics(&self) -> &Metrics {
        &self.account.gateway.metrics
    }

    pub(crate) fn refused(&mut self, error: &ApiError) {
        if matches!(error, ApiError::Overloaded { .. }) {
            self.metrics().requests_rejected.get_or_create(&self.account.model.label).inc();
        }
    }

    pub(crate) fn accepted(&mut self, prompt_tokens: usize) {
        self.accepted = true;
        self.prompt_tokens = prompt_tokens;
        let metrics = self.metrics();
        metrics.requests_in_progress.get_or_create(&self.account.model.label).inc();
        metrics.prompt_tokens.get_or_create(&self.account.model.label).inc_by(prompt_tokens as u64);
        metrics.request_prompt_tokens.get_or_create(&self.account.model.label).observe(prompt_tokens as f64);
    }

    pub(crate) fn token(&mut self, index: usize) {
        let now = Instant::now();
        self.tokens.inc();
        if self.first_token.is_none() {
            let waited = now.duration_since(self.arrived);
            self.first_token = Some(waited);
            self.time_to_first_token_s.observe(waited.as_secs_f64());
        }
        let answer = &mut self.answers[index];
        answer.tokens += 1;
        if let Some(last) = answer.last_token.replace(now) {
            self.inter_token_latency_s.observe(now.duration_since(last).as_secs_f64());
        }
    }

    pub(crate) fn finished(&mut self, index: usize, reason: &FinishReason) {
        let word = if *reason == FinishReason::Length { "length" } else { "stop" };
        self.answers[index].finish_reason = Some(word);
        let tokens = f64::from(self.answers[index].tokens);
        self.metrics().request_generation_tokens.get_or_create(&self.account.model.label).observe(tokens);
        self.count_end(word);
    }

    pub(crate) fn done(&mut self, usage: Usage) {
        let label = &self.account.model.label;
        self.metrics().end_to_end_latency_s.get_or_create(label).observe(self.arrived.elapsed().as_secs_f64());
        self.cached_tokens = usage.cached_prompt_tokens;
    }

    fn count_end(&self, reason: &str) {
        let label = FinishLabel { model_name: self.account.model.label.model_name.clone(), finished_reason: reason.to_owned() };
        self.metrics().requests_finished.get_or_create(&label).inc();
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        let generated: u64 = self.answers.iter().map(|answer| u64::from(answer.tokens)).sum();
        let used = if self.accepted { self.prompt_tokens as u64 + generated } else { 0 };
        let Account { gateway, tenant, reserved_tokens, .. } = &self.account;
        gateway.rates.lock().settle(tenant.name(), *reserved_tokens, used, gateway.now());
        gateway.keys.count_tokens(tenant, used);
        let reason = if self.failed { "error" } else { "abort" };
        let reason_of = |answer: &AnswerMeter| answer.finish_reason.unwrap_or(reason).to_owned();
        trace::end(
            &self.account.span,
            Answered {
                prompt_tokens: self.prompt_tokens,
                generated_tokens: generated,
                finish_reasons: if self.accepted { self.answers.iter().map(reason_of).collect() } else { vec!["error".into()] },
                first_token: self.first_token,
                is_failed: self.failed || !self.accepted,
            },
        );
        if !self.accepted {
            return;
        }
        self.metrics().requests_in_progress.get_or_create(&self.account.model.label).dec();
        let ended = self.answers.iter().all(|answer| answer.finish_reason.is_some());
        tracing::info!(
            id = %self.account.request_id, model = %self.account.model.label.model_name, prompt_tokens = self.prompt_tokens,
            cached_tokens = self.cached_tokens, generated_tokens = generated, duration_ms = self.arrived.elapsed().as_millis(),
            outcome = if ended { "done" } else { reason }, trace = trace_id(&self.account.span), "request ended"
        );
        for _ in self.answers.iter().filter(|answer| answer.finish_reason.is_none()) {
            self.count_end(reason);
        }
    }
}
