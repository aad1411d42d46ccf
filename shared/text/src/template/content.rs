//! A message's `content`: a string or a list of parts, whichever the template takes.

use serde_json::{Value, json};

use super::{ChatRender, ChatTemplate};
use crate::{Result, TextError};

/// What a template expects as a message's `content`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentFormat {
    /// A string. The texts of a list of parts are joined with newlines for it.
    String,
    /// A list of parts (`[{"type": "text", "text": …}]`). Strings are wrapped for it.
    Parts,
    /// Either.
    Both,
}

const PROBE: &str = "forgeprobe";
/// Instructions for rendering the probe: no template needs more for one message.
pub(super) const PROBE_FUEL: u64 = 200_000;
/// Memory for it.
pub(super) const PROBE_BYTES: usize = 4 << 20;

/// Finds the format by rendering one message in both. A template that takes no lists fails on
/// one or writes it out as a Python list, with quotes around the text.
pub(super) fn detect(template: &ChatTemplate) -> ContentFormat {
    let renders = |content: Value| {
        let messages = [json!({"role": "user", "content": content})];
        let request = ChatRender { messages: &messages, ..ChatRender::default() };
        let Ok(text) = template.render_messages(&messages, &request) else {
            return false;
        };
        let quoted = |quote: &str| text.contains(&format!("{quote}{PROBE}"));
        text.contains(PROBE) && !quoted("'") && !quoted("\"")
    };
    let parts = renders(json!([{"type": "text", "text": PROBE}]));
    let string = renders(json!(PROBE));
    match (string, parts) {
        (true, true) => ContentFormat::Both,
        (false, true) => ContentFormat::Parts,
        (_, false) => ContentFormat::String,
    }
}

fn invalid(field: String, reason: &str) -> TextError {
    TextError::InvalidRequest { field, reason: reason.to_string() }
}

/// Checks messages and brings their content into the template's format.
pub(super) fn normalize(messages: &[Value], format: ContentFormat) -> Result<Vec<Value>> {
    let mut normalized = messages.to_vec();
    for (index, message) in normalized.iter_mut().enumerate() {
        let field = || format!("messages[{index}]");
        let message = message.as_object_mut().ok_or_else(|| invalid(field(), "expected an object"))?;
        let Some(content) = message.get_mut("content") else {
            continue;
        };
        let field = || format!("messages[{index}].content");
        match content {
            Value::Null => {}
            Value::String(text) => {
                if format == ContentFormat::Parts {
                    *content = json!([{"type": "text", "text": text}]);
                }
            }
            Value::Array(parts) => {
                let joined = check_parts(parts, &field())?;
                if format == ContentFormat::String {
                    *content = Value::String(joined);
                }
            }
            _ => return Err(invalid(field(), "expected a string, a list of parts or null")),
        }
    }
    Ok(normalized)
}

/// Checks that all parts are text, and joins them.
fn check_parts(parts: &[Value], field: &str) -> Result<String> {
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let at = || format!("{field}[{index}]");
        match part["type"].as_str() {
            Some("text") => {}
            Some(kind) => {
                return Err(invalid(format!("{}.type", at()), &format!("{kind:?} is not supported; this model takes \"text\" only")));
            }
            None => return Err(invalid(format!("{}.type", at()), "expected \"text\"")),
        }
        let text = part["text"].as_str().ok_or_else(|| invalid(format!("{}.text", at()), "expected a string"))?;
        texts.push(text);
    }
    Ok(texts.join("\n"))
}

/// Puts a mark behind the last message's text; gives that text.
pub(super) fn mark_final_message(messages: &mut [Value], mark: &str) -> Result<String> {
    let field = || "continue_final_message".to_string();
    let last = messages.last_mut().ok_or_else(|| invalid(field(), "there is no message to continue"))?;
    let text = match &mut last["content"] {
        Value::Array(parts) => parts.last_mut().map(|part| &mut part["text"]),
        content => Some(content),
    };
    let Some(Value::String(text)) = text else {
        return Err(invalid(field(), "the last message has no text to continue"));
    };
    let before = text.clone();
    text.push_str(mark);
    Ok(before)
}
