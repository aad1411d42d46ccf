//! The cluster's objects as data, for `-o json` and `-o yaml`.
//!
//! What it is not: not the form in which the cluster stores or sends them.
//!
//! Invariants: keys are in camelCase, as in a ModelService; a kind is printed as itself, placements rank by rank; no hash of
//! a secret is printed.

use forge_cluster::api::PlannedService;
use forge_gateway::keys::KeyRecord;
use forge_shared::cluster::event::Object;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::rows::{self, Placed};
use crate::cli::cluster::Listed;
use crate::commands::keys::ShownKey;
use crate::failure::{Failure, Result};

/// What is printed of an object listed as this kind: one value, but one per rank for placements.
///
/// # Errors
/// None that plain data could cause; the serializer's own.
pub(super) fn objects(listed: Listed, object: &Object) -> Result<Vec<Value>> {
    match (listed, object) {
        (Listed::Placements, Object::Service(service)) => rows::placed(service).iter().map(placement).collect(),
        (_, object) => Ok(vec![one(object)?]),
    }
}

fn one(object: &Object) -> Result<Value> {
    match object {
        Object::Node(node) => value(node),
        Object::Service(service) => value(service),
        Object::Key(key) => value(&ShownKey::from(&KeyRecord::from((**key).clone()))),
        Object::Notice(notice) => value(notice),
        Object::Member(member) => value(member),
        Object::Certificate(certificate) => value(certificate),
        Object::Trust(trust) => value(trust),
        // Not listed by any command; its secret's hash would be in it.
        Object::Token(token) => {
            Ok(json!({ "id": token.id, "role": token.role, "expiresMs": token.expires_ms, "usesLeft": token.uses_left }))
        }
    }
}

/// A rank of a replica, with what its replica's plan and status say.
pub(super) fn placement(placed: &Placed<'_>) -> Result<Value> {
    let (number, rank) = placed.rank;
    let plan = placed.plan;
    let mut data = json!({
        "replica": plan.replica.to_string(),
        "service": plan.replica.service,
        "index": plan.replica.index,
        "epoch": plan.epoch,
        "rank": number,
        "ranks": plan.ranks.len(),
    });
    let mut rest = value(rank)?;
    rest["memory"]["totalBytes"] = rank.memory.total_bytes().into();
    let status = match placed.record {
        None => json!({ "state": "planned" }),
        Some(record) => {
            let status = &record.status;
            json!({
                "state": status.phase,
                "isLeaving": placed.is_leaving,
                "percent": status.percent,
                "reason": status.reason,
                "restarts": status.restarts,
                "generation": record.generation,
                "numericsId": status.numerics_id,
            })
        }
    };
    let shared = json!({
        "maxModelLen": plan.max_model_len,
        "blockSize": plan.block_size,
        "kvBlocks": plan.kv_blocks,
        "kvCacheDtype": plan.kv_cache_dtype,
        "maxStepTokens": plan.max_step_tokens,
        "maxBatchSize": plan.max_batch_size,
    });
    for part in [rest, shared, status] {
        if let (Some(into), Value::Object(part)) = (data.as_object_mut(), part) {
            into.extend(part);
        }
    }
    Ok(data)
}

/// What `apply --dry-run` prints.
pub(super) fn planned(planned: &PlannedService) -> Result<Value> {
    let placements = rows::planned(&planned.plans).iter().map(placement).collect::<Result<Vec<_>>>()?;
    let refused: Vec<Value> =
        planned.refused_devices.iter().map(|(device, reason)| json!({ "device": device, "reason": reason })).collect();
    Ok(json!({
        "service": value(&planned.service)?,
        "changes": planned.changes,
        "placements": placements,
        "refusedDevices": refused,
        "notes": planned.notes,
    }))
}

fn value<T: Serialize>(item: &T) -> Result<Value> {
    serde_json::to_value(item).map(camel_case).map_err(|error| Failure::of(&error))
}

/// Plans and facts have other keys where the cluster stores them.
fn camel_case(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            Value::Object(fields.into_iter().map(|(key, value)| (camel(&key), camel_case(value))).collect::<Map<_, _>>())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(camel_case).collect()),
        plain => plain,
    }
}

fn camel(key: &str) -> String {
    let mut name = String::with_capacity(key.len());
    for (index, part) in key.split('_').enumerate() {
        let mut letters = part.chars();
        match letters.next() {
            Some(first) if index > 0 => {
                name.push(first.to_ascii_uppercase());
                name.push_str(letters.as_str());
            }
            _ => name.push_str(part),
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_in_one_casing_at_every_depth() {
        let value = camel_case(json!({ "max_model_len": [{ "kv_bytes": 1 }], "kvBlocks": "a_b", "a": null }));
        assert_eq!(value, json!({ "maxModelLen": [{ "kvBytes": 1 }], "kvBlocks": "a_b", "a": null }));
    }
}
