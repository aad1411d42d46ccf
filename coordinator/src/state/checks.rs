//! Checks of what commands carry: names, texts, numbers.
//!
//! Invariant: every error names the field and says what to write.

use forge_shared::cluster::command::{CommandError, Envelope};

/// Longest name of anything.
const MAX_NAME: usize = 63;

pub(super) fn invalid<T>(field: &str, reason: impl Into<String>) -> Result<T, CommandError> {
    Err(CommandError::Invalid { field: field.to_owned(), reason: reason.into() })
}

pub(super) fn envelope(envelope: &Envelope) -> Result<(), CommandError> {
    let id = &envelope.request_id;
    if id.is_empty() || id.len() > 128 || !id.bytes().all(|byte| byte.is_ascii_graphic()) {
        return invalid("requestId", "must be 1 to 128 visible ASCII characters");
    }
    if envelope.traceparent.len() > 128 || !envelope.traceparent.bytes().all(|byte| byte.is_ascii_graphic()) {
        return invalid("traceparent", "must be a W3C traceparent, or empty");
    }
    Ok(())
}

/// A name that people type: letters, digits and `-._:` between letters or digits.
pub(super) fn name(field: &str, text: &str) -> Result<(), CommandError> {
    let ends = [text.chars().next(), text.chars().next_back()];
    let is_good = (1..=MAX_NAME).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._:".contains(&byte))
        && ends.iter().flatten().all(char::is_ascii_alphanumeric);
    if is_good {
        return Ok(());
    }
    let shown = cut(text, 80);
    invalid(
        field,
        format!("{shown:?} is no name: use 1 to {MAX_NAME} letters, digits and - . _ : that begin and end with a letter or digit"),
    )
}

/// A name that stands in certificates and DNS.
pub(super) fn label(field: &str, text: &str) -> Result<(), CommandError> {
    let is_good = (1..=MAX_NAME).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    if is_good {
        return Ok(());
    }
    let shown = cut(text, 80);
    invalid(field, format!("{shown:?} is no name: use 1 to {MAX_NAME} lower-case letters, digits and -, not at the ends"))
}

pub(super) fn text(field: &str, text: &str, max_bytes: usize) -> Result<(), CommandError> {
    if text.len() > max_bytes {
        return invalid(field, format!("has {} bytes, at most {max_bytes}", text.len()));
    }
    if text.chars().any(char::is_control) {
        return invalid(field, "has control characters; write plain text");
    }
    Ok(())
}

pub(super) fn hex(field: &str, text: &str, digits: usize) -> Result<(), CommandError> {
    if text.len() == digits && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
        return Ok(());
    }
    invalid(field, format!("must be {digits} lower-case hex digits"))
}

/// `host:port`.
pub(super) fn address(field: &str, text: &str) -> Result<(), CommandError> {
    let parts = text.rsplit_once(':');
    let is_good = text.len() <= 261
        && text.bytes().all(|byte| byte.is_ascii_graphic())
        && parts.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0));
    if is_good { Ok(()) } else { invalid(field, format!("{:?} is no address: write host:port", cut(text, 80))) }
}

/// The text, cut to at most so many bytes between characters.
pub(super) fn cut(text: &str, max_bytes: usize) -> String {
    if text.len() <= max_bytes {
        return text.to_owned();
    }
    let end = (0..=max_bytes.saturating_sub(3)).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    format!("{}…", &text[..end])
}

/// `NotFound`, with the known name most like the one asked for.
pub(super) fn not_found<'a>(kind: &str, name: &str, known: impl Iterator<Item = &'a str>) -> CommandError {
    let name = cut(name, 80);
    let nearest = known
        .map(|known| (strsim::jaro_winkler(&name, known), known))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0).then_with(|| b.1.cmp(a.1)))
        .map(|(_, known)| known.to_owned());
    CommandError::NotFound { kind: kind.to_owned(), name, nearest }
}

pub(super) fn bounded(kind: &str, count: usize, limit: usize) -> Result<(), CommandError> {
    if count >= limit { Err(CommandError::TooMany { kind: kind.to_owned(), limit }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_other_texts() {
        for good in ["a", "demo", "smollm2:135m", "Qwen2.5-0.5B", "a_b"] {
            assert_eq!(name("f", good), Ok(()), "{good}");
        }
        for bad in ["", "-a", "a-", "a/b", "a b", "ä", &"a".repeat(64), "a\n"] {
            assert!(name("f", bad).is_err(), "{bad:?}");
        }
        assert!(label("f", "worker-1").is_ok() && label("f", "Worker").is_err() && label("f", "a.b").is_err());
        assert!(address("f", "10.0.0.1:7100").is_ok() && address("f", "[::1]:7100").is_ok());
        assert!(address("f", "host").is_err() && address("f", ":1").is_err() && address("f", "h:0").is_err());
    }

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(cut("abc", 3), "abc");
        assert!(cut(&"ä".repeat(600), 1_024).len() <= 1_024);
    }
}
