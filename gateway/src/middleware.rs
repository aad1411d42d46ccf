//! The layers every API request passes: observed (request id, time, metrics) and authorized (key, requests per minute).

use std::any::Any;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use forge_shared::telemetry::HttpLabel;
use uuid::Uuid;

use crate::error::ApiError;
use crate::gateway::GatewayState;
use crate::keys::Tenant;
use crate::limits::{BucketState, RateState};
use crate::routes::OPEN_ROUTES;

/// What handlers know of a request beside its body.
#[derive(Debug, Clone)]
pub(crate) struct RequestContext {
    /// As the client sees it, in `x-request-id`.
    pub(crate) request_id: String,
    /// When it came.
    pub(crate) arrived: Instant,
    /// Whose it is.
    pub(crate) tenant: Tenant,
    /// Of the client's trace, or empty.
    pub(crate) traceparent: String,
}

/// Gives every response its request id and time, and counts it by route and status.
pub(crate) async fn observe(State(gateway): State<Arc<GatewayState>>, mut request: Request, next: Next) -> Response {
    let arrived = Instant::now();
    let request_id = request_id(request.headers());
    let matched = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let traceparent = forge_cluster::tracing::from_headers(request.headers());
    request.extensions_mut().insert(Arrival { request_id: request_id.clone(), arrived, traceparent });
    let mut response = next.run(request).await;
    let status = response.status().as_u16();
    // The pattern, never the path: a label per path would let clients fill the memory.
    let label = HttpLabel { route: matched.unwrap_or_else(|| "unknown".into()), status };
    gateway.metrics.http_responses.get_or_create(&label).inc();
    let milliseconds = arrived.elapsed().as_millis().to_string();
    let headers = response.headers_mut();
    for (name, value) in [("x-request-id", request_id), ("openai-processing-ms", milliseconds)] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
    headers.insert(HeaderName::from_static("openai-version"), HeaderValue::from_static("2020-10-01"));
    response
}

#[derive(Debug, Clone)]
struct Arrival {
    request_id: String,
    arrived: Instant,
    traceparent: String,
}

/// The client's request id if it is short and printable, else a fresh one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get("x-request-id").and_then(|value| value.to_str().ok());
    let usable = |id: &&str| (1..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic());
    given.filter(usable).map_or_else(|| format!("req_{}", Uuid::new_v4().simple()), str::to_owned)
}

/// Lets a request through if its key is good and has requests left. Denies by default: what is not in [`OPEN_ROUTES`]
/// needs a key where keys are configured, unknown routes included. Where none are, it must be meant for this machine.
pub(crate) async fn authorize(State(gateway): State<Arc<GatewayState>>, mut request: Request, next: Next) -> Response {
    let open = OPEN_ROUTES.contains(&request.uri().path());
    let tenant = match gateway.keys.authenticate(authorization(&request)) {
        Ok(tenant) => tenant,
        Err(_) if open => return next.run(request).await,
        Err(error) => return error.into_response(),
    };
    if tenant.key_id.is_none()
        && !gateway.config.insecure
        && let Err(error) = check_host(request.headers())
    {
        return error.into_response();
    }
    let limited = tenant.limits.rpm.is_some() || tenant.limits.tpm.is_some();
    if request.method() == Method::POST && limited {
        let taken = gateway.rates.lock().take_request(tenant.name(), tenant.limits, gateway.now());
        match &taken {
            Ok(()) => gateway.keys.count_request(&tenant),
            Err(_) => gateway.keys.count_refused(&tenant),
        }
        if let Err(error) = taken {
            return with_rates(&gateway, &tenant, error.into_response());
        }
    }
    let arrival = request.extensions_mut().remove::<Arrival>();
    let none = || Arrival { request_id: String::new(), arrived: Instant::now(), traceparent: String::new() };
    let Arrival { request_id, arrived, traceparent } = arrival.unwrap_or_else(none);
    request.extensions_mut().insert(RequestContext { request_id, arrived, tenant: tenant.clone(), traceparent });
    let response = next.run(request).await;
    if limited { with_rates(&gateway, &tenant, response) } else { response }
}

fn authorization(request: &Request) -> Option<&str> {
    request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok())
}

/// Refuses a host that is neither localhost nor a loopback address: the browser of a page whose name resolves to this
/// machine (DNS rebinding) sends that name. No header at all comes from no browser.
fn check_host(headers: &HeaderMap) -> Result<(), ApiError> {
    let foreign = headers.get_all(header::HOST).iter().find(|host| !host.to_str().is_ok_and(is_loopback));
    foreign.map_or(Ok(()), |host| {
        let host = String::from_utf8_lossy(host.as_bytes()).chars().take(128).collect();
        Err(ApiError::ForeignHost { host })
    })
}

fn is_loopback(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else {
        return false;
    };
    let name = authority.host();
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn with_rates(gateway: &GatewayState, tenant: &Tenant, mut response: Response) -> Response {
    let RateState { requests, tokens } = gateway.rates.lock().state(tenant.name(), tenant.limits, gateway.now());
    for (unit, state) in [("requests", requests), ("tokens", tokens)] {
        let Some(BucketState { limit, remaining, reset }) = state else {
            continue;
        };
        let values = [("limit", limit.to_string()), ("remaining", remaining.to_string()), ("reset", duration_text(reset))];
        for (what, value) in values {
            let name = HeaderName::from_bytes(format!("x-ratelimit-{what}-{unit}").as_bytes());
            if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(&value)) {
                response.headers_mut().insert(name, value);
            }
        }
    }
    response
}

/// As OpenAI writes durations: `120ms`, `6s`, `1m30s`.
fn duration_text(duration: Duration) -> String {
    let ms = duration.as_millis();
    match (ms / 60_000, ms % 60_000) {
        (0, ms) if ms < 1000 => format!("{ms}ms"),
        (0, ms) => format!("{}s", ms.div_ceil(1000)),
        (minutes, ms) => format!("{minutes}m{}s", ms.div_ceil(1000)),
    }
}

/// A defect in a handler is a 500 for that request and nothing more.
pub(crate) fn panicked(cause: Box<dyn Any + Send>) -> axum::http::Response<Body> {
    let text = cause.downcast_ref::<&str>().copied().or_else(|| cause.downcast_ref::<String>().map(String::as_str));
    tracing::error!(cause = text.unwrap_or("unknown"), "a request handler panicked");
    ApiError::Internal("the request met a defect; its x-request-id is in the server's log".into()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_openai_writes_them() {
        for (ms, text) in [(0, "0ms"), (120, "120ms"), (6000, "6s"), (6001, "7s"), (90_000, "1m30s")] {
            assert_eq!(duration_text(Duration::from_millis(ms)), text);
        }
    }

    #[test]
    fn only_hosts_that_are_this_machine_pass() {
        for host in ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:8000", "127.8.8.8", "[::1]", "[::1]:8000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "10.0.0.1", "0.0.0.0", "[::]", "a b"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn request_ids_of_clients_are_kept_if_harmless() {
        let id = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("x-request-id", HeaderValue::from_str(value).unwrap());
            request_id(&headers)
        };
        assert_eq!(id("trace-7"), "trace-7");
        assert!(id("a b").starts_with("req_"));
        assert!(id(&"a".repeat(129)).starts_with("req_"));
        assert!(request_id(&HeaderMap::new()).starts_with("req_"));
    }
}
