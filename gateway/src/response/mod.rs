//! The shapes of answers, as OpenAI's and vLLM's clients read them.
//!
//! Plain data: nothing here waits or decides.

pub(crate) mod chat;
pub(crate) mod completion;
pub(crate) mod logprobs;

use forge_shared::generate::{FinishReason, Usage};
use serde::Serialize;
use serde_json::Value;

/// What every object of an answer begins with.
#[derive(Debug, Clone, Serialize)]
pub struct Head {
    /// `chatcmpl-…` or `cmpl-…`.
    pub id: String,
    /// Kind of object.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// Name of the model.
    pub model: String,
    /// Equal where answers are reproducible.
    pub system_fingerprint: String,
}

/// Token counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct UsageBody {
    /// Tokens of all prompts.
    pub prompt_tokens: u32,
    /// Tokens of all answers.
    pub completion_tokens: u32,
    /// Their sum.
    pub total_tokens: u32,
    /// Of the prompt.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// Where prompt tokens came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PromptTokensDetails {
    /// Taken from the prefix cache.
    pub cached_tokens: u32,
}

impl From<Usage> for UsageBody {
    fn from(usage: Usage) -> Self {
        UsageBody {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: usage.cached_prompt_tokens },
        }
    }
}

/// `usage` of a chunk: left out unless asked for; null until the last chunk.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(untagged)]
pub(crate) enum ChunkUsage {
    Null,
    Whole(UsageBody),
}

/// OpenAI's `finish_reason`.
pub(crate) fn finish_reason(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        FinishReason::EndOfText | FinishReason::StopToken(_) | FinishReason::StopString(_) => "stop",
    }
}

/// vLLM's `stop_reason`: the stop string or token that matched.
pub(crate) fn stop_reason(reason: &FinishReason) -> Option<Value> {
    match reason {
        FinishReason::StopToken(token) => Some(Value::from(*token)),
        FinishReason::StopString(text) => Some(Value::from(text.as_str())),
        FinishReason::EndOfText | FinishReason::Length => None,
    }
}

/// JSON of an object of ours.
pub(crate) fn to_json(value: &impl Serialize) -> String {
    // Serializing our own structs into a string cannot fail: no map has keys other than strings.
    serde_json::to_string(value).unwrap_or_else(|error| format!("{{\"error\":{{\"message\":\"{error}\"}}}}"))
}
