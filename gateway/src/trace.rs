//! The span of one request for answers, with the names of OpenTelemetry's conventions for generative AI.
//!
//! It begins when the request is understood and ends with the last byte of its answer; what workers do for it is below it.
//! Texts of prompts and answers are never part of it.

use std::time::Duration;

use forge_cluster::tracing::{set_attribute, set_error, set_parent, set_texts};
use tracing::Span;

/// What is known of a request when it goes to the engines.
pub(crate) struct Asked<'a> {
    /// `traceparent` of the client, or empty.
    pub(crate) traceparent: &'a str,
    /// `chat` or `text_completion`.
    pub(crate) operation: &'static str,
    /// Served name.
    pub(crate) model: &'a str,
    /// `chatcmpl-…` or `cmpl-…`.
    pub(crate) id: &'a str,
    /// Answers per prompt.
    pub(crate) choices: u32,
    /// Most tokens of an answer.
    pub(crate) max_tokens: u32,
    /// As the sampler takes it.
    pub(crate) temperature: f32,
    /// As the sampler takes it.
    pub(crate) top_p: f32,
}

/// Begins the span.
pub(crate) fn begin(asked: &Asked<'_>) -> Span {
    let span = tracing::info_span!("generate", otel.name = format!("{} {}", asked.operation, asked.model), otel.kind = "server");
    set_parent(&span, asked.traceparent);
    set_attribute(&span, "gen_ai.operation.name", asked.operation);
    set_attribute(&span, "gen_ai.provider.name", "forge");
    set_attribute(&span, "gen_ai.request.model", asked.model.to_owned());
    set_attribute(&span, "gen_ai.response.model", asked.model.to_owned());
    set_attribute(&span, "gen_ai.response.id", asked.id.to_owned());
    set_attribute(&span, "gen_ai.request.choice.count", i64::from(asked.choices));
    set_attribute(&span, "gen_ai.request.max_tokens", i64::from(asked.max_tokens));
    set_attribute(&span, "gen_ai.request.temperature", f64::from(asked.temperature));
    set_attribute(&span, "gen_ai.request.top_p", f64::from(asked.top_p));
    span
}

/// What came of it.
pub(crate) struct Answered {
    /// Of all prompts.
    pub(crate) prompt_tokens: usize,
    /// Of all answers.
    pub(crate) generated_tokens: u64,
    /// One per answer: stop, length, abort or error.
    pub(crate) finish_reasons: Vec<String>,
    /// From the request to its first token, if there was one.
    pub(crate) first_token: Option<Duration>,
    /// It ended with an error of ours.
    pub(crate) is_failed: bool,
}

/// Ends what [`begin`] began; the span itself ends with its last handle.
pub(crate) fn end(span: &Span, answered: Answered) {
    let count = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    set_attribute(span, "gen_ai.usage.input_tokens", count(answered.prompt_tokens as u64));
    set_attribute(span, "gen_ai.usage.output_tokens", count(answered.generated_tokens));
    set_texts(span, "gen_ai.response.finish_reasons", answered.finish_reasons);
    if let Some(first_token) = answered.first_token {
        set_attribute(span, "forge.time_to_first_token_s", first_token.as_secs_f64());
    }
    if answered.is_failed {
        set_error(span, "the request failed");
    }
}
