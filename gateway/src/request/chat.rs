//! The body of `POST /v1/chat/completions`.

use serde_json::{Map, Value};

use super::common::{Common, bounded_text};
use super::fields::{CHAT, Fields, wrong_value};
use super::messages::messages;
use crate::config::RequestLimits;
use crate::error::ApiError;

/// A chat request, checked as far as it can be without the model.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// What it shares with completions.
    pub common: Common,
    /// The chat, and how to render it.
    pub chat: Chat,
    /// Most tokens per answer; `None` is what the context leaves.
    pub max_tokens: Option<u32>,
    /// Routes to where the prefix is cached.
    pub prompt_cache_key: Option<String>,
}

/// Messages and how they become a prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Chat {
    /// For the template: objects with role, content and maybe name.
    pub messages: Vec<Value>,
    /// End with the start of an assistant message.
    pub add_generation_prompt: bool,
    /// Go on inside the last message.
    pub continue_final_message: bool,
    /// Add BOS/EOS around the rendered text.
    pub add_special_tokens: bool,
    /// Further variables of the template.
    pub variables: Map<String, Value>,
}

impl Chat {
    /// Takes the fields that make a chat; `value` is that of `messages`.
    pub(crate) fn take(fields: &mut Fields, value: Value, limits: &RequestLimits) -> Result<Self, ApiError> {
        let continue_final_message = fields.bool("continue_final_message")?.unwrap_or(false);
        let chat = Chat {
            messages: messages(value, limits.messages)?,
            add_generation_prompt: fields.bool("add_generation_prompt")?.unwrap_or(true),
            continue_final_message,
            add_special_tokens: fields.bool("add_special_tokens")?.unwrap_or(false),
            variables: fields.take("chat_template_kwargs").map(variables).transpose()?.unwrap_or_default(),
        };
        if chat.continue_final_message && chat.add_generation_prompt {
            return Err(ApiError::invalid("continue_final_message", "continue_final_message needs add_generation_prompt: false"));
        }
        let last_role = chat.messages.last().and_then(|message| message["role"].as_str());
        if chat.continue_final_message && last_role != Some("assistant") {
            return Err(ApiError::invalid("continue_final_message", "continue_final_message needs an assistant message at the end"));
        }
        Ok(chat)
    }
}

/// Reads a chat request with the default limits. Takes any bytes.
///
/// # Errors
/// [`ApiError::Invalid`] naming the first field that is wrong, unknown or not supported.
pub fn parse_chat_request(body: &[u8]) -> Result<ChatRequest, ApiError> {
    parse_chat_request_with(body, &RequestLimits::default())
}

/// Reads a chat request. Takes any bytes.
///
/// # Errors
/// [`ApiError::Invalid`] naming the first field that is wrong, unknown or not supported.
pub fn parse_chat_request_with(body: &[u8], limits: &RequestLimits) -> Result<ChatRequest, ApiError> {
    let mut fields = Fields::open(&CHAT, body, limits.json_values)?;
    let value = fields.take("messages").ok_or_else(|| ApiError::invalid("messages", "messages is missing"))?;
    let mut request = ChatRequest {
        chat: Chat::take(&mut fields, value, limits)?,
        max_tokens: max_tokens(&mut fields)?,
        prompt_cache_key: bounded_text(&mut fields, "prompt_cache_key", 0, 256)?,
        common: Common::take(&mut fields, limits)?,
    };
    let logprobs = fields.bool("logprobs")?.unwrap_or(false);
    let top_logprobs = fields.count("top_logprobs", 0, 20)?;
    if !logprobs && top_logprobs.is_some_and(|count| count > 0) {
        return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs: true"));
    }
    request.common.sampling.logprobs = logprobs.then(|| top_logprobs.unwrap_or(0));
    fields.finish()?;
    Ok(request)
}

fn max_tokens(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let new = fields.count("max_completion_tokens", 1, u32::MAX)?;
    let old = fields.count("max_tokens", 1, u32::MAX)?;
    match (new, old) {
        (Some(new), Some(old)) if new != old => {
            Err(ApiError::invalid("max_tokens", "max_tokens and max_completion_tokens differ; send one of them"))
        }
        (new, old) => Ok(new.or(old)),
    }
}

/// Variables for a template: scalars only, since a template may loop over what it is given.
fn variables(value: Value) -> Result<Map<String, Value>, ApiError> {
    let name = "chat_template_kwargs";
    let Value::Object(map) = value else {
        return Err(wrong_value(name, "an object", &value));
    };
    let identifier = |key: &str| key.len() <= 64 && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let scalar = |value: &Value| match value {
        Value::String(text) => text.len() <= 1024,
        Value::Array(_) | Value::Object(_) => false,
        _ => true,
    };
    if map.len() > 16 || !map.iter().all(|(key, value)| identifier(key) && scalar(value)) {
        let message = "chat_template_kwargs must have at most 16 entries: names of letters, digits and _, \
                       values strings of at most 1024 bytes, numbers or booleans";
        return Err(ApiError::invalid(name, message));
    }
    Ok(map)
}
