//! `ModelService` documents in YAML, TOML and JSON: read into settings, and written.
//!
//! Invariant: a key written twice is refused, in every format; so is a key nobody knows.

use std::fmt;

use serde::Serialize;
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::{ConfigError, KEYS, Key, Setting, nearest, unknown_key, wrong};
use crate::spec::{API_VERSION, ModelService};

/// Largest document: a specification is a page, so a larger file is something else.
const MAX_DOCUMENT_BYTES: usize = 1 << 20;

/// A text format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// YAML 1.2; the default, since JSON is almost wholly YAML too.
    Yaml,
    /// TOML 1.0.
    Toml,
    /// JSON.
    Json,
}

impl Format {
    /// The format of a file: by its extension, or where that says nothing by its first letters.
    pub fn detect(file_name: &str, text: &str) -> Format {
        match file_name.rsplit_once('.').map(|(_, extension)| extension.to_ascii_lowercase()).as_deref() {
            Some("json") => return Format::Json,
            Some("toml") => return Format::Toml,
            Some("yaml" | "yml") => return Format::Yaml,
            _ => {}
        }
        let first = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
        match first {
            Some(line) if line.starts_with('{') => Format::Json,
            Some(line) if line.starts_with('[') => Format::Toml,
            // `key = value`, where YAML has `key: value`.
            Some(line) => match (line.find('='), line.find(':')) {
                (Some(equals), colon) if colon.is_none_or(|colon| equals < colon) => Format::Toml,
                _ => Format::Yaml,
            },
            None => Format::Yaml,
        }
    }
}

/// What a document says, key by key.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Document {
    /// `metadata.name`.
    pub name: Option<String>,
    /// Keys under `spec`.
    pub settings: Vec<Setting>,
}

/// Reads a `ModelService` document. `origin` is what errors call it, usually the file's name.
///
/// # Errors
/// [`ConfigError`] naming the file and the key.
pub fn parse_document(text: &str, format: Format, origin: &str) -> Result<Document, ConfigError> {
    let Value::Object(top) = parse_strictly(text, format, origin)? else {
        let reason = "holds no keys; write a ModelService with apiVersion, kind and spec".into();
        return Err(ConfigError::Document { origin: origin.into(), reason });
    };
    check_head(&top, origin)?;
    let name = match top.get("metadata") {
        None => None,
        Some(metadata) => service_name(metadata, origin)?,
    };
    let mut settings = Vec::new();
    match top.get("spec") {
        Some(Value::Object(spec)) => collect(spec, "", origin, &mut settings)?,
        Some(Value::Null) | None => {}
        Some(_) => return Err(wrong(origin, "spec", "expected keys such as `model: smollm2:135m`".into())),
    }
    Ok(Document { name, settings })
}

/// A document as data, in which no key is written twice.
pub(super) fn parse_strictly(text: &str, format: Format, origin: &str) -> Result<Value, ConfigError> {
    let fail = |reason: String| ConfigError::Document { origin: origin.into(), reason };
    if text.len() > MAX_DOCUMENT_BYTES {
        return Err(fail(format!("is {} bytes long; a configuration has at most {MAX_DOCUMENT_BYTES}", text.len())));
    }
    let parsed = match format {
        Format::Yaml => serde_yaml_ng::from_str::<Strict>(text).map_err(|error| format!("not valid YAML: {error}")),
        Format::Toml => toml::from_str::<Strict>(text).map_err(|error| format!("not valid TOML: {error}")),
        Format::Json => serde_json::from_str::<Strict>(text).map_err(|error| format!("not valid JSON: {error}")),
    };
    parsed.map(|strict| strict.0).map_err(fail)
}

fn check_head(top: &Map<String, Value>, origin: &str) -> Result<(), ConfigError> {
    // `status` is what was found of a service, beside the wish for it: `show` writes it, and nobody reads it back.
    const HEAD: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];
    // Another kind has other keys: naming one of them as unknown would mislead.
    if let Some(kind @ ("Coordinator" | "Worker" | "Gateway")) = top.get("kind").and_then(Value::as_str) {
        let program = kind.to_ascii_lowercase();
        let reason = format!(
            "this is the configuration of a {program}, for `forge-{program} --config {origin}`; a ModelService is read here (`kind: ModelService`)"
        );
        return Err(wrong(origin, "kind", reason));
    }
    for name in top.keys() {
        if HEAD.contains(&name.as_str()) {
            continue;
        }
        // A key of the specification written one level too high is the likeliest slip.
        let below = Key::by_path(name).map(|key| format!("spec.{}", key.path));
        let nearest = below.or_else(|| nearest(name, HEAD.iter().map(|name| (*name).to_owned())));
        return Err(ConfigError::Unknown { origin: origin.into(), what: "key", name: name.clone(), nearest });
    }
    for (name, expected) in [("apiVersion", API_VERSION), ("kind", "ModelService")] {
        match top.get(name).and_then(Value::as_str) {
            Some(found) if found == expected => {}
            Some(found) => return Err(wrong(origin, name, format!("this build understands {expected}, found {found:?}"))),
            None => return Err(wrong(origin, name, format!("is missing; write `{name}: {expected}`"))),
        }
    }
    Ok(())
}

fn service_name(metadata: &Value, origin: &str) -> Result<Option<String>, ConfigError> {
    let Value::Object(fields) = metadata else {
        return Err(wrong(origin, "metadata", "expected a group with the key name".into()));
    };
    if let Some(other) = fields.keys().find(|field| *field != "name") {
        return Err(ConfigError::Unknown {
            origin: origin.into(),
            what: "key",
            name: format!("metadata.{other}"),
            nearest: Some("metadata.name".into()),
        });
    }
    match fields.get("name") {
        None => Ok(None),
        Some(Value::String(name)) if !name.is_empty() => Ok(Some(name.clone())),
        Some(other) => Err(wrong(origin, "metadata.name", format!("{other} is not a name; write text, in quotes"))),
    }
}

/// Takes a group of keys apart; `path` is the group's, empty or with a dot at its end.
fn collect(group: &Map<String, Value>, path: &str, origin: &str, into: &mut Vec<Setting>) -> Result<(), ConfigError> {
    for (name, value) in group {
        let full = format!("{path}{name}");
        let below = format!("{full}.");
        let is_group = KEYS.iter().any(|key| key.path.starts_with(&below));
        match (Key::by_path(&full), value) {
            (Some(key), _) => {
                let value = key.check(value).map_err(|reason| wrong(origin, &format!("spec.{full}"), reason))?;
                into.push(Setting { key, value });
            }
            (None, Value::Object(inner)) if is_group => collect(inner, &below, origin, into)?,
            (None, Value::Null) if is_group => {}
            (None, _) if is_group => {
                return Err(wrong(origin, &format!("spec.{full}"), "expected a group of keys".into()));
            }
            (None, _) => return Err(unknown_key(origin, &full)),
        }
    }
    Ok(())
}

/// A service as data. Keys that are absent are left out.
///
/// # Errors
/// None that plain data could cause; the serializer's own.
pub fn to_value(service: &ModelService) -> Result<Value, ConfigError> {
    let fail = |error: serde_json::Error| ConfigError::Document { origin: service.metadata.name.clone(), reason: error.to_string() };
    let mut value = serde_json::to_value(service).map_err(fail)?;
    if let Some(spec) = value["spec"].as_object_mut() {
        spec.retain(|_, value| !value.is_null());
    }
    Ok(value)
}

/// A service as a document. Keys that are absent are left out.
///
/// # Errors
/// [`ConfigError::Document`] where the format cannot hold a value (TOML numbers end at 2^63).
pub fn render(service: &ModelService, format: Format) -> Result<String, ConfigError> {
    let fail = |reason: String| ConfigError::Document { origin: service.metadata.name.clone(), reason };
    let value = to_value(service)?;
    match format {
        Format::Yaml => serde_yaml_ng::to_string(&value).map_err(|error| fail(error.to_string())),
        Format::Toml => toml_text(&value).map_err(|error| fail(error.to_string())),
        Format::Json => serde_json::to_string_pretty(&value).map(|text| text + "\n").map_err(|error| fail(error.to_string())),
    }
}

fn toml_text(value: &impl Serialize) -> Result<String, toml::ser::Error> {
    // By way of a table, which puts a group's plain keys before its subgroups as TOML wants.
    toml::Table::try_from(value).and_then(|table| toml::to_string_pretty(&table))
}

/// A value in which no group has the same key twice; the formats' own values would keep the last in silence.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("keys, lists, text, numbers, true or false")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u128<E: serde::de::Error>(self, value: u128) -> Result<Value, E> {
        Err(E::custom(format!("{value} is larger than any number a key can take")))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        let number = serde_json::Number::from_f64(value);
        number.map(Value::Number).ok_or_else(|| E::custom(format!("{value} is not a number a key can take")))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut group = Map::new();
        while let Some((name, Strict(value))) = entries.next_entry::<String, Strict>()? {
            if group.insert(name.clone(), value).is_some() {
                return Err(serde::de::Error::custom(format!("the key `{name}` is written twice")));
            }
        }
        Ok(Value::Object(group))
    }
}
