//! What both generating routes take beside sampling.

use serde_json::Value;

use super::fields::{Fields, wrong_value};
use super::sampling::SamplingFields;
use crate::config::RequestLimits;
use crate::error::ApiError;

/// Fields of both generating routes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Common {
    /// Name of the model; `None` is the default one.
    pub model: Option<String>,
    /// Answer as server-sent events.
    pub stream: bool,
    /// A last chunk with the usage.
    pub include_usage: bool,
    /// Answers per prompt, at least 1.
    pub n: u32,
    /// Seed, if given.
    pub seed: Option<u64>,
    /// How to sample.
    pub sampling: SamplingFields,
    /// Larger runs first (the API's `priority` negated).
    pub priority: i32,
    /// Further separates the prefix cache.
    pub cache_salt: Option<String>,
    /// Token ids in the answer.
    pub return_token_ids: bool,
    /// `user`, `safety_identifier` and `metadata`, for the log line.
    pub log_labels: Vec<(&'static str, String)>,
}

impl Common {
    pub(crate) fn take(fields: &mut Fields, limits: &RequestLimits) -> Result<Self, ApiError> {
        let stream = fields.bool("stream")?.unwrap_or(false);
        let include_usage = fields.take("stream_options").map(|value| include_usage(&value, stream)).transpose()?;
        let most = u32::try_from(limits.choices).unwrap_or(u32::MAX);
        let label =
            |fields: &mut Fields, name: &'static str| Ok::<_, ApiError>(bounded_text(fields, name, 0, 512)?.map(|text| (name, text)));
        let mut log_labels = Vec::new();
        log_labels.extend(label(fields, "user")?);
        log_labels.extend(label(fields, "safety_identifier")?);
        if let Some(metadata) = fields.take("metadata") {
            log_labels.push(("metadata", checked_metadata(&metadata)?));
        }
        Ok(Common {
            model: fields.string("model")?,
            stream,
            include_usage: include_usage.unwrap_or(false),
            n: fields.count("n", 1, most)?.unwrap_or(1),
            seed: fields.integer("seed", i64::MIN, i64::MAX)?.map(|seed| seed as u64),
            sampling: SamplingFields::take(fields)?,
            priority: -(fields.integer("priority", -1000, 1000)?.unwrap_or(0) as i32),
            cache_salt: bounded_text(fields, "cache_salt", 1, 256)?,
            return_token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
            log_labels,
        })
    }
}

/// A string of `low..=high` bytes.
pub(crate) fn bounded_text(fields: &mut Fields, name: &str, low: usize, high: usize) -> Result<Option<String>, ApiError> {
    match fields.string(name)? {
        Some(text) if !(low..=high).contains(&text.len()) => {
            let message = format!("{name} must have {low} to {high} bytes, got {}", text.len());
            Err(ApiError::invalid(name, message))
        }
        text => Ok(text),
    }
}

fn include_usage(value: &Value, stream: bool) -> Result<bool, ApiError> {
    let name = "stream_options";
    let options = value.as_object().ok_or_else(|| wrong_value(name, "an object", value))?;
    if !stream {
        return Err(ApiError::invalid(name, "stream_options is only allowed with stream: true"));
    }
    for (option, value) in options {
        let path = format!("{name}.{}", option.chars().take(64).collect::<String>());
        match (option.as_str(), value) {
            (_, Value::Null) | ("include_usage", Value::Bool(_)) | ("include_obfuscation", Value::Bool(false)) => {}
            ("include_usage", other) => return Err(wrong_value(&path, "a boolean", other)),
            ("include_obfuscation", _) => {
                return Err(ApiError::invalid(path, "stream_options.include_obfuscation may only be false: chunks are not padded"));
            }
            _ => return Err(ApiError::invalid(path.clone(), format!("unknown field {path}"))),
        }
    }
    Ok(options.get("include_usage") == Some(&Value::Bool(true)))
}

fn checked_metadata(value: &Value) -> Result<String, ApiError> {
    let fits = |(key, value): (&String, &Value)| key.len() <= 64 && value.as_str().is_some_and(|text| text.len() <= 512);
    match value.as_object() {
        Some(map) if map.len() <= 16 && map.iter().all(fits) => Ok(value.to_string()),
        _ => Err(ApiError::invalid(
            "metadata",
            "metadata must be an object of at most 16 strings, keys of at most 64 bytes, values of at most 512",
        )),
    }
}
