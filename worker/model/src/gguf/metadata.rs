//! GGUF metadata: keys with typed values, read strictly and handed out by typed getters.

use std::collections::BTreeMap;

use super::reader::{Reader, malformed};
use crate::error::{ModelError, Result};

/// Arrays within arrays deeper than this are refused; no known key nests at all.
const MAX_DEPTH: usize = 4;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// Boolean.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Values of one type.
    Array(Array),
}

/// An array, in its stored width: a hostile file cannot make it take more memory than a small multiple of itself.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // the variants are the element types
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Nested(Vec<Array>),
}

/// All keys of a file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    values: BTreeMap<String, Value>,
}

impl Value {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Value> {
        let kind: u32 = reader.number()?;
        Ok(match kind {
            0 => Value::Unsigned(reader.number::<u8>()?.into()),
            1 => Value::Signed(reader.number::<i8>()?.into()),
            2 => Value::Unsigned(reader.number::<u16>()?.into()),
            3 => Value::Signed(reader.number::<i16>()?.into()),
            4 => Value::Unsigned(reader.number::<u32>()?.into()),
            5 => Value::Signed(reader.number::<i32>()?.into()),
            6 => Value::Float(reader.number::<f32>()?.into()),
            7 => Value::Bool(reader.number()?),
            8 => Value::String(reader.string()?),
            9 => Value::Array(Array::read(reader, 1)?),
            10 => Value::Unsigned(reader.number()?),
            11 => Value::Signed(reader.number()?),
            12 => Value::Float(reader.number()?),
            other => return Err(malformed(format!("value type {other} before byte {} is unknown", reader.position()))),
        })
    }

    fn kind(&self) -> &'static str {
        match self {
            Value::Unsigned(_) | Value::Signed(_) => "an integer",
            Value::Float(_) => "a floating-point number",
            Value::Bool(_) => "a boolean",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
        }
    }
}

impl Array {
    fn read(reader: &mut Reader<'_>, depth: usize) -> Result<Array> {
        let kind: u32 = reader.number()?;
        let smallest_bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            other => return Err(malformed(format!("array element type {other} before byte {} is unknown", reader.position()))),
        };
        let count = reader.count("array elements", smallest_bytes)?;
        Ok(match kind {
            0 => Array::U8(reader.numbers(count)?),
            1 => Array::I8(reader.numbers(count)?),
            2 => Array::U16(reader.numbers(count)?),
            3 => Array::I16(reader.numbers(count)?),
            4 => Array::U32(reader.numbers(count)?),
            5 => Array::I32(reader.numbers(count)?),
            6 => Array::F32(reader.numbers(count)?),
            7 => Array::Bool(reader.numbers(count)?),
            8 => Array::String((0..count).map(|_| reader.string()).collect::<Result<_>>()?),
            10 => Array::U64(reader.numbers(count)?),
            11 => Array::I64(reader.numbers(count)?),
            12 => Array::F64(reader.numbers(count)?),
            _ if depth >= MAX_DEPTH => return Err(malformed(format!("arrays nest deeper than {MAX_DEPTH} at byte {}", reader.position()))),
            _ => Array::Nested((0..count).map(|_| Array::read(reader, depth + 1)).collect::<Result<_>>()?),
        })
    }
}

impl Metadata {
    pub(super) fn read(reader: &mut Reader<'_>, count: usize) -> Result<Metadata> {
        let mut values = BTreeMap::new();
        for _ in 0..count {
            let at = reader.position();
            let key = reader.string()?;
            let value = Value::read(reader)?;
            if values.insert(key.clone(), value).is_some() {
                return Err(malformed(format!("metadata key {key:?} at byte {at} is there twice")));
            }
        }
        Ok(Metadata { values })
    }

    /// Metadata of given values; a later one of the same key counts.
    #[cfg(test)]
    pub(crate) fn of(values: Vec<(String, Value)>) -> Metadata {
        Metadata { values: values.into_iter().collect() }
    }

    /// All keys and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A value as it is.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    fn wrong(key: &str, wanted: &str, found: &Value) -> ModelError {
        config_error(key, format!("is {}, {wanted} is needed", found.kind()))
    }

    /// A whole number ≥ 0 of any width; `None` where the key is absent.
    ///
    /// # Errors
    /// The key is there with another type, or negative or too large.
    pub fn optional_u32(&self, key: &str) -> Result<Option<u32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = match value {
            Value::Unsigned(number) => u32::try_from(*number).ok(),
            Value::Signed(number) => u32::try_from(*number).ok(),
            _ => return Err(Self::wrong(key, "an integer", value)),
        };
        number.map(Some).ok_or_else(|| config_error(key, "does not fit an unsigned 32-bit integer"))
    }

    /// A size.
    ///
    /// # Errors
    /// The key is absent, or as [`Metadata::optional_u32`].
    pub fn size(&self, key: &str) -> Result<usize> {
        self.optional_u32(key)?.map(|number| number as usize).ok_or_else(|| config_error(key, "is missing"))
    }

    /// A number, whole or not; `None` where the key is absent.
    ///
    /// # Errors
    /// The key is there with another type.
    pub fn optional_float(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(number)) => Ok(Some(*number)),
            Some(Value::Unsigned(number)) => Ok(Some(*number as f64)),
            Some(Value::Signed(number)) => Ok(Some(*number as f64)),
            Some(other) => Err(Self::wrong(key, "a number", other)),
        }
    }

    /// A boolean; `None` where the key is absent.
    ///
    /// # Errors
    /// The key is there with another type.
    pub fn optional_bool(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(Self::wrong(key, "a boolean", other)),
        }
    }

    /// A string; `None` where the key is absent.
    ///
    /// # Errors
    /// The key is there with another type.
    pub fn optional_string(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(Self::wrong(key, "a string", other)),
        }
    }

    /// An array of strings; `None` where the key is absent.
    ///
    /// # Errors
    /// The key is there with another type.
    pub fn optional_strings(&self, key: &str) -> Result<Option<&[String]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::String(texts))) => Ok(Some(texts)),
            Some(other) => Err(Self::wrong(key, "an array of strings", other)),
        }
    }

    /// An array of 32-bit integers; `None` where the key is absent.
    ///
    /// # Errors
    /// The key is there with another type.
    pub fn optional_i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::I32(numbers))) => Ok(Some(numbers.clone())),
            Some(Value::Array(Array::U32(numbers))) => match numbers.iter().map(|&number| i32::try_from(number)).collect() {
                Ok(numbers) => Ok(Some(numbers)),
                Err(_) => Err(config_error(key, "holds a number beyond 32 signed bits")),
            },
            Some(other) => Err(Self::wrong(key, "an array of 32-bit integers", other)),
        }
    }

    /// An array of bytes; `None` where the key is absent.
    ///
    /// # Errors
    /// The key is there with another type.
    pub fn optional_bytes(&self, key: &str) -> Result<Option<Vec<u8>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::U8(bytes))) => Ok(Some(bytes.clone())),
            Some(Value::Array(Array::I8(bytes))) => Ok(Some(bytes.iter().map(|&byte| byte as u8).collect())),
            Some(other) => Err(Self::wrong(key, "an array of bytes", other)),
        }
    }

    /// An array of f32; `None` where the key is absent.
    ///
    /// # Errors
    /// The key is there with another type.
    pub fn optional_f32s(&self, key: &str) -> Result<Option<&[f32]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::F32(numbers))) => Ok(Some(numbers)),
            Some(other) => Err(Self::wrong(key, "an array of f32", other)),
        }
    }
}

/// An error of a metadata key.
pub(crate) fn config_error(key: &str, reason: impl Into<String>) -> ModelError {
    ModelError::Config { file: "GGUF metadata".to_owned(), key: key.to_owned(), reason: reason.into() }
}
