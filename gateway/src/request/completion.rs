//! The body of `POST /v1/completions`.

use serde_json::Value;

use super::common::Common;
use super::fields::{COMPLETION, Fields, wrong_value};
use super::json::type_name;
use super::sampling::{token_id, too_many};
use crate::config::RequestLimits;
use crate::error::ApiError;

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Text to be cut into tokens.
    Text(String),
    /// Tokens as they are.
    Tokens(Vec<u32>),
}

/// A completion request, checked as far as it can be without the model.
#[derive(Debug, Clone, PartialEq)]
pub struct CompletionRequest {
    /// What it shares with chats.
    pub common: Common,
    /// At least one.
    pub prompts: Vec<Prompt>,
    /// Begin every answer with its prompt.
    pub echo: bool,
    /// Most tokens per answer.
    pub max_tokens: u32,
    /// Add BOS/EOS around text prompts.
    pub add_special_tokens: bool,
}

/// Reads a completion request. Takes any bytes.
///
/// # Errors
/// [`ApiError::Invalid`] naming the first field that is wrong, unknown or not supported.
pub fn parse_completion_request(body: &[u8], limits: &RequestLimits) -> Result<CompletionRequest, ApiError> {
    let mut fields = Fields::open(&COMPLETION, body, limits.json_values)?;
    let prompt = fields.take("prompt").ok_or_else(|| ApiError::invalid("prompt", "prompt is missing"))?;
    let mut request = CompletionRequest {
        prompts: prompts(prompt, limits.prompts)?,
        echo: fields.bool("echo")?.unwrap_or(false),
        max_tokens: fields.count("max_tokens", 0, u32::MAX)?.unwrap_or(16),
        add_special_tokens: fields.bool("add_special_tokens")?.unwrap_or(true),
        common: Common::take(&mut fields, limits)?,
    };
    let n = request.common.n;
    if fields.count("best_of", 1, u32::MAX)?.is_some_and(|best_of| best_of != n) {
        return Err(ApiError::invalid("best_of", format!("best_of must equal n ({n}): answers are not ranked")));
    }
    if request.max_tokens == 0 && !request.echo {
        return Err(ApiError::invalid("max_tokens", "max_tokens must be at least 1; 0 only with echo: true"));
    }
    let choices = request.prompts.len() * n as usize;
    if choices > limits.choices {
        let message = format!("{} prompts × n {n} are {choices} answers; at most {} are allowed", request.prompts.len(), limits.choices);
        return Err(ApiError::invalid("n", message));
    }
    let logprobs = fields.count("logprobs", 0, 20)?;
    request.common.sampling.logprobs = logprobs;
    // Without tokens to generate the engine has only the prompt to score.
    let scores_prompt = request.echo && (logprobs.is_some() || request.max_tokens == 0);
    request.common.sampling.prompt_logprobs = scores_prompt.then(|| logprobs.unwrap_or(0));
    fields.finish()?;
    Ok(request)
}

fn prompts(value: Value, most: usize) -> Result<Vec<Prompt>, ApiError> {
    const EXPECTED: &str = "a string, a list of strings, a list of token ids, or a list of lists of token ids";
    let list = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(list) => list,
        other => return Err(wrong_value("prompt", EXPECTED, &other)),
    };
    match list.first() {
        None => return Err(ApiError::invalid("prompt", "prompt is an empty list")),
        Some(Value::Number(_)) => return Ok(vec![Prompt::Tokens(token_ids(&list, "prompt")?)]),
        Some(_) if list.len() > most => return Err(too_many("prompt", most, list.len())),
        Some(_) => {}
    }
    let all_text = list[0].is_string();
    let prompt = |(index, value): (usize, Value)| {
        let path = format!("prompt[{index}]");
        match value {
            Value::String(text) if all_text => Ok(Prompt::Text(text)),
            Value::Array(ids) if !all_text => Ok(Prompt::Tokens(token_ids(&ids, &path)?)),
            other => Err(ApiError::invalid(path, format!("prompt must be {EXPECTED}, got {} at {index}", type_name(&other)))),
        }
    };
    list.into_iter().enumerate().map(prompt).collect()
}

/// A list of token ids.
pub(crate) fn token_ids(list: &[Value], path: &str) -> Result<Vec<u32>, ApiError> {
    list.iter()
        .enumerate()
        .map(|(index, id)| token_id(id).ok_or_else(|| wrong_value(&format!("{path}[{index}]"), "a token id", id)))
        .collect()
}
