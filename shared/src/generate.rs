//! The language between gateway and engine: what is asked for, and the events that answer it.
//!
//! It is plain data without I/O, so the same values go over an in-process channel, a wire and a journal.
//!
//! Invariant (DESIGN P1, P2): a `GenerateRequest` determines its tokens. Submitted again to another engine of
//! the same numerics id with the tokens emitted so far, it goes on exactly where it stopped.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::RequestId;

/// Separates prefix caches of different tenants: part of every block hash.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TenantSalt(pub Arc<[u8]>);

impl TenantSalt {
    /// The salt of callers without a key.
    pub fn anonymous() -> Self {
        TenantSalt(Arc::from(&b"anonymous"[..]))
    }
}

/// One answer of a request with `n` answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// Its index; part of the sampler's counter, so answers differ under one seed.
    pub index: u32,
    /// Tokens already sent to the client by an earlier engine; replayed, not sampled and not emitted again.
    pub emitted_tokens: Vec<u32>,
}

/// A generation as the engine sees it: validated, tokenized, seeded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// For logs, cancellation and traces.
    pub id: RequestId,
    /// Whose prefix cache it may share.
    pub tenant: TenantSalt,
    /// Prompt, special tokens included; never empty.
    pub prompt_tokens: Arc<[u32]>,
    /// Answers wanted; they share the prompt's KV. Never empty.
    pub choices: Vec<Choice>,
    /// Key of the counter-based sampler.
    pub seed: u64,
    /// How to sample and when to stop.
    pub params: SamplingParams,
    /// Larger runs first; equal ones in order of arrival.
    pub priority: i32,
}

/// How to sample and when to stop. Ranges are checked by [`SamplingParams::check`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set with at least this probability; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this likely relative to the most likely; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or answer; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens in the answer.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the answer.
    pub frequency_penalty: f32,
    /// Added to logits, token id and bias.
    pub logit_bias: Vec<(u32, f32)>,
    /// Most tokens per answer, at least 1 (0 only with `prompt_logprobs`: score, do not generate).
    pub max_tokens: u32,
    /// Stop conditions are ignored before this many tokens.
    pub min_tokens: u32,
    /// Stop strings; never part of the text sent.
    pub stop: Vec<String>,
    /// Tokens that end the answer beside the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Do not stop at the model's end tokens.
    pub ignore_eos: bool,
    /// Keep special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Log-probabilities of sampled tokens, with this many alternatives.
    pub logprobs: Option<u32>,
    /// Log-probabilities of prompt tokens (echo), with this many alternatives.
    pub prompt_logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            max_tokens: 16,
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            skip_special_tokens: true,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// A parameter outside its range, by the name the API gives it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field} must be {expected}, got {actual}")]
pub struct InvalidParam {
    /// API field.
    pub field: &'static str,
    /// What is allowed.
    pub expected: String,
    /// What came.
    pub actual: String,
}

impl SamplingParams {
    /// Alternatives per token that may be asked for.
    pub const MAX_LOGPROBS: u32 = 20;
    /// Stop strings that may be given.
    pub const MAX_STOP_STRINGS: usize = 16;

    /// Checks every range; non-finite numbers are out of every range.
    ///
    /// # Errors
    /// The first parameter that is out of range.
    pub fn check(&self) -> Result<(), InvalidParam> {
        fn range(field: &'static str, value: f32, low: f32, high: f32) -> Result<(), InvalidParam> {
            if value.is_finite() && value >= low && value <= high {
                return Ok(());
            }
            Err(InvalidParam { field, expected: format!("between {low} and {high}"), actual: value.to_string() })
        }
        range("temperature", self.temperature, 0.0, 2.0)?;
        range("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        range("min_p", self.min_p, 0.0, 1.0)?;
        range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)?;
        range("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        for (_, bias) in &self.logit_bias {
            range("logit_bias", *bias, -100.0, 100.0)?;
        }
        for (field, count) in [("top_logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if let Some(count) = count
                && count > Self::MAX_LOGPROBS
            {
                return Err(InvalidParam { field, expected: format!("at most {}", Self::MAX_LOGPROBS), actual: count.to_string() });
            }
        }
        if self.stop.len() > Self::MAX_STOP_STRINGS || self.stop.iter().any(|stop| stop.is_empty() || stop.len() > 1024) {
            return Err(InvalidParam {
                field: "stop",
                expected: format!("at most {} strings of 1 to 1024 bytes", Self::MAX_STOP_STRINGS),
                actual: format!("{} strings", self.stop.len()),
            });
        }
        if self.max_tokens == 0 && self.prompt_logprobs.is_none() {
            return Err(InvalidParam { field: "max_tokens", expected: "at least 1".into(), actual: "0".into() });
        }
        if self.min_tokens > self.max_tokens {
            return Err(InvalidParam {
                field: "min_tokens",
                expected: format!("at most max_tokens ({})", self.max_tokens),
                actual: self.min_tokens.to_string(),
            });
        }
        Ok(())
    }
}

/// Log-probability of a token under the model's distribution (before temperature and filters).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Token id.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// A token's own log-probability and the most likely alternatives, most likely first, ties to the lower id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Logprobs {
    /// The token that was chosen (or stands in the prompt).
    pub chosen: TokenLogprob,
    /// As many as were asked for.
    pub top: Vec<TokenLogprob>,
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FinishReason {
    /// An end token of the model.
    EndOfText,
    /// One of `stop_token_ids`.
    StopToken(u32),
    /// One of `stop`.
    StopString(String),
    /// `max_tokens` or the model's context is used up.
    Length,
}

/// One token of one answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenEvent {
    /// `Choice::index`.
    pub choice: u32,
    /// Position in the answer, from 0; replayed tokens count.
    pub position: u32,
    /// Token id.
    pub token: u32,
    /// Text that became certain with this token: may be empty (held back) or hold several tokens' text.
    pub text: String,
    /// If asked for.
    pub logprobs: Option<Logprobs>,
}

/// Token counts of a whole request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of those, tokens whose KV came from the prefix cache.
    pub cached_prompt_tokens: u32,
    /// Tokens generated over all answers, replayed ones included.
    pub completion_tokens: u32,
}

/// What an engine sends for a request, in order; `Done` or `Failed` is the last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum EngineEvent {
    /// Log-probabilities of prompt tokens 1.. (the first has none), once, before any token.
    PromptLogprobs(Vec<Logprobs>),
    /// A token.
    Token(TokenEvent),
    /// An answer ended. `text` is what was still held back.
    Finished {
        /// `Choice::index`.
        choice: u32,
        /// Why.
        reason: FinishReason,
        /// Text held back until now; a matched stop string is not in it.
        text: String,
    },
    /// All answers ended.
    Done(Usage),
    /// The engine gave the request up. The gateway submits it again, if `retryable`.
    Failed {
        /// What happened.
        reason: String,
        /// Whether another try may succeed.
        retryable: bool,
    },
}

/// Why an engine did not admit a request. Nothing has been computed or sent.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AdmitError {
    /// Prompt and answer can never fit.
    #[error(
        "the prompt has {prompt_tokens} tokens and the model's context is {max_model_len}: shorten the prompt or start with a larger --max-model-len"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Most tokens of prompt and answer.
        max_model_len: usize,
    },
    /// The KV memory could never hold it, even alone.
    #[error(
        "the request needs {needed_blocks} KV blocks and the engine has {total_blocks}: lower max_tokens or n, or start with more --kv-memory"
    )]
    NeverFits {
        /// Blocks for prompt and answers.
        needed_blocks: usize,
        /// Blocks there are.
        total_blocks: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        token: u32,
        /// Ids there are.
        vocab_size: usize,
    },
    /// A sampling parameter out of range.
    #[error(transparent)]
    Invalid(#[from] InvalidParam),
    /// The queue is full.
    #[error("the engine's queue is full ({waiting} requests waiting): retry in {retry_after_s} s")]
    Overloaded {
        /// Requests waiting.
        waiting: usize,
        /// When to come back.
        retry_after_s: u32,
    },
    /// No engine can answer now: loading, restarting or draining.
    #[error("the model cannot answer now: {reason}")]
    Unavailable {
        /// Why.
        reason: String,
    },
}
