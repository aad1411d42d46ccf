//! `POST /tokenize` and `POST /detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::Response;
use serde_json::{Value, json};

use super::generate::json as json_text;
use crate::body::read_json;
use crate::error::ApiError;
use crate::gateway::GatewayState;
use crate::generation::Seat;
use crate::prepare::{self, off_thread};
use crate::request::{TokenizeInput, parse_detokenize_request, parse_tokenize_request};

pub(crate) async fn tokenize(State(gateway): State<Arc<GatewayState>>, request: Request<Body>) -> Result<Response, ApiError> {
    let _seat = Seat::take(&gateway)?;
    let body = read_json(&gateway, request).await?;
    let limits = gateway.config.limits.clone();
    let parsed = off_thread(&gateway, body.bytes.len(), move || parse_tokenize_request(&body.bytes, &limits)).await?;
    let model = gateway.models.find(parsed.model.as_deref())?;
    let tokens = match parsed.input {
        TokenizeInput::Chat(chat) => prepare::chat(&gateway, &model, chat, gateway.clock.unix_s()).await?.tokens,
        TokenizeInput::Text { prompt, add_special_tokens } => {
            let model = model.clone();
            let bytes = prompt.len();
            let work = move || Ok(model.tokenizer.encode(&prompt, add_special_tokens)?);
            off_thread(&gateway, bytes, work).await?.into()
        }
    };
    let name = |token: &u32| model.tokenizer.token_name(*token).unwrap_or_default();
    let token_strs = parsed.return_token_strs.then(|| tokens.iter().map(name).collect::<Vec<_>>());
    Ok(json_text(
        json!({
            "count": tokens.len(),
            "max_model_len": model.card.max_model_len,
            "tokens": &*tokens,
            "token_strs": token_strs,
        })
        .to_string(),
    ))
}

pub(crate) async fn detokenize(State(gateway): State<Arc<GatewayState>>, request: Request<Body>) -> Result<Json<Value>, ApiError> {
    let _seat = Seat::take(&gateway)?;
    let body = read_json(&gateway, request).await?;
    let limits = gateway.config.limits.clone();
    let bytes = body.bytes.len();
    let parsed = off_thread(&gateway, bytes, move || parse_detokenize_request(&body.bytes, &limits)).await?;
    let model = gateway.models.find(parsed.model.as_deref())?;
    if let Some(token) = parsed.tokens.iter().find(|token| **token as usize >= model.card.vocab_size) {
        let message = format!("tokens: token id {token} is outside the vocabulary of {}", model.card.vocab_size);
        return Err(ApiError::invalid("tokens", message));
    }
    let work = move || Ok(model.tokenizer.decode(&parsed.tokens, false)?);
    let prompt = off_thread(&gateway, bytes, work).await?;
    Ok(Json(json!({"prompt": prompt})))
}
