//! What the two generating routes share: seed, tenant, engine requests, and how the answer goes out.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use forge_shared::generate::{AdmitError, Choice, GenerateRequest, TenantSalt};
use forge_shared::ids::RequestId;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::error::ApiError;
use crate::gateway::GatewayState;
use crate::generation::{Generation, Seat, Work};
use crate::idempotency::{Idempotent, KeyedRequest};
use crate::middleware::RequestContext;
use crate::models::Model;
use crate::prepare::{Prepared, fit};
use crate::request::Common;
use crate::response::Head;
use crate::sse::{self, Chunks};
use crate::trace::{self, Asked};

/// Tokens of the prompt that decide which replica is preferred.
const AFFINITY_TOKENS: usize = 256;

/// What an accepted request is made of.
pub(crate) struct Order<'a> {
    pub(crate) gateway: &'a Arc<GatewayState>,
    pub(crate) context: &'a RequestContext,
    pub(crate) model: &'a Arc<Model>,
    pub(crate) common: &'a Common,
    pub(crate) prompts: &'a [Prepared],
    /// `None` is what the context leaves.
    pub(crate) max_tokens: Option<u32>,
    pub(crate) idempotent: Option<Idempotent>,
    /// `chatcmpl-…` or `cmpl-…`.
    pub(crate) id: &'a str,
    /// Field the prompt came in, for errors.
    pub(crate) prompt_param: &'static str,
    pub(crate) prompt_cache_key: Option<&'a str>,
}

impl Order<'_> {
    /// Checks the order against the model and submits it.
    ///
    /// # Errors
    /// A parameter the model cannot have, the tenant's limit, or the engine's refusal.
    pub(crate) async fn place(&self, seat: Seat) -> Result<Generation, ApiError> {
        self.check_priority()?;
        let requests = (0..self.prompts.len()).map(|prompt| self.request(prompt)).collect::<Result<Vec<_>, _>>()?;
        tracing::info!(
            request = %self.context.request_id, id = self.id, model = %self.model.card.name, tenant = self.context.tenant.name(),
            prompts = requests.len(), n = self.common.n, stream = self.common.stream, labels = ?self.common.log_labels, "request"
        );
        let span = trace::begin(&Asked {
            traceparent: &self.context.traceparent,
            operation: if self.prompt_param == "messages" { "chat" } else { "text_completion" },
            model: &self.model.card.name,
            id: self.id,
            choices: self.common.n,
            max_tokens: requests.first().map_or(0, |request| request.params.max_tokens),
            temperature: requests.first().map_or(0.0, |request| request.params.temperature),
            top_p: requests.first().map_or(1.0, |request| request.params.top_p),
        });
        Generation::start(Work {
            span,
            gateway: self.gateway.clone(),
            model: self.model.clone(),
            tenant: self.context.tenant.clone(),
            affinity: self.affinity(),
            numerics_id: self.idempotent.as_ref().map(|idempotent| idempotent.numerics_id.clone()),
            may_be_shortened: self.max_tokens.is_none(),
            requests,
            arrived: self.context.arrived,
            seat,
        })
        .await
    }

    /// Where there are keys, their tenants share the engine, and none may go before the others.
    fn check_priority(&self) -> Result<(), ApiError> {
        if self.common.priority == 0 || self.context.tenant.key_id.is_none() {
            return Ok(());
        }
        let message = "priority: this key may not set it, since it would go before the requests of other keys; leave it out or send 0";
        Err(ApiError::Invalid { param: Some("priority".into()), message: message.into(), code: Some("unsupported_value") })
    }

    fn request(&self, prompt: usize) -> Result<GenerateRequest, ApiError> {
        let tokens = &self.prompts[prompt].tokens;
        let max_tokens = fit(self.model, tokens, self.max_tokens, self.prompt_param)?;
        let sampling = &self.common.sampling;
        let params = sampling.resolve(&self.model.card.default_sampling, max_tokens);
        params.check().map_err(|invalid| ApiError::invalid(invalid.field, invalid.to_string()))?;
        for (field, ids) in [
            ("logit_bias", params.logit_bias.iter().map(|(token, _)| *token).max()),
            ("stop_token_ids", params.stop_token_ids.iter().copied().max()),
        ] {
            if let Some(token) = ids.filter(|token| *token as usize >= self.model.card.vocab_size) {
                let message = format!("{field}: token id {token} is outside the vocabulary of {}", self.model.card.vocab_size);
                return Err(ApiError::invalid(field, message));
            }
        }
        let id = if self.prompts.len() == 1 { self.id.to_owned() } else { format!("{}.p{prompt}", self.id) };
        Ok(GenerateRequest {
            id: RequestId(id),
            tenant: self.salt(),
            prompt_tokens: tokens.clone(),
            choices: (0..self.common.n).map(|index| Choice { index, emitted_tokens: Vec::new() }).collect(),
            seed: self.seed(prompt)?,
            params,
            priority: self.common.priority,
        })
    }

    /// A given seed is every prompt's, so that a prompt in a list answers as it does alone; drawn ones differ.
    fn seed(&self, prompt: usize) -> Result<u64, ApiError> {
        match (self.common.seed, &self.idempotent) {
            (Some(seed), _) => Ok(seed),
            (None, Some(idempotent)) => Ok(idempotent.seed.wrapping_add(prompt as u64)),
            (None, None) => random_seed(),
        }
    }

    fn salt(&self) -> TenantSalt {
        let mut salt = match &self.context.tenant.key_id {
            Some(id) => [b"key:", id.as_bytes()].concat(),
            None => TenantSalt::anonymous().0.to_vec(),
        };
        if let Some(extra) = &self.common.cache_salt {
            // A key's id is hexadecimal, so the separator cannot be part of it. Hashed, the whole has one short length,
            // which every worker takes.
            salt.push(b'/');
            salt.extend_from_slice(hex::encode(Sha256::digest(extra)).as_bytes());
        }
        TenantSalt(salt.into())
    }

    fn affinity(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.salt().hash(&mut hasher);
        match (self.prompt_cache_key, self.prompts.first()) {
            (Some(key), _) => key.hash(&mut hasher),
            (None, Some(prompt)) => prompt.tokens[..prompt.tokens.len().min(AFFINITY_TOKENS)].hash(&mut hasher),
            (None, None) => {}
        }
        hasher.finish()
    }

    /// The head of this order's answer.
    pub(crate) fn head(&self, generation: &Generation, object: &'static str) -> Head {
        Head {
            id: self.id.to_owned(),
            object,
            created: self.gateway.clock.unix_s(),
            model: self.model.card.name.clone(),
            system_fingerprint: crate::models::fingerprint(generation.numerics_id()),
        }
    }
}

/// A fresh id with a prefix.
pub(crate) fn new_id(prefix: &str) -> String {
    format!("{prefix}-{}", Uuid::new_v4().simple())
}

fn random_seed() -> Result<u64, ApiError> {
    let mut bytes = [0u8; 8];
    getrandom::fill(&mut bytes).map_err(|error| ApiError::Internal(format!("no random seed: {error}")))?;
    Ok(u64::from_le_bytes(bytes))
}

/// A request as its idempotency key stands for it.
pub(crate) struct Keyed<'a> {
    pub(crate) headers: &'a HeaderMap,
    pub(crate) route: &'static str,
    pub(crate) body: &'a [u8],
    pub(crate) model: &'a Model,
}

/// What the `Idempotency-Key` header of a request stands for, if it has one. In a cluster the other gateways are told
/// before the request goes on; while no coordinator answers, only this gateway remembers it. A key is used up only once
/// a replica is ready: the record names the numerics that every retry must be answered with.
pub(crate) async fn idempotent(gateway: &GatewayState, context: &RequestContext, keyed: Keyed<'_>) -> Result<Option<Idempotent>, ApiError> {
    let Some(value) = keyed.headers.get("idempotency-key") else {
        return Ok(None);
    };
    let key = value.to_str().map_err(|_| ApiError::invalid("Idempotency-Key", "Idempotency-Key must be visible ASCII"))?;
    let tenant = context.tenant.name();
    let request = KeyedRequest::new(tenant, key, &[keyed.route.as_bytes(), keyed.body])?;
    let known = gateway.idempotency.lock().find(&request, gateway.now())?;
    if known.is_some() {
        return Ok(known);
    }
    let Some(numerics_id) = keyed.model.numerics_id(gateway.now()) else {
        let reason = keyed.model.unready_reason().unwrap_or_else(|| "no replica is ready".into());
        return Err(AdmitError::Unavailable { reason }.into());
    };
    let mut record = request.record(tenant, key, numerics_id, gateway.clock.unix_s());
    let records = gateway.shared_records.read().clone();
    if let Some(records) = records {
        match records.record(record.clone()).await {
            Ok(known) => record = known,
            Err(error) => tracing::warn!(%error, "an idempotency key is remembered by this gateway alone"),
        }
    }
    gateway.idempotency.lock().settle(&request, record, gateway.now()).map(Some)
}

/// Sends the answer: as events, or whole.
pub(crate) async fn respond<C: Chunks>(
    gateway: &GatewayState,
    mut generation: Generation,
    streamed: bool,
    writer: C,
    whole: impl FnOnce(&C, crate::generation::Collected) -> String,
) -> Result<Response, ApiError> {
    if streamed {
        let keep_alive = Duration::from_secs(gateway.config.timeouts.keep_alive_s);
        return Ok(sse::stream(generation, writer, keep_alive));
    }
    let collected = generation.collect().await?;
    Ok(json(whole(&writer, collected)))
}

/// A JSON response of text that is JSON.
pub(crate) fn json(text: String) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], text).into_response()
}
