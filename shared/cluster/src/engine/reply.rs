//! What an engine answers, between its wire form and [`EngineEvent`], [`AdmitError`], [`ModelCard`], [`EngineStatus`].
//!
//! Invariant: what the `*_to_wire` functions write, the `*_from_wire` functions read back unchanged; a message without its
//! oneof, as a newer version would send, is refused and never taken for another one.

use std::sync::Arc;

use forge_proto::engine as wire;
use forge_shared::generate::{AdmitError, EngineEvent, FinishReason, InvalidParam, Logprobs, TokenEvent, TokenLogprob, Usage};
use forge_shared::link::{DefaultSampling, EngineStatus, ModelCard};

use super::WireError;
use super::request::{MAX_TOKENS, at_most, finite};

/// Largest message with events: log-probabilities of a whole prompt are one event.
pub const MAX_REPLY_BYTES: usize = 128 << 20;
/// Most events of one message.
pub const MAX_EVENTS: usize = 4096;
const MAX_TOP: usize = 64;
const MAX_NAMES: usize = 256;
const MAX_NAME_BYTES: usize = 1024;

/// What a worker says about a request.
#[derive(Debug, Clone, PartialEq)]
pub enum EngineReply {
    /// It will be answered, under these numerics.
    Admitted {
        /// Of the engine that answers.
        numerics_id: String,
    },
    /// It will not.
    Refused(AdmitError),
    /// Part of the answer.
    Event(EngineEvent),
}

/// What a worker says about a replica.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplicaCard {
    /// What is served.
    pub card: Arc<ModelCard>,
    /// Hex of SHA-256 over the model's text parts (`ModelText`).
    pub text_digest: String,
    /// Token slots of a KV block.
    pub block_size: usize,
}

/// For the wire.
pub fn reply_to_wire(reply: &EngineReply) -> wire::EngineEvent {
    use wire::engine_event::Event as Wire;
    let event = match reply {
        EngineReply::Admitted { numerics_id } => Wire::Admitted(wire::Admitted { numerics_id: numerics_id.clone() }),
        EngineReply::Refused(error) => Wire::Refused(refusal_to_wire(error)),
        EngineReply::Event(EngineEvent::PromptLogprobs(logprobs)) => {
            Wire::PromptLogprobs(wire::PromptLogprobs { logprobs: logprobs.iter().map(logprobs_to_wire).collect() })
        }
        EngineReply::Event(EngineEvent::Token(token)) => Wire::Token(wire::Token {
            choice: token.choice,
            position: token.position,
            token: token.token,
            text: token.text.clone(),
            logprobs: token.logprobs.as_ref().map(logprobs_to_wire),
        }),
        EngineReply::Event(EngineEvent::Finished { choice, reason, text }) => {
            Wire::Finished(wire::Finished { choice: *choice, text: text.clone(), reason: Some(reason_to_wire(reason)) })
        }
        EngineReply::Event(EngineEvent::Done(usage)) => Wire::Done(wire::Done {
            prompt_tokens: usage.prompt_tokens,
            cached_prompt_tokens: usage.cached_prompt_tokens,
            completion_tokens: usage.completion_tokens,
        }),
        EngineReply::Event(EngineEvent::Failed { reason, retryable }) => {
            Wire::Failed(wire::Failed { reason: reason.clone(), retryable: *retryable })
        }
    };
    wire::EngineEvent { event: Some(event) }
}

/// From the wire.
///
/// # Errors
/// [`WireError`] naming the first field that cannot be used.
pub fn reply_from_wire(message: wire::EngineEvent) -> Result<EngineReply, WireError> {
    use wire::engine_event::Event as Wire;
    let event = match message.event.ok_or(WireError::Missing { field: "event" })? {
        Wire::Admitted(admitted) => return Ok(EngineReply::Admitted { numerics_id: admitted.numerics_id }),
        Wire::Refused(refused) => return Ok(EngineReply::Refused(refusal_from_wire(refused)?)),
        Wire::PromptLogprobs(prompt) => {
            at_most("prompt_logprobs", prompt.logprobs.len(), MAX_TOKENS)?;
            EngineEvent::PromptLogprobs(prompt.logprobs.into_iter().map(logprobs_from_wire).collect::<Result<_, _>>()?)
        }
        Wire::Token(token) => EngineEvent::Token(TokenEvent {
            choice: token.choice,
            position: token.position,
            token: token.token,
            text: token.text,
            logprobs: token.logprobs.map(logprobs_from_wire).transpose()?,
        }),
        Wire::Finished(finished) => EngineEvent::Finished {
            choice: finished.choice,
            reason: reason_from_wire(finished.reason.ok_or(WireError::Missing { field: "finished.reason" })?)?,
            text: finished.text,
        },
        Wire::Done(done) => EngineEvent::Done(Usage {
            prompt_tokens: done.prompt_tokens,
            cached_prompt_tokens: done.cached_prompt_tokens,
            completion_tokens: done.completion_tokens,
        }),
        Wire::Failed(failed) => EngineEvent::Failed { reason: failed.reason, retryable: failed.retryable },
    };
    Ok(EngineReply::Event(event))
}

fn reason_to_wire(reason: &FinishReason) -> wire::finished::Reason {
    match reason {
        FinishReason::EndOfText => wire::finished::Reason::EndOfText(true),
        FinishReason::StopToken(token) => wire::finished::Reason::StopToken(*token),
        FinishReason::StopString(text) => wire::finished::Reason::StopString(text.clone()),
        FinishReason::Length => wire::finished::Reason::Length(true),
    }
}

fn reason_from_wire(reason: wire::finished::Reason) -> Result<FinishReason, WireError> {
    match reason {
        wire::finished::Reason::EndOfText(true) => Ok(FinishReason::EndOfText),
        wire::finished::Reason::StopToken(token) => Ok(FinishReason::StopToken(token)),
        wire::finished::Reason::StopString(text) => Ok(FinishReason::StopString(text)),
        wire::finished::Reason::Length(true) => Ok(FinishReason::Length),
        wire::finished::Reason::EndOfText(false) | wire::finished::Reason::Length(false) => {
            Err(WireError::Value { field: "finished.reason", reason: "a reason that does not hold".into() })
        }
    }
}

fn logprobs_to_wire(logprobs: &Logprobs) -> wire::Logprobs {
    let one = |logprob: &TokenLogprob| wire::TokenLogprob { token: logprob.token, logprob: logprob.logprob };
    wire::Logprobs { chosen: Some(one(&logprobs.chosen)), top: logprobs.top.iter().map(one).collect() }
}

fn logprobs_from_wire(logprobs: wire::Logprobs) -> Result<Logprobs, WireError> {
    // A token outside of a filter has the log-probability minus infinity; only NaN says nothing.
    let one = |logprob: wire::TokenLogprob| match logprob.logprob.is_nan() {
        true => Err(WireError::Value { field: "logprob", reason: "NaN".into() }),
        false => Ok(TokenLogprob { token: logprob.token, logprob: logprob.logprob }),
    };
    at_most("top", logprobs.top.len(), MAX_TOP)?;
    Ok(Logprobs {
        chosen: one(logprobs.chosen.ok_or(WireError::Missing { field: "chosen" })?)?,
        top: logprobs.top.into_iter().map(one).collect::<Result<_, _>>()?,
    })
}

fn refusal_to_wire(error: &AdmitError) -> wire::Refused {
    use wire::refused::Reason;
    let reason = match error {
        AdmitError::PromptTooLong { prompt_tokens, max_model_len } => {
            Reason::PromptTooLong(wire::PromptTooLong { prompt_tokens: *prompt_tokens as u64, max_model_len: *max_model_len as u64 })
        }
        AdmitError::NeverFits { needed_blocks, total_blocks } => {
            Reason::NeverFits(wire::NeverFits { needed_blocks: *needed_blocks as u64, total_blocks: *total_blocks as u64 })
        }
        AdmitError::UnknownToken { token, vocab_size } => {
            Reason::UnknownToken(wire::UnknownToken { token: *token, vocab_size: *vocab_size as u64 })
        }
        AdmitError::Invalid(InvalidParam { field, expected, actual }) => {
            Reason::Invalid(wire::InvalidParam { field: (*field).into(), expected: expected.clone(), actual: actual.clone() })
        }
        AdmitError::Overloaded { waiting, retry_after_s } => {
            Reason::Overloaded(wire::Overloaded { waiting: *waiting as u64, retry_after_s: *retry_after_s })
        }
        AdmitError::Unavailable { reason } => Reason::Unavailable(reason.clone()),
    };
    wire::Refused { reason: Some(reason) }
}

fn refusal_from_wire(refused: wire::Refused) -> Result<AdmitError, WireError> {
    use wire::refused::Reason;
    Ok(match refused.reason.ok_or(WireError::Missing { field: "refused.reason" })? {
        Reason::PromptTooLong(long) => AdmitError::PromptTooLong {
            prompt_tokens: size("prompt_tokens", long.prompt_tokens)?,
            max_model_len: size("max_model_len", long.max_model_len)?,
        },
        Reason::NeverFits(fits) => AdmitError::NeverFits {
            needed_blocks: size("needed_blocks", fits.needed_blocks)?,
            total_blocks: size("total_blocks", fits.total_blocks)?,
        },
        Reason::UnknownToken(unknown) => {
            AdmitError::UnknownToken { token: unknown.token, vocab_size: size("vocab_size", unknown.vocab_size)? }
        }
        Reason::Invalid(invalid) => {
            AdmitError::Invalid(InvalidParam { field: known_param(&invalid.field)?, expected: invalid.expected, actual: invalid.actual })
        }
        Reason::Overloaded(overloaded) => {
            AdmitError::Overloaded { waiting: size("waiting", overloaded.waiting)?, retry_after_s: overloaded.retry_after_s }
        }
        Reason::Unavailable(reason) => AdmitError::Unavailable { reason },
    })
}

/// Parameters that an engine may refuse, by the names the API gives them.
const PARAMS: [&str; 22] = [
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "top_logprobs",
    "logprobs",
    "prompt_logprobs",
    "stop",
    "stop_token_ids",
    "max_tokens",
    "min_tokens",
    "n",
    "best_of",
    "seed",
    "prompt",
    "choices",
    "emitted_tokens",
    "priority",
];

fn known_param(name: &str) -> Result<&'static str, WireError> {
    let unknown =
        || WireError::Value { field: "invalid.field", reason: format!("{:?} is no parameter", name.chars().take(80).collect::<String>()) };
    PARAMS.into_iter().find(|param| *param == name).ok_or_else(unknown)
}

/// For the wire.
pub fn card_to_wire(replica: &ReplicaCard) -> wire::Card {
    let ReplicaCard { card, text_digest, block_size } = replica;
    let sampling = card.default_sampling;
    wire::Card {
        name: card.name.clone(),
        names: card.names.clone(),
        max_model_len: card.max_model_len as u64,
        vocab_size: card.vocab_size as u64,
        numerics_id: card.numerics_id.clone(),
        created_s: card.created_s,
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        text_digest: text_digest.clone(),
        block_size: *block_size as u32,
        unlisted_names: card.unlisted_names.clone(),
    }
}

/// From the wire.
///
/// # Errors
/// [`WireError`] naming the first field that cannot be used.
pub fn card_from_wire(card: wire::Card) -> Result<ReplicaCard, WireError> {
    at_most("names", card.names.len(), MAX_NAMES)?;
    at_most("unlisted_names", card.unlisted_names.len(), MAX_NAMES)?;
    let longest =
        card.names.iter().chain(&card.unlisted_names).chain([&card.name, &card.numerics_id, &card.text_digest]).map(String::len).max();
    at_most("name", longest.unwrap_or(0), MAX_NAME_BYTES)?;
    let sampling = |field, value: Option<f32>| value.map(|value| finite(field, value)).transpose();
    Ok(ReplicaCard {
        card: Arc::new(ModelCard {
            name: card.name,
            names: card.names,
            unlisted_names: card.unlisted_names,
            max_model_len: size("max_model_len", card.max_model_len)?,
            vocab_size: size("vocab_size", card.vocab_size)?,
            numerics_id: card.numerics_id,
            created_s: card.created_s,
            default_sampling: DefaultSampling {
                temperature: sampling("temperature", card.temperature)?,
                top_k: card.top_k,
                top_p: sampling("top_p", card.top_p)?,
                min_p: sampling("min_p", card.min_p)?,
                repetition_penalty: sampling("repetition_penalty", card.repetition_penalty)?,
            },
        }),
        text_digest: card.text_digest,
        block_size: size("block_size", card.block_size.into())?,
    })
}

/// For the wire.
pub fn status_to_wire(status: &EngineStatus) -> wire::Status {
    wire::Status {
        ready: status.ready,
        reason: status.reason.clone(),
        running: status.running as u64,
        waiting: status.waiting as u64,
        kv_blocks_used: status.kv_blocks_used as u64,
        kv_blocks_total: status.kv_blocks_total as u64,
        restarts: status.restarts,
    }
}

/// From the wire.
///
/// # Errors
/// [`WireError`] naming the first field that cannot be used.
pub fn status_from_wire(status: wire::Status) -> Result<EngineStatus, WireError> {
    Ok(EngineStatus {
        ready: status.ready,
        reason: status.reason,
        running: size("running", status.running)?,
        waiting: size("waiting", status.waiting)?,
        kv_blocks_used: size("kv_blocks_used", status.kv_blocks_used)?,
        kv_blocks_total: size("kv_blocks_total", status.kv_blocks_total)?,
        restarts: status.restarts,
    })
}

/// A count: beyond 2^48 it is nonsense, and sums of such counts would overflow.
fn size(field: &'static str, value: u64) -> Result<usize, WireError> {
    const LIMIT: u64 = 1 << 48;
    match usize::try_from(value) {
        Ok(size) if value <= LIMIT => Ok(size),
        _ => Err(WireError::Value { field, reason: format!("{value} is no sensible count") }),
    }
}
