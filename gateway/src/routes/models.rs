//! `GET /v1/models` and `/v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::gateway::GatewayState;
use crate::models::Model;

pub(crate) async fn list(State(gateway): State<Arc<GatewayState>>) -> Json<Value> {
    let data: Vec<Value> = gateway.models.table().names().map(|(name, model)| entry(name, model)).collect();
    Json(json!({"object": "list", "data": data}))
}

pub(crate) async fn one(State(gateway): State<Arc<GatewayState>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let model = gateway.models.find(Some(&id))?;
    Ok(Json(entry(&id, &model)))
}

/// `root` is the model an alias stands for.
fn entry(name: &str, model: &Model) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": model.card.created_s,
        "owned_by": "forge",
        "root": model.card.name,
        "parent": null,
        "max_model_len": model.card.max_model_len,
    })
}
