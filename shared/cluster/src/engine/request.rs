//! A submitted request between its wire form and [`GenerateRequest`].
//!
//! Invariant: what [`from_wire`] gives has bounded sizes, finite numbers and at least one prompt token and answer; what
//! [`to_wire`] writes, it reads back unchanged.

use std::time::Duration;

use forge_proto::engine as wire;
use forge_shared::generate::{Choice, GenerateRequest, SamplingParams, TenantSalt};
use forge_shared::ids::{Epoch, ReplicaId, RequestId, ServiceName};

use super::WireError;

/// Largest message with a request: what the server's decoder must take.
pub const MAX_SUBMIT_BYTES: usize = 32 << 20;
/// Longest prompt, and longest answer that is replayed. Longer than any model's context.
pub const MAX_TOKENS: usize = 4 << 20;
const MAX_CHOICES: usize = 1024;
const MAX_ID_BYTES: usize = 256;
const MAX_TENANT_BYTES: usize = 256;
const MAX_BIASES: usize = 1 << 20;
const MAX_STOP_STRINGS: usize = 64;
const MAX_STOP_BYTES: usize = 4096;
const MAX_STOP_TOKENS: usize = 65_536;
const MAX_TIMEOUT: Duration = Duration::from_secs(7 * 24 * 3600);

/// A request, for whom, and how long it may take.
#[derive(Debug, Clone, PartialEq)]
pub struct Submission {
    /// Which copy is meant.
    pub replica: ReplicaId,
    /// Under which plan: refused by a worker that runs another.
    pub epoch: Epoch,
    /// What is asked for.
    pub request: GenerateRequest,
    /// Time it still has.
    pub timeout: Duration,
}

/// Names a replica on the wire.
pub fn replica_to_wire(replica: &ReplicaId, epoch: Epoch) -> wire::ReplicaRef {
    wire::ReplicaRef { replica: replica.to_string(), epoch: epoch.0 }
}

/// Reads `service/index` and the epoch.
///
/// # Errors
/// [`WireError`] if it is missing or not of that form.
pub fn replica_from_wire(replica: Option<&wire::ReplicaRef>) -> Result<(ReplicaId, Epoch), WireError> {
    let replica = replica.ok_or(WireError::Missing { field: "replica" })?;
    Ok((parse_replica(&replica.replica)?, Epoch(replica.epoch)))
}

/// Reads `service/index`.
///
/// # Errors
/// [`WireError`] for another form.
pub fn parse_replica(text: &str) -> Result<ReplicaId, WireError> {
    let wrong =
        || WireError::Value { field: "replica", reason: format!("{:?} is not service/index", text.chars().take(80).collect::<String>()) };
    let (service, index) = text.rsplit_once('/').ok_or_else(wrong)?;
    if service.is_empty() || service.len() > 253 || service.contains('/') {
        return Err(wrong());
    }
    Ok(ReplicaId { service: ServiceName(service.into()), index: index.parse().map_err(|_| wrong())? })
}

/// For the wire.
pub fn to_wire(submission: &Submission) -> wire::SubmitRequest {
    let Submission { replica, epoch, request, timeout } = submission;
    let choice = |choice: &Choice| wire::Choice { index: choice.index, emitted_tokens: choice.emitted_tokens.clone() };
    wire::SubmitRequest {
        replica: Some(replica_to_wire(replica, *epoch)),
        id: request.id.0.clone(),
        tenant: request.tenant.0.to_vec().into(),
        prompt_tokens: request.prompt_tokens.to_vec(),
        choices: request.choices.iter().map(choice).collect(),
        seed: request.seed,
        params: Some(params_to_wire(&request.params)),
        priority: request.priority,
        timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
    }
}

/// From the wire.
///
/// # Errors
/// [`WireError`] naming the first field that cannot be used.
pub fn from_wire(message: wire::SubmitRequest) -> Result<Submission, WireError> {
    let (replica, epoch) = replica_from_wire(message.replica.as_ref())?;
    at_most("id", message.id.len(), MAX_ID_BYTES)?;
    at_most("tenant", message.tenant.len(), MAX_TENANT_BYTES)?;
    between("prompt_tokens", message.prompt_tokens.len(), MAX_TOKENS)?;
    between("choices", message.choices.len(), MAX_CHOICES)?;
    let mut choices = Vec::with_capacity(message.choices.len());
    let mut emitted = 0usize;
    for choice in message.choices {
        emitted = emitted.saturating_add(choice.emitted_tokens.len());
        at_most("emitted_tokens", emitted, MAX_TOKENS)?;
        if choices.iter().any(|other: &Choice| other.index == choice.index) {
            return Err(WireError::Value { field: "choices", reason: format!("index {} is there twice", choice.index) });
        }
        choices.push(Choice { index: choice.index, emitted_tokens: choice.emitted_tokens });
    }
    let request = GenerateRequest {
        id: RequestId(message.id),
        tenant: TenantSalt(message.tenant.as_ref().into()),
        prompt_tokens: message.prompt_tokens.into(),
        choices,
        seed: message.seed,
        params: params_from_wire(message.params.ok_or(WireError::Missing { field: "params" })?)?,
        priority: message.priority,
    };
    Ok(Submission { replica, epoch, request, timeout: Duration::from_millis(message.timeout_ms).min(MAX_TIMEOUT) })
}

fn params_to_wire(params: &SamplingParams) -> wire::SamplingParams {
    wire::SamplingParams {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        repetition_penalty: params.repetition_penalty,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        logit_bias: params.logit_bias.iter().map(|&(token, bias)| wire::LogitBias { token, bias }).collect(),
        max_tokens: params.max_tokens,
        min_tokens: params.min_tokens,
        stop: params.stop.clone(),
        stop_token_ids: params.stop_token_ids.clone(),
        ignore_eos: params.ignore_eos,
        skip_special_tokens: params.skip_special_tokens,
        logprobs: params.logprobs,
        prompt_logprobs: params.prompt_logprobs,
    }
}

fn params_from_wire(params: wire::SamplingParams) -> Result<SamplingParams, WireError> {
    at_most("logit_bias", params.logit_bias.len(), MAX_BIASES)?;
    at_most("stop", params.stop.len(), MAX_STOP_STRINGS)?;
    at_most("stop", params.stop.iter().map(String::len).max().unwrap_or(0), MAX_STOP_BYTES)?;
    at_most("stop_token_ids", params.stop_token_ids.len(), MAX_STOP_TOKENS)?;
    let logit_bias = params.logit_bias.iter().map(|bias| Ok((bias.token, finite("logit_bias", bias.bias)?)));
    Ok(SamplingParams {
        temperature: finite("temperature", params.temperature)?,
        top_k: params.top_k,
        top_p: finite("top_p", params.top_p)?,
        min_p: finite("min_p", params.min_p)?,
        repetition_penalty: finite("repetition_penalty", params.repetition_penalty)?,
        presence_penalty: finite("presence_penalty", params.presence_penalty)?,
        frequency_penalty: finite("frequency_penalty", params.frequency_penalty)?,
        logit_bias: logit_bias.collect::<Result<_, WireError>>()?,
        max_tokens: params.max_tokens,
        min_tokens: params.min_tokens,
        stop: params.stop,
        stop_token_ids: params.stop_token_ids,
        ignore_eos: params.ignore_eos,
        skip_special_tokens: params.skip_special_tokens,
        logprobs: params.logprobs,
        prompt_logprobs: params.prompt_logprobs,
    })
}

pub(super) fn finite(field: &'static str, value: f32) -> Result<f32, WireError> {
    if value.is_finite() { Ok(value) } else { Err(WireError::Value { field, reason: format!("{value} is no finite number") }) }
}

pub(super) fn at_most(field: &'static str, count: usize, limit: usize) -> Result<(), WireError> {
    if count <= limit { Ok(()) } else { Err(WireError::TooLarge { field, count, limit }) }
}

fn between(field: &'static str, count: usize, limit: usize) -> Result<(), WireError> {
    if count == 0 { Err(WireError::Missing { field }) } else { at_most(field, count, limit) }
}
