//! Typed getters over a JSON object, with errors that name file and key.
//!
//! A key may be a path, `attn_config.clip_qkv`. `null` counts as absent but where a getter says otherwise.

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

    /// The value of a key, also where it is `null`.
    pub fn find(&self, key: &str) -> Option<&'a Value> {
        key.split('.').try_fold(self.value, |value, part| value.get(part))
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.find(key).filter(|value| !value.is_null())
    }

    /// The first of some keys that has a value.
    pub fn first<'k>(&self, keys: &[&'k str]) -> Option<&'k str> {
        keys.iter().find(|key| self.get(key).is_some()).copied()
    }

    /// Whether any of some keys is there, also as `null`.
    pub fn any(&self, keys: &[&str]) -> bool {
        keys.iter().any(|key| self.find(key).is_some())
    }

    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        number.map(Some).ok_or_else(|| self.error(key, format!("is {value}, a whole number ≥ 0 is needed")))
    }

    /// As [`Json::optional_size`] of the first of some keys.
    pub fn first_size(&self, keys: &[&str]) -> Result<Option<usize>> {
        self.first(keys).map_or(Ok(None), |key| self.optional_size(key))
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

    /// A list of numbers.
    pub fn floats(&self, key: &str) -> Result<Vec<f64>> {
        let list = self.get(key).ok_or_else(|| self.error(key, "is missing"))?;
        let numbers = list.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
        numbers.ok_or_else(|| self.error(key, "must be a list of numbers"))
    }

    /// A list of whole numbers ≥ 0; empty where absent.
    pub fn sizes(&self, key: &str) -> Result<Vec<u64>> {
        let Some(list) = self.get(key) else { return Ok(Vec::new()) };
        let numbers = list.as_array().and_then(|list| list.iter().map(Value::as_u64).collect());
        numbers.ok_or_else(|| self.error(key, "must be a list of whole numbers ≥ 0"))
    }
}
