//! From a checked request to tokens: chat template, tokenizer, context bound.
//!
//! Long texts are worked on a thread of their own, as many at once as there are processors; nothing here blocks the
//! threads that stream.

use std::sync::Arc;
use std::time::Duration;

use forge_text::ChatRender;

use crate::error::ApiError;
use crate::gateway::GatewayState;
use crate::models::Model;
use crate::request::{Chat, Prompt};

/// Bytes up to which work is done in place: well under a millisecond.
const IN_PLACE_BYTES: usize = 16 << 10;

/// A prompt as tokens.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Prepared {
    pub(crate) tokens: Arc<[u32]>,
    /// The text as it was sent, if it was text.
    pub(crate) text: Option<String>,
}

/// Runs `work` in place if it is small, else on a thread, within the bound on preparation.
pub(crate) async fn off_thread<T: Send + 'static>(
    gateway: &GatewayState,
    bytes: usize,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if bytes <= IN_PLACE_BYTES {
        return work();
    }
    let bound = Duration::from_secs(gateway.config.timeouts.prepare_s);
    let preparing = gateway.preparing.clone();
    let done = tokio::time::timeout(bound, async move {
        // The semaphore is never closed. The permit goes with the work: a thread that is given up still counts.
        let permit = preparing.acquire_owned().await;
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        })
        .await
        .map_err(|error| ApiError::Internal(format!("preparing the prompt failed: {error}")))?
    });
    done.await.unwrap_or_else(|_| {
        let message = format!("the prompt was not prepared within {} s; send a shorter one", bound.as_secs());
        Err(ApiError::Unavailable { message, retry_after_s: 5 })
    })
}

/// Tokens of a chat.
pub(crate) async fn chat(gateway: &GatewayState, model: &Arc<Model>, chat: Chat, now_unix_s: u64) -> Result<Prepared, ApiError> {
    let bytes = chat.messages.iter().map(|message| content_bytes(&message["content"])).sum();
    let model = model.clone();
    off_thread(gateway, bytes, move || render_and_encode(&model, &chat, now_unix_s)).await
}

fn content_bytes(content: &serde_json::Value) -> usize {
    match content {
        serde_json::Value::String(text) => text.len(),
        serde_json::Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).map(str::len).sum(),
        _ => 0,
    }
}

fn render_and_encode(model: &Model, chat: &Chat, now_unix_s: u64) -> Result<Prepared, ApiError> {
    let template = model.chat_template.as_ref().ok_or(forge_text::TextError::NoChatTemplate)?;
    let text = template.render(&ChatRender {
        messages: &chat.messages,
        add_generation_prompt: chat.add_generation_prompt,
        continue_final_message: chat.continue_final_message,
        now_unix_seconds: i64::try_from(now_unix_s).unwrap_or(i64::MAX),
        variables: (!chat.variables.is_empty()).then_some(&chat.variables),
        ..ChatRender::default()
    })?;
    let tokens = model.tokenizer.encode(&text, chat.add_special_tokens)?;
    Ok(Prepared { tokens: tokens.into(), text: Some(text) })
}

/// Tokens of completion prompts.
pub(crate) async fn prompts(
    gateway: &GatewayState,
    model: &Arc<Model>,
    prompts: Vec<Prompt>,
    add_special_tokens: bool,
) -> Result<Vec<Prepared>, ApiError> {
    let length = |prompt: &Prompt| match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Tokens(_) => 0,
    };
    let bytes = prompts.iter().map(length).sum();
    let model = model.clone();
    off_thread(gateway, bytes, move || prompts.into_iter().map(|prompt| encode_prompt(&model, prompt, add_special_tokens)).collect()).await
}

/// Tokens of one completion prompt. An empty text is the model's beginning-of-text token, if it has one.
pub(crate) fn encode_prompt(model: &Model, prompt: Prompt, add_special_tokens: bool) -> Result<Prepared, ApiError> {
    match prompt {
        Prompt::Tokens(tokens) => Ok(Prepared { tokens: tokens.into(), text: None }),
        Prompt::Text(text) => {
            let mut tokens = model.tokenizer.encode(&text, add_special_tokens)?;
            if tokens.is_empty() {
                tokens.extend(model.tokenizer.bos_id());
            }
            Ok(Prepared { tokens: tokens.into(), text: Some(text) })
        }
    }
}

/// Checks a prompt against the model, and gives the bound on its answer: what was asked for, or what the context leaves.
pub(crate) fn fit(model: &Model, tokens: &[u32], max_tokens: Option<u32>, param: &str) -> Result<u32, ApiError> {
    if tokens.is_empty() {
        return Err(ApiError::invalid(param, format!("{param} has no tokens; send at least one")));
    }
    if let Some(token) = tokens.iter().find(|token| **token as usize >= model.card.vocab_size) {
        let message = format!("{param}: token id {token} is outside the vocabulary of {}", model.card.vocab_size);
        return Err(ApiError::invalid(param, message));
    }
    let context = model.card.max_model_len;
    // Without an answer, scoring fills the context to its end; otherwise one token must fit behind the prompt.
    let wanted = max_tokens.unwrap_or(1) as usize;
    if tokens.len().saturating_add(wanted) <= context {
        return Ok(max_tokens.unwrap_or((context - tokens.len()) as u32));
    }
    let message = format!(
        "the model's context is {context} tokens and the request needs {} ({} in the prompt, {wanted} for the answer): \
         shorten the prompt, lower max_tokens, or serve with a larger --max-model-len",
        tokens.len() + wanted,
        tokens.len(),
    );
    Err(ApiError::Invalid { param: Some(param.to_owned()), message, code: Some("context_length_exceeded") })
}
