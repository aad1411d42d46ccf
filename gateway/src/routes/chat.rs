//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::Response;

use super::generate::{Keyed, Order, idempotent, new_id, respond};
use crate::body::read_json;
use crate::error::ApiError;
use crate::gateway::GatewayState;
use crate::generation::Seat;
use crate::middleware::RequestContext;
use crate::prepare::{self, off_thread};
use crate::request::{ChatRequest, parse_chat_request_with};
use crate::response::chat::ChatWriter;

pub(crate) async fn handle(
    State(gateway): State<Arc<GatewayState>>,
    Extension(context): Extension<RequestContext>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let seat = Seat::take(&gateway)?;
    let headers = request.headers().clone();
    let body = read_json(&gateway, request).await?;
    let limits = gateway.config.limits.clone();
    let bytes = body.bytes.clone();
    let parsed = off_thread(&gateway, bytes.len(), move || parse_chat_request_with(&bytes, &limits)).await?;
    let ChatRequest { common, chat, max_tokens, prompt_cache_key } = parsed;
    let model = gateway.models.find(common.model.as_deref())?;
    // Only a request that is well formed, for a model that is served, uses up its key.
    let keyed = Keyed { headers: &headers, route: "chat", body: &body.bytes, model: &model };
    let idempotent = idempotent(&gateway, &context, keyed).await?;
    drop(body);
    let clock_s = idempotent.as_ref().map_or_else(|| gateway.clock.unix_s(), |record| record.template_clock_s);
    let prompt = prepare::chat(&gateway, &model, chat, clock_s).await?;
    let id = new_id("chatcmpl");
    let order = Order {
        gateway: &gateway,
        context: &context,
        model: &model,
        common: &common,
        prompts: std::slice::from_ref(&prompt),
        max_tokens,
        idempotent,
        id: &id,
        prompt_param: "messages",
        prompt_cache_key: prompt_cache_key.as_deref(),
    };
    let generation = order.place(seat).await?;
    let writer = ChatWriter {
        head: order.head(&generation, if common.stream { "chat.completion.chunk" } else { "chat.completion" }),
        answers: common.n as usize,
        logprobs: common.sampling.logprobs.is_some(),
        include_usage: common.include_usage,
        token_ids: common.return_token_ids.then(|| prompt.tokens.clone()),
        model: model.clone(),
    };
    respond(&gateway, generation, common.stream, writer, ChatWriter::whole).await
}
