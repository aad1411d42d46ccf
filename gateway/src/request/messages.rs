//! Chat messages: checked to the last key, and brought into the form templates expect.

use serde_json::{Map, Value, json};

use super::fields::wrong_value;
use super::json::type_name;
use crate::error::ApiError;

/// Checks `messages` and returns them for the template; developer messages become system messages.
pub(crate) fn messages(value: Value, most: usize) -> Result<Vec<Value>, ApiError> {
    let Value::Array(list) = value else {
        return Err(wrong_value("messages", "a list of messages", &value));
    };
    if list.is_empty() || list.len() > most {
        return Err(ApiError::invalid("messages", format!("messages must have 1 to {most} entries, got {}", list.len())));
    }
    list.into_iter().enumerate().map(|(index, value)| message(value, &format!("messages[{index}]"))).collect()
}

fn message(value: Value, path: &str) -> Result<Value, ApiError> {
    let Value::Object(mut map) = value else {
        return Err(wrong_value(path, "an object with role and content", &value));
    };
    map.retain(|_, value| !value.is_null());
    let role = match map.shift_remove("role") {
        Some(Value::String(role)) => role,
        Some(other) => return Err(wrong_value(&format!("{path}.role"), "a string", &other)),
        None => return Err(ApiError::invalid(format!("{path}.role"), format!("{path}.role is missing"))),
    };
    let template_role = match role.as_str() {
        "developer" | "system" => "system",
        "user" | "assistant" | "tool" => &role,
        "function" => return Err(refused(&format!("{path}.role"), "the role function is deprecated; use tool")),
        _ => {
            let role: String = role.chars().take(32).collect();
            let message = format!("{path}.role must be one of system, developer, user, assistant, tool, got {role:?}");
            return Err(ApiError::invalid(format!("{path}.role"), message));
        }
    };
    let mut out = Map::new();
    out.insert("role".into(), json!(template_role));
    out.insert("content".into(), content(map.shift_remove("content"), &format!("{path}.content"))?);
    for (key, value) in map {
        let field = format!("{path}.{}", key.chars().take(64).collect::<String>());
        match key.as_str() {
            "name" => out.insert(key, short_text(value, &field)?),
            "tool_call_id" if role == "tool" => out.insert(key, short_text(value, &field)?),
            "tool_calls" | "function_call" => return Err(refused(&field, "tool calling is not supported yet")),
            "audio" => return Err(refused(&field, "messages are text")),
            "refusal" => return Err(refused(&field, "refusals are not told apart from content")),
            "reasoning" | "reasoning_content" => return Err(refused(&field, "reasoning is not separated from content")),
            _ => return Err(refused(&field, "unknown field")),
        };
    }
    if role == "tool" && !out.contains_key("tool_call_id") {
        return Err(ApiError::invalid(format!("{path}.tool_call_id"), format!("{path}.tool_call_id is missing")));
    }
    Ok(Value::Object(out))
}

fn refused(path: &str, why: &str) -> ApiError {
    ApiError::Invalid { param: Some(path.to_owned()), message: format!("{path}: {why}"), code: Some("unsupported_parameter") }
}

fn short_text(value: Value, path: &str) -> Result<Value, ApiError> {
    match &value {
        Value::String(text) if (1..=256).contains(&text.len()) => Ok(value),
        other => Err(wrong_value(path, "a string of 1 to 256 bytes", other)),
    }
}

fn content(value: Option<Value>, path: &str) -> Result<Value, ApiError> {
    match value {
        None => Err(ApiError::invalid(path, format!("{path} is missing"))),
        Some(Value::String(text)) => Ok(Value::String(text)),
        Some(Value::Array(parts)) if !parts.is_empty() => {
            let part = |(index, value)| text_part(value, &format!("{path}[{index}]"));
            parts.into_iter().enumerate().map(part).collect::<Result<_, _>>().map(Value::Array)
        }
        Some(other) => {
            Err(ApiError::invalid(path, format!("{path} must be a string or a non-empty list of text parts, got {}", type_name(&other))))
        }
    }
}

fn text_part(value: Value, path: &str) -> Result<Value, ApiError> {
    let Value::Object(map) = &value else {
        return Err(wrong_value(path, "an object with type and text", &value));
    };
    match map.get("type").and_then(Value::as_str) {
        Some("text") => {}
        Some(kind @ ("image_url" | "input_audio" | "file" | "refusal" | "video_url" | "audio_url")) => {
            return Err(refused(&format!("{path}.type"), &format!("{kind} parts are not supported; this model reads text")));
        }
        _ => return Err(ApiError::invalid(format!("{path}.type"), format!("{path}.type must be \"text\""))),
    }
    if let Some(key) = map.keys().find(|key| !matches!(key.as_str(), "type" | "text")) {
        let key: String = key.chars().take(64).collect();
        return Err(refused(&format!("{path}.{key}"), "unknown field"));
    }
    match map.get("text") {
        Some(Value::String(_)) => Ok(value),
        other => Err(wrong_value(&format!("{path}.text"), "a string", other.unwrap_or(&Value::Null))),
    }
}
