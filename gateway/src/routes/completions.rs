//! `POST /v1/completions`.

use std::collections::HashMap;
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
use crate::models::Model;
use crate::prepare::{self, Prepared, off_thread};
use crate::request::{CompletionRequest, parse_completion_request};
use crate::response::completion::{CompletionWriter, WrittenPrompt};

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
    let parsed = off_thread(&gateway, bytes.len(), move || parse_completion_request(&bytes, &limits)).await?;
    let CompletionRequest { common, prompts, echo, max_tokens, add_special_tokens } = parsed;
    let model = gateway.models.find(common.model.as_deref())?;
    // Only a request that is well formed, for a model that is served, uses up its key.
    let keyed = Keyed { headers: &headers, route: "completion", body: &body.bytes, model: &model };
    let idempotent = idempotent(&gateway, &context, keyed).await?;
    drop(body);
    let prompts = prepare::prompts(&gateway, &model, prompts, add_special_tokens).await?;
    let id = new_id("cmpl");
    let order = Order {
        gateway: &gateway,
        context: &context,
        model: &model,
        common: &common,
        prompts: &prompts,
        max_tokens: Some(max_tokens),
        idempotent,
        id: &id,
        prompt_param: "prompt",
        prompt_cache_key: None,
    };
    let generation = order.place(seat).await?;
    let skip_special_tokens = common.sampling.skip_special_tokens;
    let written = prompts.iter().map(|prompt| written(&model, prompt, echo, skip_special_tokens));
    let writer = CompletionWriter {
        head: order.head(&generation, "text_completion"),
        prompts: written.collect::<Result<_, ApiError>>()?,
        answers_per_prompt: common.n as usize,
        echo,
        logprobs: common.sampling.logprobs.is_some(),
        skip_special_tokens,
        include_usage: common.include_usage,
        token_ids: common.return_token_ids,
        columns: HashMap::new(),
        model: model.clone(),
    };
    respond(&gateway, generation, common.stream, writer, CompletionWriter::whole).await
}

fn written(model: &Model, prompt: &Prepared, echo: bool, skip_special_tokens: bool) -> Result<WrittenPrompt, ApiError> {
    let echo = match (&prompt.text, echo) {
        (_, false) => String::new(),
        (Some(text), true) => text.clone(),
        (None, true) => model.tokenizer.decode(&prompt.tokens, skip_special_tokens)?,
    };
    Ok(WrittenPrompt { tokens: prompt.tokens.clone(), echo })
}
