//! Configuration layers of a [`ModelService`]: defaults < file < `FORGE_*` environment < flags < `--set`.
//!
//! Every layer is a list of [`Setting`]s, each for one key of [`KEYS`], so all of them share one schema, one check and
//! one wording of errors. What it is not: it opens no file and reads no environment; text and variables come in.
//!
//! Invariants: a later layer wins key by key, whatever else the layers hold; nothing unknown is ignored; what
//! [`render`] writes, [`parse_document`] reads back to the same service.

mod document;
mod keys;
mod process;
#[cfg(test)]
mod tests;

use serde_json::{Value, json};

use crate::spec::{ModelService, ModelServiceSpec, SpecError};

pub use document::{Document, Format, parse_document, render, to_value};
pub use keys::{Group, KEYS, Key, Kind};
pub use process::{ProcessConfig, ProcessLayers};

/// Name of a service whose document gives none.
pub const DEFAULT_SERVICE_NAME: &str = "default";

/// Variables that are no key of a service and belong to other parts of Forge.
const OTHER_VARIABLES: [&str; 11] = [
    "FORGE_SERVER",
    "FORGE_CONTEXT",
    "FORGE_HOME",
    "FORGE_OFFLINE",
    "FORGE_HF_REVISION",
    "FORGE_LOG",
    "FORGE_LOG_FORMAT",
    "FORGE_OTLP_ENDPOINT",
    "FORGE_CONFIG",
    "FORGE_CPU_PATH",
    "FORGE_FAULT",
];
/// Beginnings of variables that switch behaviour of tests and of emergency overrides, or belong to processes of a cluster.
const OTHER_PREFIXES: [&str; 4] = ["FORGE_TEST_", "FORGE_ALLOW_", "FORGE_COORDINATOR_", "FORGE_WORKER_"];

/// A configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// A name that is no key.
    #[error("{origin}: unknown {what} `{name}`")]
    Unknown {
        /// File, variable or option.
        origin: String,
        /// `key` or `variable`.
        what: &'static str,
        /// What was written.
        name: String,
        /// The known name that looks most like it.
        nearest: Option<String>,
    },
    /// A value its key cannot take.
    #[error("{origin}: {key}: {reason}")]
    Value {
        /// File, variable or option.
        origin: String,
        /// The key, as its layer writes it.
        key: String,
        /// What is wrong and what to write.
        reason: String,
    },
    /// A document that is no YAML, TOML or JSON, or not a `ModelService`.
    #[error("{origin}: {reason}")]
    Document {
        /// The file.
        origin: String,
        /// What is wrong and what to write.
        reason: String,
    },
    /// Keys that contradict each other, or are out of range.
    #[error(transparent)]
    Spec(#[from] SpecError),
}

impl ConfigError {
    /// What to do about it, where the message itself does not say.
    pub fn help(&self) -> Option<String> {
        match self {
            ConfigError::Unknown { nearest: Some(nearest), .. } => Some(format!("did you mean `{nearest}`?")),
            ConfigError::Unknown { .. } => Some("docs/configuration.md lists every key, flag and variable".into()),
            ConfigError::Value { .. } | ConfigError::Document { .. } | ConfigError::Spec(_) => None,
        }
    }
}

/// One key with a value of its type, and where it was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    key: &'static Key,
    value: Value,
}

impl Setting {
    /// A value given as text by the key's flag.
    ///
    /// # Errors
    /// What the key takes instead, for a parser of arguments that names the flag itself.
    pub fn flag(key: &'static Key, text: &str) -> Result<Self, String> {
        key.parse(text).map(|value| Setting { key, value })
    }

    /// A value given as `--set a.b=v`. The name is the key's path or its flag's name, in camelCase, kebab-case or
    /// snake_case, with or without `spec.` before it.
    ///
    /// # Errors
    /// [`ConfigError`] naming the key, with the nearest known one.
    pub fn assignment(text: &str) -> Result<Self, ConfigError> {
        let origin = "--set";
        let (name, value) =
            text.split_once('=').ok_or_else(|| wrong(origin, text, "write key=value, for example gateway.port=8001".into()))?;
        let key = Key::by_name(name.trim()).ok_or_else(|| unknown_key(origin, name.trim()))?;
        let value = key.parse(value).map_err(|reason| wrong(origin, name.trim(), reason))?;
        Ok(Setting { key, value })
    }

    /// The key.
    pub fn key(&self) -> &'static Key {
        self.key
    }

    /// Its value.
    pub fn value(&self) -> &Value {
        &self.value
    }
}

/// The settings in the variables of an environment. Variables that do not begin with `FORGE_` are not looked at, and
/// empty ones count as unset.
///
/// # Errors
/// [`ConfigError`] for a `FORGE_` variable nobody knows, or whose value its key cannot take.
pub fn from_environment(variables: impl IntoIterator<Item = (String, String)>) -> Result<Vec<Setting>, ConfigError> {
    let origin = "environment";
    let mut settings = Vec::new();
    for (name, value) in variables {
        let foreign = !name.starts_with("FORGE_")
            || OTHER_VARIABLES.contains(&name.as_str())
            || OTHER_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        if foreign || value.is_empty() {
            continue;
        }
        let Some(key) = KEYS.iter().find(|key| key.variable() == name) else {
            let known = KEYS.iter().map(Key::variable).chain(OTHER_VARIABLES.map(str::to_owned));
            return Err(ConfigError::Unknown { origin: origin.into(), what: "variable", nearest: nearest(&name, known), name });
        };
        let value = key.parse(&value).map_err(|reason| wrong(origin, &name, reason))?;
        settings.push(Setting { key, value });
    }
    Ok(settings)
}

/// All layers, lowest first in the order of the fields.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Layers {
    /// A `ModelService` document.
    pub file: Option<Document>,
    /// See [`from_environment`].
    pub environment: Vec<Setting>,
    /// One per flag given.
    pub flags: Vec<Setting>,
    /// `--set`, in the order written; the last of equal keys wins.
    pub assignments: Vec<Setting>,
    /// The model, where no layer names one.
    pub default_model: String,
}

impl Layers {
    /// Merges all layers over the defaults and checks the result.
    ///
    /// # Errors
    /// [`ConfigError::Spec`] for keys that contradict each other or are out of range.
    pub fn resolve(&self) -> Result<ModelService, ConfigError> {
        let defaults = ModelServiceSpec { model: self.default_model.clone(), ..Default::default() };
        let name = self.file.as_ref().and_then(|file| file.name.clone()).unwrap_or(DEFAULT_SERVICE_NAME.into());
        let mut document = json!(ModelService::new(&name, defaults));
        let from_file = self.file.iter().flat_map(|file| &file.settings);
        for setting in from_file.chain(&self.environment).chain(&self.flags).chain(&self.assignments) {
            document["spec"][setting.key.pointer_head()] = merged(&document["spec"], setting);
        }
        let service: ModelService = serde_json::from_value(document)
            .map_err(|error| ConfigError::Document { origin: "configuration".into(), reason: error.to_string() })?;
        service.check()?;
        Ok(service)
    }
}

/// The top-level value of a specification after a setting.
fn merged(spec: &Value, setting: &Setting) -> Value {
    match setting.key.path.split_once('.') {
        None => setting.value.clone(),
        Some((head, tail)) => {
            let mut group = spec[head].clone();
            group[tail] = setting.value.clone();
            group
        }
    }
}

/// A specification with the default of every key, those included that documents leave out.
pub fn default_values(model: &str) -> Value {
    let spec = ModelServiceSpec { model: model.to_owned(), ..Default::default() };
    let rollout = json!(spec.rollout);
    let mut values = json!(spec);
    values["rollout"] = rollout;
    values
}

fn unknown_key(origin: &str, name: &str) -> ConfigError {
    let known = KEYS.iter().map(|key| key.path.to_owned());
    ConfigError::Unknown { origin: origin.into(), what: "key", name: name.into(), nearest: nearest(name, known) }
}

fn wrong(origin: &str, key: &str, reason: String) -> ConfigError {
    ConfigError::Value { origin: origin.into(), key: key.into(), reason }
}

/// The known name most like `name`, if any is alike; a key in a group is also compared without the group.
pub fn nearest(name: &str, known: impl Iterator<Item = String>) -> Option<String> {
    let plain = |text: &str| text.to_ascii_lowercase().replace(['-', '_'], "");
    let wanted = plain(name);
    let likeness = |candidate: &str| {
        let whole = plain(candidate);
        let last = whole.rsplit('.').next().unwrap_or_default().to_owned();
        strsim::jaro_winkler(&wanted, &whole).max(strsim::jaro_winkler(&wanted, &last))
    };
    known
        .map(|candidate| (likeness(&candidate), candidate))
        .filter(|(score, _)| *score > 0.8)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, candidate)| candidate)
}
