//! Probes and metrics: alive, ready (each model can answer now), and deep (a token is generated).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use forge_shared::generate::{Choice, EngineEvent, GenerateRequest, SamplingParams, TenantSalt};
use forge_shared::ids::RequestId;
use serde_json::{Value, json};
use tracing::Span;
use uuid::Uuid;

use crate::driver::{Admission, Driver};
use crate::error::ApiError;
use crate::gateway::GatewayState;
use crate::models::{Model, Replica};

/// How long the result of a deep probe is given again, so that probes cannot become load.
const PROBE_KEPT: Duration = Duration::from_secs(1);

/// The last deep probe.
pub(crate) type LastProbe = tokio::sync::Mutex<Option<(Instant, StatusCode, Value)>>;

/// The process answers.
pub(crate) async fn live() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// The models can answer now. `?model=NAME` asks for one; without, all must.
pub(crate) async fn ready(State(gateway): State<Arc<GatewayState>>, Query(query): Query<HashMap<String, String>>) -> Response {
    match status(&gateway, query.get("model").map(String::as_str)) {
        Ok((code, body)) => answer(code, body),
        Err(error) => error.into_response(),
    }
}

/// Ready; with `?deep=1` (or `true`) every model must also generate a token.
pub(crate) async fn healthz(State(gateway): State<Arc<GatewayState>>, Query(query): Query<HashMap<String, String>>) -> Response {
    match query.get("deep").map(String::as_str) {
        Some("1" | "true") => full(State(gateway)).await,
        None | Some("0" | "false") => ready(State(gateway), Query(query)).await,
        Some(_) => ApiError::invalid("deep", "deep must be 0 or 1").into_response(),
    }
}

/// The state of every model, after each generated a token.
pub(crate) async fn full(State(gateway): State<Arc<GatewayState>>) -> Response {
    let mut last = gateway.last_probe.lock().await;
    if let Some((when, code, body)) = last.as_ref().filter(|(when, ..)| when.elapsed() < PROBE_KEPT) {
        tracing::trace!(?when, "deep probe answered from the last one");
        return answer(*code, body.clone());
    }
    let (code, body) = probe_all(&gateway).await;
    *last = Some((Instant::now(), code, body.clone()));
    answer(code, body)
}

/// The Prometheus page.
pub(crate) async fn metrics(State(gateway): State<Arc<GatewayState>>) -> Response {
    let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], gateway.metrics.encode()).into_response()
}

fn answer(code: StatusCode, body: Value) -> Response {
    let mut response = (code, Json(body)).into_response();
    if code == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
    }
    response
}

fn status(gateway: &GatewayState, model: Option<&str>) -> Result<(StatusCode, Value), ApiError> {
    let table = gateway.models.table();
    let services: Vec<Vec<&Arc<Model>>> = match model {
        Some(name) => vec![table.versions(Some(name))?],
        None => table.by_service().map(|models| models.iter().collect()).collect(),
    };
    let draining = gateway.lifecycle.is_draining();
    let ready = !draining && !table.is_awaited() && services.iter().all(|versions| is_ready(versions));
    let word = match (draining, ready) {
        (true, _) => "draining",
        (false, true) => "ready",
        (false, false) => "unavailable",
    };
    let models: Vec<Value> = services.iter().flat_map(|versions| model_status(versions)).collect();
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Ok((code, json!({"status": word, "models": models})))
}

/// While a changed wish is rolled out, one of a service's versions is enough.
fn is_ready(versions: &[&Arc<Model>]) -> bool {
    versions.iter().any(|model| model.unready_reason().is_none())
}

fn model_status(versions: &[&Arc<Model>]) -> Option<Value> {
    let replicas: Vec<Arc<Replica>> = versions.iter().flat_map(|model| model.replicas().to_vec()).collect();
    let replicas = replicas.iter().map(|replica| {
        let status = replica.link().status();
        json!({
            "replica": replica.key(),
            "ready": status.ready,
            "reason": status.reason,
            "running": status.running,
            "waiting": status.waiting,
            "kv_blocks_used": status.kv_blocks_used,
            "kv_blocks_total": status.kv_blocks_total,
            "restarts": status.restarts,
            "system_fingerprint": replica.fingerprint(),
        })
    });
    Some(json!({
        "name": versions.first()?.card.name,
        "ready": is_ready(versions),
        "replicas": replicas.collect::<Vec<_>>(),
    }))
}

async fn probe_all(gateway: &Arc<GatewayState>) -> (StatusCode, Value) {
    let (mut code, mut body) = match status(gateway, None) {
        Ok(status) => status,
        Err(error) => (error.status(), error.body()),
    };
    let mut probes = serde_json::Map::new();
    let table = gateway.models.table();
    let ready = |versions: &[Arc<Model>]| versions.iter().find(|model| model.unready_reason().is_none()).or(versions.first()).cloned();
    for model in table.by_service().filter_map(ready) {
        let began = Instant::now();
        let result = match probe(gateway, &model).await {
            Ok(()) => json!({"ok": true, "milliseconds": began.elapsed().as_millis() as u64}),
            Err(error) => {
                code = StatusCode::SERVICE_UNAVAILABLE;
                json!({"ok": false, "reason": error.to_string()})
            }
        };
        probes.insert(model.card.name.clone(), result);
    }
    body["probes"] = Value::Object(probes);
    if code != StatusCode::OK && body["status"] == "ready" {
        body["status"] = json!("unavailable");
    }
    (code, body)
}

/// One token from one model, within the bound on probes, ahead of the queue.
async fn probe(gateway: &Arc<GatewayState>, model: &Arc<Model>) -> Result<(), ApiError> {
    let seconds = gateway.config.timeouts.probe_s;
    let request = GenerateRequest {
        id: RequestId(format!("probe-{}", Uuid::new_v4().simple())),
        tenant: TenantSalt(b"probe"[..].into()),
        prompt_tokens: vec![model.tokenizer.bos_id().unwrap_or(0)].into(),
        choices: vec![Choice { index: 0, emitted_tokens: Vec::new() }],
        seed: 0,
        params: SamplingParams { temperature: 0.0, max_tokens: 1, ignore_eos: true, ..SamplingParams::default() },
        priority: i32::MAX,
    };
    let bound = Duration::from_secs(seconds);
    let generated = async {
        let admission = Admission {
            affinity: 0,
            deadline: tokio::time::Instant::now() + bound,
            numerics_id: None,
            may_be_shortened: false,
            span: Span::none(),
        };
        let mut driver = Driver::admit(gateway.clone(), model.clone(), request, admission).await?;
        while let Some(event) = driver.next().await {
            if matches!(event?, EngineEvent::Token(_)) {
                return Ok(());
            }
        }
        Err(ApiError::EngineFailed { reason: "it ended the probe without a token".into() })
    };
    tokio::time::timeout(bound, generated).await.unwrap_or(Err(ApiError::Deadline { seconds }))
}
