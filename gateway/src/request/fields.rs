//! Every field of every request body: what it means here, or why it is refused.
//!
//! The table drives the code (`Fields::open` refuses by it) and the documentation (docs/api.md is rendered from it;
//! a test keeps them equal). Invariant: a field that is in no table is refused by name, and a field that is
//! [`Rule::Honoured`] is read by the parser of its route (a test tries each).

use serde_json::{Map, Value};

use super::json::{read_object, type_name};
use crate::error::ApiError;

#[path = "field_tables.rs"]
mod tables;

pub use tables::{CHAT, COMPLETION, DETOKENIZE, ENDPOINTS, TOKENIZE};

/// What happens to a field.
#[derive(Debug, Clone, Copy)]
pub enum Rule {
    /// It does what the text says.
    Honoured(&'static str),
    /// Only values that ask for what happens anyway; others are refused.
    Only {
        /// Those values, in words.
        values: &'static str,
        /// Why others are not.
        why: &'static str,
        /// Whether a value is one of them.
        accepts: fn(&Value) -> bool,
    },
    /// Not supported, with the reason.
    Refused(&'static str),
}

/// A field and its rule.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// As in JSON.
    pub name: &'static str,
    /// What happens to it.
    pub rule: Rule,
    /// A value it may have, as JSON: for documentation and tests.
    pub example: &'static str,
}

/// A route's body.
#[derive(Debug)]
pub struct Endpoint {
    /// Method and path.
    pub route: &'static str,
    /// Its fields, in groups shared between routes. The first group that has a name decides.
    pub groups: &'static [&'static [Field]],
}

impl Endpoint {
    /// All fields, each name once.
    pub fn fields(&self) -> Vec<&'static Field> {
        let mut fields: Vec<&'static Field> = Vec::new();
        for field in self.groups.iter().copied().flatten() {
            if !fields.iter().any(|earlier| earlier.name == field.name) {
                fields.push(field);
            }
        }
        fields
    }

    fn find(&self, name: &str) -> Option<&'static Field> {
        self.groups.iter().copied().flatten().find(|field| field.name == name)
    }
}

/// The honoured fields of a body, taken out one by one.
#[derive(Debug)]
pub(crate) struct Fields {
    map: Map<String, Value>,
}

impl Fields {
    /// Reads a body and applies the route's table: afterwards only honoured fields with a value are left.
    pub(crate) fn open(endpoint: &Endpoint, body: &[u8], max_values: usize) -> Result<Fields, ApiError> {
        let mut map = read_object(body, max_values)?;
        for (name, value) in &map {
            // A null is a field left out, whatever the field: clients send their defaults so.
            match endpoint.find(name).map(|field| field.rule) {
                None => return Err(unknown(endpoint, name)),
                Some(Rule::Refused(why)) if !value.is_null() => {
                    return Err(ApiError::Invalid {
                        param: Some(name.clone()),
                        message: format!("{name} is not supported: {why}"),
                        code: Some("unsupported_parameter"),
                    });
                }
                Some(Rule::Only { values, why, accepts }) if !value.is_null() && !accepts(value) => {
                    return Err(ApiError::Invalid {
                        param: Some(name.clone()),
                        message: format!("{name} may only be {values}: {why}"),
                        code: Some("unsupported_value"),
                    });
                }
                Some(_) => {}
            }
        }
        map.retain(|name, value| !value.is_null() && matches!(endpoint.find(name).map(|field| field.rule), Some(Rule::Honoured(_))));
        Ok(Fields { map })
    }

    /// Takes a field's value.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name)
    }

    /// Checks that every honoured field was taken: one that is left would be ignored in silence.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(name) => Err(ApiError::Internal(format!("the field {name} is honoured by its table and was not read"))),
        }
    }

    pub(crate) fn bool(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "a boolean", |value| value.as_bool())
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.typed(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// An integer within `low..=high`.
    pub(crate) fn integer(&mut self, name: &str, low: i64, high: i64) -> Result<Option<i64>, ApiError> {
        let expected = format!("an integer from {low} to {high}");
        self.typed(name, &expected, |value| value.as_i64().filter(|number| (low..=high).contains(number)))
    }

    /// An integer within `low..=high`, for counts.
    pub(crate) fn count(&mut self, name: &str, low: u32, high: u32) -> Result<Option<u32>, ApiError> {
        let value = self.integer(name, i64::from(low), i64::from(high))?;
        Ok(value.map(|value| value as u32))
    }

    /// A number within `low..=high`.
    pub(crate) fn number(&mut self, name: &str, low: f32, high: f32) -> Result<Option<f32>, ApiError> {
        let expected = format!("a number from {low} to {high}");
        self.typed(name, &expected, |value| {
            let number = value.as_f64()? as f32;
            (number.is_finite() && (low..=high).contains(&number)).then_some(number)
        })
    }

    fn typed<T>(&mut self, name: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, ApiError> {
        self.take(name).map(|value| read(&value).ok_or_else(|| wrong_value(name, expected, &value))).transpose()
    }
}

/// A value that is not what its field takes.
pub(crate) fn wrong_value(name: &str, expected: &str, got: &Value) -> ApiError {
    let shown = match got {
        Value::Number(number) => number.to_string(),
        other => type_name(other).to_owned(),
    };
    ApiError::invalid(name, format!("{name} must be {expected}, got {shown}"))
}

fn unknown(endpoint: &Endpoint, name: &str) -> ApiError {
    let name: String = name.chars().take(64).collect();
    ApiError::Invalid {
        message: format!("unknown field {name:?} for {}; docs/api.md lists the fields", endpoint.route),
        param: Some(name),
        code: Some("unknown_parameter"),
    }
}
