//! JSON as it comes from outside: UTF-8 checked, bounded in depth and number of values, no key twice.
//!
//! `serde_json::Value` alone keeps the last of two equal keys in silence, and turns an 8 MiB body of `[],[],…` into
//! hundreds of MiB; this reader refuses both.

use std::cell::{Cell, RefCell};
use std::fmt;

use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::ApiError;

/// Reads one JSON object from a body.
///
/// # Errors
/// [`ApiError::Invalid`] for anything else: not UTF-8, not JSON, not an object, nested deeper than 127, a key twice,
/// more values than `max_values`.
pub(crate) fn read_object(body: &[u8], max_values: usize) -> Result<Map<String, Value>, ApiError> {
    let text = std::str::from_utf8(body)
        .map_err(|error| ApiError::malformed(format!("the body is not valid UTF-8: byte {} does not fit", error.valid_up_to())))?;
    if text.trim_start().is_empty() {
        return Err(ApiError::malformed("the body is empty; send a JSON object"));
    }
    let left = Cell::new(max_values);
    let broken = RefCell::new(None);
    let mut reader = serde_json::Deserializer::from_str(text);
    let read = Bounded { left: &left, broken: Some(&broken) }.deserialize(&mut reader);
    let value = read.and_then(|value| reader.end().map(|()| value)).map_err(|error| match broken.take() {
        None => ApiError::malformed(format!("the body is not valid JSON: {error}")),
        Some(field) => ApiError::invalid(&field, format!("the body is not valid JSON in the field {field:?}: {error}")),
    })?;
    match value {
        Value::Object(map) => Ok(map),
        other => Err(ApiError::malformed(format!("the body must be a JSON object, got {}", type_name(&other)))),
    }
}

fn shortened(key: &str) -> String {
    key.chars().take(64).collect()
}

/// What a value is, for messages.
pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if number.is_f64() => "a number with a fraction",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[derive(Clone, Copy)]
struct Bounded<'a> {
    left: &'a Cell<usize>,
    /// Where the outermost object notes the field in which reading failed.
    broken: Option<&'a RefCell<Option<String>>>,
}

impl Bounded<'_> {
    fn count<E: Error>(&self) -> Result<(), E> {
        let left = self.left.get().checked_sub(1).ok_or_else(|| E::custom("it holds too many values"))?;
        self.left.set(left);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        self.count()?;
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = sequence.next_element_seed(Bounded { broken: None, ..self })? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("the key {:?} stands twice in one object", shortened(&key))));
            }
            let value = entries.next_value_seed(Bounded { broken: None, ..self }).inspect_err(|_| {
                if let Some(broken) = self.broken {
                    broken.replace(Some(shortened(&key)));
                }
            })?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(body: &[u8]) -> String {
        read_object(body, 100).unwrap_err().to_string()
    }

    #[test]
    fn each_refusal_says_what_is_wrong() {
        assert!(message(b"{\"a\": \"\xff\"}").contains("UTF-8: byte 7"));
        assert!(message(b"").contains("empty"));
        assert!(message(b"[1]").contains("got a list"));
        assert!(message(b"{\"a\":1,\"b\":{\"c\":1,\"c\":2}}").contains("\"c\" stands twice"));
        assert!(message(b"{\"a\":1} x").contains("trailing"));
        assert!(message(b"{\"a\":NaN}").contains("in the field \"a\""));
        assert!(message(b"{\"a\":1e999}").contains("out of range"));
        assert!(message(format!("{{\"a\":{}}}", "[".repeat(100_000)).as_bytes()).contains("JSON"));
        assert!(message(format!("{{\"a\":[{}0]}}", "0,".repeat(200)).as_bytes()).contains("too many values"));
    }

    proptest! {
        #[test]
        fn agrees_with_serde_json_on_text_without_double_keys(text in "\\{\"[a-c]\":[\\[\\]{}0-9,\"a-c:.eE+-]{0,12}\\}") {
            let theirs: Result<Map<String, Value>, _> = serde_json::from_str(&text);
            match (read_object(text.as_bytes(), 100), theirs) {
                (Ok(ours), Ok(theirs)) => prop_assert_eq!(ours, theirs),
                (Err(_), Err(_)) => {}
                (Err(error), Ok(_)) => prop_assert!(error.to_string().contains("twice"), "{}", error),
                (Ok(_), Err(error)) => prop_assert!(false, "{}", error),
            }
        }

        #[test]
        fn any_bytes_give_a_value_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_object(&bytes, 100);
        }
    }
}
