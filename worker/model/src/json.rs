//! Typed getters over a JSON object, with errors that name file and key.

use serde_json::Value;

use crate::error::{ModelError, Result};

/// A JSON object of a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Json<'a> {
    pub file: &'static str,
    pub value: &'a Value,
}

impl<'a> Json<'a> {
    pub fn error(&self, key: &str, reason: impl Into<String>) -> ModelError {
        ModelError::Config { file: self.file.to_owned(), key: key.to_owned(), reason: reason.into() }
    }

    /// The value of a key; `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        number.map(Some).ok_or_else(|| self.error(key, format!("is {value}, a whole number ≥ 0 is needed")))
    }

    pub fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    pub fn optional_id(&self, key: &str) -> Result<Option<u32>> {
        self.optional_size(key)?.map(|id| u32::try_from(id).map_err(|_| self.error(key, format!("is {id}, beyond 32 bits")))).transpose()
    }

    pub fn optional_float(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.error(key, format!("is {value}, a number is needed")))
    }

    pub fn float(&self, key: &str) -> Result<f64> {
        self.optional_float(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    pub fn optional_bool(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.error(key, format!("is {value}, true or false is needed")))
    }

    pub fn optional_str(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.error(key, format!("is {value}, a string is needed")))
    }

    /// One id or a list of ids.
    pub fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let wrong = |value: &Value| self.error(key, format!("is {value}, a token id or a list of them is needed"));
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| wrong(value));
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(single) => Ok(vec![id(single)?]),
        }
    }
}
