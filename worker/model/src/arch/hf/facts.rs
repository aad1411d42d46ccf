//! A config.json with what is needed to read facts of it: the vocabulary of rows, resolved.

use serde_json::Value;

use super::FILE;
use crate::arch::families::Family;
use crate::arch::families::row::{Derived, Flag, Number, Size};
use crate::error::Result;
use crate::json::Json;

/// A config.json that is being read.
pub(super) struct Config<'a> {
    /// The decoder's part.
    pub json: Json<'a>,
    /// The whole file, which says of a model with more than a decoder whether the head is tied.
    pub outer: &'a Value,
    pub family: &'a Family,
    pub hidden_size: usize,
    pub layers: usize,
    pub heads: usize,
}

impl Config<'_> {
    pub fn size(&self, size: &Size) -> Result<usize> {
        if let Some(found) = self.json.first_size(size.keys)? {
            return Ok(found);
        }
        if let Some(absent) = size.absent.filter(|_| !self.json.any(size.keys)) {
            return Ok(absent);
        }
        match size.derived {
            Derived::TimesHidden(factor) => Ok(self.hidden_size.saturating_mul(factor)),
            Derived::Heads => Ok(self.heads),
            Derived::HeadShare if self.heads > 0 && self.hidden_size.is_multiple_of(self.heads) => Ok(self.hidden_size / self.heads),
            Derived::HeadShare => {
                let (hidden, heads) = (self.family.sizes.hidden_size.keys[0], self.family.sizes.heads.keys[0]);
                Err(self.json.error(heads, format!("{hidden} = {} is not a multiple of {} heads", self.hidden_size, self.heads)))
            }
            Derived::Nothing => size.absent.ok_or_else(|| self.json.error(size.keys[0], "is missing")),
        }
    }

    /// The first key that is there; none where it is null.
    pub fn number(&self, number: &Number) -> Result<Option<f64>> {
        match self.json.first(number.keys) {
            Some(key) => self.json.optional_float(key),
            None if self.json.any(number.keys) => Ok(None),
            None => Ok(number.absent),
        }
    }

    /// A number above 0 of a row that may have none.
    pub fn optional_number(&self, number: Option<&Number>) -> Result<Option<f32>> {
        let Some(number) = number else { return Ok(None) };
        let Some(value) = self.number(number)? else { return Ok(None) };
        if value.is_finite() && value > 0.0 {
            return Ok(Some(value as f32));
        }
        let key = number.keys.first().copied().unwrap_or_default();
        Err(self.json.error(key, format!("is {value}, must be positive")))
    }

    /// A factor, 1 where there is none. 0 would erase what it scales, or divide by itself.
    pub fn scale(&self, number: &Number) -> Result<f64> {
        let value = self.number(number)?.unwrap_or(1.0);
        if value.is_finite() && value != 0.0 {
            return Ok(value);
        }
        let key = self.json.first(number.keys).or(number.keys.first().copied()).unwrap_or_default();
        Err(self.json.error(key, format!("is {value}, must be a number other than 0")))
    }

    pub fn flag(&self, flag: Flag) -> Result<bool> {
        match flag {
            Flag::Always => Ok(true),
            Flag::Never => Ok(false),
            Flag::Key(key, absent) => Ok(self.json.optional_bool(key)?.unwrap_or(absent)),
        }
    }

    /// Whether the head's matrix is the embedding's, where the file says it.
    pub fn tied(&self) -> Result<Option<bool>> {
        const KEY: &str = "tie_word_embeddings";
        match self.json.optional_bool(KEY)? {
            Some(tied) => Ok(Some(tied)),
            None => Json { file: FILE, value: self.outer }.optional_bool(KEY),
        }
    }
}
