//! Reads request bodies within bounds of size, time and memory.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Request, header};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use tokio::sync::OwnedSemaphorePermit;

use crate::error::ApiError;
use crate::gateway::GatewayState;

/// A body in memory, and its share of the memory for bodies.
pub(crate) struct HeldBody {
    pub(crate) bytes: Bytes,
    _memory: Option<OwnedSemaphorePermit>,
}

/// Reads the JSON body of a request.
///
/// # Errors
/// [`ApiError::NotJson`], [`ApiError::BodyTooLarge`], [`ApiError::BodyTimeout`], or [`ApiError::Overloaded`] when all
/// bodies together are too large.
pub(crate) async fn read_json(gateway: &GatewayState, request: Request<Body>) -> Result<HeldBody, ApiError> {
    check_content_type(request.headers())?;
    let limit = gateway.config.limits.body_bytes;
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > limit as u64) {
        return Err(ApiError::BodyTooLarge { limit_bytes: limit });
    }
    let seconds = gateway.config.timeouts.body_s;
    let reading = read(gateway, request.into_body(), limit);
    tokio::time::timeout(Duration::from_secs(seconds), reading).await.unwrap_or(Err(ApiError::BodyTimeout { seconds }))
}

async fn read(gateway: &GatewayState, body: Body, limit: usize) -> Result<HeldBody, ApiError> {
    let mut chunks = body.into_data_stream();
    let mut bytes = BytesMut::new();
    let mut memory: Option<OwnedSemaphorePermit> = None;
    let mut held_kib = 0;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| ApiError::malformed(format!("the request body broke off: {error}")))?;
        if bytes.len() + chunk.len() > limit {
            return Err(ApiError::BodyTooLarge { limit_bytes: limit });
        }
        let needed_kib = (bytes.len() + chunk.len()).div_ceil(1024);
        if needed_kib > held_kib {
            let more = take_memory(gateway, needed_kib - held_kib)?;
            match &mut memory {
                Some(held) => held.merge(more),
                None => memory = Some(more),
            }
            held_kib = needed_kib;
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(HeldBody { bytes: bytes.freeze(), _memory: memory })
}

fn take_memory(gateway: &GatewayState, kib: usize) -> Result<OwnedSemaphorePermit, ApiError> {
    let kib = u32::try_from(kib).unwrap_or(u32::MAX);
    Arc::clone(&gateway.body_kib).try_acquire_many_owned(kib).map_err(|_| ApiError::Overloaded {
        message: "the request bodies being read fill the memory set aside for them (limits.total_body_bytes)".into(),
        retry_after_s: 1,
    })
}

/// JSON must be called JSON: a browser page of another origin cannot send this type without asking first (CORS). That
/// alone does not protect a keyless server: a page whose name was pointed here (DNS rebinding) is of the same origin to
/// the browser. Its `Host` header gives it away, which `middleware::authorize` checks.
fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let value = headers.get(header::CONTENT_TYPE);
    let text = value.map_or("no Content-Type", |value| value.to_str().unwrap_or("an unreadable one"));
    let essence = text.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(ApiError::NotJson(text.chars().take(80).collect()))
}
