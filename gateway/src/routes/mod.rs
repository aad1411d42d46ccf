//! The API's routes, and the layers every request passes.

mod chat;
mod completions;
mod generate;
mod models;
mod tokenize;

use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

use crate::error::ApiError;
use crate::gateway::GatewayState;
use crate::health;
use crate::middleware::{authorize, observe, panicked};

/// Routes of the API's port that need no key even where keys are configured: they say no more than yes or no.
pub(crate) const OPEN_ROUTES: &[&str] = &["/health", "/health/ready"];

/// The API's port.
pub(crate) fn api(state: Arc<GatewayState>) -> Router {
    let routes = Router::new()
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/models", get(models::list))
        // A name may hold slashes (organisation/model), so this takes the rest of the path.
        .route("/v1/models/{*id}", get(models::one))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(health::live))
        .route("/health/ready", get(health::ready))
        .route("/health/full", get(health::full))
        .route("/metrics", get(health::metrics));
    layered(routes.with_state(state.clone()), state)
}

/// Puts the layers around routes: observed, then CORS, then panics caught, then authorized.
fn layered(routes: Router, state: Arc<GatewayState>) -> Router {
    let routes = routes
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(state.clone(), authorize))
        .layer(CatchPanicLayer::custom(panicked));
    let routes = match cors(&state.config.allowed_origins) {
        Some(cors) => routes.layer(cors),
        None => routes,
    };
    routes.layer(from_fn_with_state(state, observe))
}

/// The port of metrics and probes: no keys, no CORS.
pub(crate) fn probes(state: Arc<GatewayState>) -> Router {
    Router::new()
        .route("/metrics", get(health::metrics))
        .route("/livez", get(health::live))
        .route("/readyz", get(health::ready))
        .route("/healthz", get(health::healthz))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(state)
}

fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::from(Any)
    } else {
        // Checked by `GatewayConfig::check`: every origin is a header value.
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    let exposed = [
        "x-request-id",
        "retry-after",
        "openai-processing-ms",
        "x-ratelimit-limit-requests",
        "x-ratelimit-remaining-requests",
        "x-ratelimit-reset-requests",
        "x-ratelimit-limit-tokens",
        "x-ratelimit-remaining-tokens",
        "x-ratelimit-reset-tokens",
    ]
    .map(HeaderName::from_static);
    Some(
        CorsLayer::new()
            .allow_origin(allowed)
            .allow_methods([Method::GET, Method::POST])
            // `*` does not cover Authorization, and SDKs send headers of their own: what is asked for is allowed.
            .allow_headers(tower_http::cors::AllowHeaders::mirror_request())
            .expose_headers(exposed)
            .vary([header::ORIGIN]),
    )
}

async fn unknown_route(method: Method, uri: Uri) -> ApiError {
    ApiError::UnknownRoute { method: method.to_string(), path: shown(&uri) }
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::MethodNotAllowed { method: method.to_string(), path: shown(&uri) }
}

fn shown(uri: &Uri) -> String {
    uri.path().chars().take(128).collect()
}
