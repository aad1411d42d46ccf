//! Configuration of a process of the cluster (coordinator, worker, gateway): defaults < file < `FORGE_<ROLE>_*` <
//! `--set`, over one serde type.
//!
//! What it is not: a `ModelService` has its own table of keys; here the type's own fields are the keys, in camelCase.
//!
//! Invariants: a later layer wins key by key; every error names the layer and the key; nothing unknown is ignored.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::document::parse_strictly;
use super::{ConfigError, Format, nearest, wrong};
use crate::spec::API_VERSION;

/// A process's configuration. Every field has a default and is written by serde (absent ones as null), so that the type
/// says by itself which keys there are.
pub trait ProcessConfig: Serialize + DeserializeOwned + Default {
    /// `kind` of its documents, such as `Worker`.
    const KIND: &'static str;

    /// The defaults, with one element in every list of groups: what keys there are.
    fn example() -> Self {
        Self::default()
    }

    /// What no single key says: contradictions and ranges.
    ///
    /// # Errors
    /// The key (dotted) and what is wrong with it.
    fn check(&self) -> Result<(), (&'static str, String)>;
}

/// The layers above the defaults.
#[derive(Debug, Clone, Default)]
pub struct ProcessLayers {
    /// Text, format and name of the file.
    pub file: Option<(String, Format, String)>,
    /// Variables; those that do not begin with `FORGE_<KIND>_` are not looked at.
    pub environment: Vec<(String, String)>,
    /// `key=value`, in the order given.
    pub assignments: Vec<String>,
}

impl ProcessLayers {
    /// Merges all layers over the defaults and checks the result.
    ///
    /// # Errors
    /// [`ConfigError`] naming the layer and the key.
    pub fn resolve<T: ProcessConfig>(&self) -> Result<T, ConfigError> {
        let example = as_value(&T::example(), T::KIND)?;
        let mut merging = Merging::<T> { value: as_value(&T::default(), T::KIND)?, example, kept: T::default() };
        if let Some((text, format, origin)) = &self.file {
            let Value::Object(mut top) = parse_strictly(text, *format, origin)? else {
                return Err(wrong(origin, "kind", format!("is missing; write `apiVersion: {API_VERSION}` and `kind: {}`", T::KIND)));
            };
            for (name, expected) in [("apiVersion", API_VERSION), ("kind", T::KIND)] {
                match top.shift_remove(name) {
                    Some(Value::String(found)) if found == expected => {}
                    Some(found) => return Err(wrong(origin, name, format!("expected {expected}, found {found}"))),
                    None => return Err(wrong(origin, name, format!("is missing; write `{name}: {expected}`"))),
                }
            }
            merging.group(&top, "", origin)?;
        }
        let prefix = format!("FORGE_{}_", T::KIND.to_ascii_uppercase());
        for (name, text) in self.environment.iter().filter(|(name, text)| name.starts_with(&prefix) && !text.is_empty()) {
            let keys = leaves(&merging.example);
            let variable = |key: &String| format!("{prefix}{}", screaming(key));
            let Some(key) = keys.iter().find(|key| variable(key) == *name) else {
                let nearest = nearest(name, keys.iter().map(variable));
                return Err(ConfigError::Unknown { origin: "environment".into(), what: "variable", name: name.clone(), nearest });
            };
            merging.text(key, text, "environment", name)?;
        }
        for assignment in &self.assignments {
            let (key, text) =
                assignment.split_once('=').ok_or_else(|| wrong("--set", assignment, "write key=value, for example name=w1".into()))?;
            if !leaves(&merging.example).iter().any(|known| known == key.trim()) {
                return Err(unknown(&merging.example, key.trim(), "--set"));
            }
            merging.text(key.trim(), text, "--set", key.trim())?;
        }
        let origin = self.file.as_ref().map_or("configuration", |(_, _, origin)| origin);
        merging.kept.check().map_err(|(key, reason)| wrong(origin, key, reason))?;
        Ok(merging.kept)
    }
}

/// The configuration so far, as data and as its type.
struct Merging<T> {
    value: Value,
    example: Value,
    kept: T,
}

impl<T: ProcessConfig> Merging<T> {
    fn group(&mut self, group: &Map<String, Value>, path: &str, origin: &str) -> Result<(), ConfigError> {
        for (name, value) in group {
            let full = format!("{path}{name}");
            match (at(&self.example, &full), value) {
                (None, _) => return Err(unknown(&self.example, &full, origin)),
                (Some(Value::Object(_)), Value::Object(inner)) => self.group(inner, &format!("{full}."), origin)?,
                (Some(Value::Object(_)), Value::Null) => {}
                (Some(Value::Object(_)), _) => return Err(wrong(origin, &full, "expected a group of keys".into())),
                (Some(Value::Array(example)), Value::Array(items)) => {
                    let example = example.first().cloned();
                    self.elements(items, example.as_ref(), &full, origin)?;
                    self.set(&full, value.clone(), origin, &full)?;
                }
                (Some(_), _) => self.set(&full, value.clone(), origin, &full)?,
            }
        }
        Ok(())
    }

    /// Names unknown keys in lists of groups, which serde would name without a nearest one.
    fn elements(&self, items: &[Value], example: Option<&Value>, path: &str, origin: &str) -> Result<(), ConfigError> {
        let Some(Value::Object(example)) = example else { return Ok(()) };
        for (index, item) in items.iter().enumerate() {
            let keys = item.as_object().into_iter().flat_map(Map::keys);
            if let Some(key) = keys.into_iter().find(|key| !example.contains_key(*key)) {
                let nearest = nearest(key, example.keys().cloned());
                let name = format!("{path}[{index}].{key}");
                return Err(ConfigError::Unknown { origin: origin.into(), what: "key", name, nearest });
            }
        }
        Ok(())
    }

    /// A value given as text: as it stands, or where its key takes no text, as a number, true, false, or a list.
    fn text(&mut self, key: &str, text: &str, origin: &str, written: &str) -> Result<(), ConfigError> {
        if let Some(Value::Array(_)) = at(&self.example, key) {
            let value = serde_json::from_str(text).ok().filter(Value::is_array);
            let split = || text.split(',').map(|item| Value::from(item.trim())).collect();
            return self.set(key, value.unwrap_or_else(split), origin, written);
        }
        let plain = self.set(key, Value::from(text), origin, written);
        match serde_json::from_str::<Value>(text) {
            Ok(value) if plain.is_err() => self.set(key, value, origin, written),
            _ => plain,
        }
    }

    /// Sets one key, and sees at once whether its type takes the value.
    fn set(&mut self, key: &str, value: Value, origin: &str, written: &str) -> Result<(), ConfigError> {
        let mut candidate = self.value.clone();
        let Some(place) = at_mut(&mut candidate, key) else { return Err(unknown(&self.example, key, origin)) };
        *place = value;
        self.kept = T::deserialize(&candidate).map_err(|error| wrong(origin, written, error.to_string()))?;
        self.value = candidate;
        Ok(())
    }
}

fn as_value<T: Serialize>(config: &T, kind: &str) -> Result<Value, ConfigError> {
    serde_json::to_value(config).map_err(|error| ConfigError::Document { origin: kind.into(), reason: error.to_string() })
}

fn unknown(example: &Value, name: &str, origin: &str) -> ConfigError {
    let nearest = nearest(name, leaves(example).into_iter());
    ConfigError::Unknown { origin: origin.into(), what: "key", name: name.into(), nearest }
}

fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(value, |value, name| value.as_object()?.get(name))
}

fn at_mut<'a>(value: &'a mut Value, path: &str) -> Option<&'a mut Value> {
    path.split('.').try_fold(value, |value, name| value.as_object_mut()?.get_mut(name))
}

/// Paths of all keys that take a value.
fn leaves(example: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for (name, value) in example.as_object().into_iter().flatten() {
        match value {
            Value::Object(_) => found.extend(leaves(value).into_iter().map(|leaf| format!("{name}.{leaf}"))),
            _ => found.push(name.clone()),
        }
    }
    found
}

/// `tls.directory` as `TLS_DIRECTORY`, `dataDir` as `DATA_DIR`.
fn screaming(key: &str) -> String {
    let mut text = String::new();
    for letter in key.chars() {
        if letter == '.' {
            text.push('_');
        } else {
            if letter.is_ascii_uppercase() {
                text.push('_');
            }
            text.push(letter.to_ascii_uppercase());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, rename_all = "camelCase", deny_unknown_fields)]
    struct Probe {
        name: String,
        data_dir: Option<String>,
        port: u16,
        peers: Vec<String>,
        devices: Vec<Device>,
        inner: Inner,
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, rename_all = "camelCase", deny_unknown_fields)]
    struct Inner {
        is_on: bool,
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    struct Device {
        cores: u32,
    }

    impl ProcessConfig for Probe {
        const KIND: &'static str = "Probe";

        fn example() -> Self {
            Probe { devices: vec![Device::default()], ..Probe::default() }
        }

        fn check(&self) -> Result<(), (&'static str, String)> {
            if self.port == 1 { Err(("port", "1 is taken".into())) } else { Ok(()) }
        }
    }

    fn resolve(body: &str, environment: &[(&str, &str)], assignments: &[&str]) -> Result<Probe, String> {
        let text = format!("apiVersion: forge/v1\nkind: Probe\n{body}");
        let layers = ProcessLayers {
            file: Some((text, Format::Yaml, "probe.yaml".into())),
            environment: environment.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
            assignments: assignments.iter().map(|text| text.to_string()).collect(),
        };
        layers.resolve().map_err(|error| format!("{error}; {}", error.help().unwrap_or_default()))
    }

    #[test]
    fn a_later_layer_wins_key_by_key() {
        let body = "name: a\nport: 10\npeers: [x, y]\ninner:\n  isOn: true\ndevices:\n- cores: 2\n";
        let environment =
            [("FORGE_PROBE_PORT", "11"), ("FORGE_PROBE_DATA_DIR", "/data"), ("FORGE_OTHER_PORT", "5"), ("FORGE_PROBE_NAME", "")];
        let probe = resolve(body, &environment, &["port=12", "peers=z,w"]).unwrap();
        let expected = Probe {
            name: "a".into(),
            data_dir: Some("/data".into()),
            port: 12,
            peers: vec!["z".into(), "w".into()],
            devices: vec![Device { cores: 2 }],
            inner: Inner { is_on: true },
        };
        assert_eq!(probe, expected);
        assert_eq!(resolve("", &[("FORGE_PROBE_INNER_IS_ON", "true"), ("FORGE_PROBE_NAME", "7")], &[]).unwrap().name, "7");
    }

    #[test]
    fn errors_name_layer_and_key_and_the_nearest_one() {
        type Case = (&'static str, &'static [(&'static str, &'static str)], &'static [&'static str], &'static [&'static str]);
        let cases: [Case; 11] = [
            ("prot: 1", &[], &[], &["probe.yaml: unknown key `prot`", "did you mean `port`"]),
            ("inner: {isOff: true}", &[], &[], &["inner.isOff", "did you mean `inner.isOn`"]),
            ("devices: [{core: 1}]", &[], &[], &["devices[0].core", "did you mean `cores`"]),
            ("port: high", &[], &[], &["probe.yaml: port", "u16"]),
            ("inner: 3", &[], &[], &["inner", "group of keys"]),
            ("port: 1", &[], &[], &["port: 1 is taken"]),
            ("name: a\nname: b", &[], &[], &["written twice"]),
            ("", &[("FORGE_PROBE_PRT", "1")], &[], &["environment: unknown variable", "FORGE_PROBE_PORT"]),
            ("", &[("FORGE_PROBE_PORT", "x")], &[], &["environment: FORGE_PROBE_PORT"]),
            ("", &[], &["prt=1"], &["--set: unknown key `prt`", "port"]),
            ("", &[], &["port"], &["--set", "key=value"]),
        ];
        for (body, environment, assignments, words) in cases {
            let error = resolve(body, environment, assignments).unwrap_err();
            for word in words {
                assert!(error.contains(word), "{word}: {error}");
            }
        }
    }

    #[test]
    fn the_head_is_asked_for() {
        let read = |text: &str| {
            let file = Some((text.to_owned(), Format::Yaml, "probe.yaml".to_owned()));
            ProcessLayers { file, ..ProcessLayers::default() }.resolve::<Probe>().unwrap_err().to_string()
        };
        assert!(read("name: a").contains("apiVersion: is missing"));
        assert!(read("apiVersion: forge/v1\nkind: Worker").contains("expected Probe"));
        assert!(read("").contains("kind: is missing"));
    }
}
