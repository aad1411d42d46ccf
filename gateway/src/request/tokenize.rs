//! The bodies of `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.

use serde_json::Value;

use super::chat::Chat;
use super::completion::token_ids;
use super::fields::{DETOKENIZE, Fields, TOKENIZE, wrong_value};
use crate::config::RequestLimits;
use crate::error::ApiError;

/// What to cut into tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenizeInput {
    /// A text.
    Text {
        /// The text.
        prompt: String,
        /// Add BOS/EOS.
        add_special_tokens: bool,
    },
    /// A chat.
    Chat(Chat),
}

/// A tokenize request.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenizeRequest {
    /// Name of the model; `None` is the default one.
    pub model: Option<String>,
    /// What to cut.
    pub input: TokenizeInput,
    /// Also the tokens as the vocabulary writes them.
    pub return_token_strs: bool,
}

/// A detokenize request.
#[derive(Debug, Clone, PartialEq)]
pub struct DetokenizeRequest {
    /// Name of the model; `None` is the default one.
    pub model: Option<String>,
    /// Token ids.
    pub tokens: Vec<u32>,
}

/// Reads a tokenize request. Takes any bytes.
///
/// # Errors
/// [`ApiError::Invalid`] naming the first field that is wrong, unknown or not supported.
pub fn parse_tokenize_request(body: &[u8], limits: &RequestLimits) -> Result<TokenizeRequest, ApiError> {
    let mut fields = Fields::open(&TOKENIZE, body, limits.json_values)?;
    let model = fields.string("model")?;
    let return_token_strs = fields.bool("return_token_strs")?.unwrap_or(false);
    let input = match (fields.string("prompt")?, fields.take("messages")) {
        (Some(prompt), None) => {
            for name in ["add_generation_prompt", "continue_final_message", "chat_template_kwargs"] {
                if fields.take(name).is_some() {
                    return Err(ApiError::invalid(name, format!("{name} needs messages")));
                }
            }
            TokenizeInput::Text { prompt, add_special_tokens: fields.bool("add_special_tokens")?.unwrap_or(true) }
        }
        (None, Some(messages)) => TokenizeInput::Chat(Chat::take(&mut fields, messages, limits)?),
        (Some(_), Some(_)) => return Err(ApiError::invalid("prompt", "send prompt or messages, not both")),
        (None, None) => return Err(ApiError::invalid("prompt", "prompt or messages is missing")),
    };
    fields.finish()?;
    Ok(TokenizeRequest { model, input, return_token_strs })
}

/// Reads a detokenize request. Takes any bytes.
///
/// # Errors
/// [`ApiError::Invalid`] naming the first field that is wrong or unknown.
pub fn parse_detokenize_request(body: &[u8], limits: &RequestLimits) -> Result<DetokenizeRequest, ApiError> {
    let mut fields = Fields::open(&DETOKENIZE, body, limits.json_values)?;
    let model = fields.string("model")?;
    let tokens = match fields.take("tokens") {
        Some(Value::Array(list)) => token_ids(&list, "tokens")?,
        Some(other) => return Err(wrong_value("tokens", "a list of token ids", &other)),
        None => return Err(ApiError::invalid("tokens", "tokens is missing")),
    };
    fields.finish()?;
    Ok(DetokenizeRequest { model, tokens })
}
