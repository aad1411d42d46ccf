//! The small files beside a tokenizer: which tokens are special, and what is put around a text.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::HuggingFaceFiles;
use crate::tokenizer::SpecialIds;
use crate::{Result, TextError};

/// The names under which chat templates and configurations know special tokens.
const SPECIAL_NAMES: &[&str] = &["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The small files, parsed.
#[derive(Debug, Default)]
pub(crate) struct SideFiles {
    pub(crate) tokenizer_config: Map<String, Value>,
    special_tokens_map: Map<String, Value>,
    generation_config: Map<String, Value>,
    config: Map<String, Value>,
}

impl SideFiles {
    pub(crate) fn parse(files: &HuggingFaceFiles) -> Result<Self> {
        let parse = |name: &str, bytes: &Option<Vec<u8>>| match bytes {
            Some(bytes) => parse_object(name, bytes),
            None => Ok(Map::new()),
        };
        Ok(Self {
            tokenizer_config: parse("tokenizer_config.json", &files.tokenizer_config)?,
            special_tokens_map: parse("special_tokens_map.json", &files.special_tokens_map)?,
            generation_config: parse("generation_config.json", &files.generation_config)?,
            config: parse("config.json", &files.config)?,
        })
    }

    /// Whether BOS and EOS are put around a text, where `tokenizer_config.json` says either.
    pub(crate) fn add_flags(&self) -> Option<(bool, bool)> {
        let flag = |name: &str| self.tokenizer_config.get(name).and_then(Value::as_bool);
        let (bos, eos) = (flag("add_bos_token"), flag("add_eos_token"));
        (bos.is_some() || eos.is_some()).then_some((bos == Some(true), eos == Some(true)))
    }

    /// The text of special tokens under the names that chat templates use.
    pub(crate) fn special_token_texts(&self) -> BTreeMap<String, String> {
        SPECIAL_NAMES
            .iter()
            .filter_map(|name| {
                let text = [&self.tokenizer_config, &self.special_tokens_map].into_iter().find_map(|file| token_text(file.get(*name)?))?;
                Some(((*name).to_string(), text.to_string()))
            })
            .collect()
    }

    /// The texts of all tokens that the files name as special ones, `additional_special_tokens` too.
    pub(super) fn all_special_texts(&self) -> BTreeSet<String> {
        let files = [&self.tokenizer_config, &self.special_tokens_map];
        let more = files.into_iter().filter_map(|file| file.get("additional_special_tokens")?.as_array()).flatten().filter_map(token_text);
        more.map(str::to_owned).chain(self.special_token_texts().into_values()).collect()
    }

    /// The id or ids of a field that holds an id, a list of ids or null.
    fn ids(file: &Map<String, Value>, file_name: &str, field: &str) -> Result<Vec<u32>> {
        let one = |value: &Value| {
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| TextError::invalid(format!("{file_name}: {field}"), format!("{value} is not a token id")))
        };
        match file.get(field) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(values)) => values.iter().map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }

    /// Ids with a meaning: the tokenizer's own, then those of the generation's configuration;
    /// the model's configuration counts where neither says anything.
    pub(crate) fn special_ids(&self, token_to_id: impl Fn(&str) -> Option<u32>) -> Result<SpecialIds> {
        let texts = self.special_token_texts();
        let own = |name: &str| token_to_id(texts.get(name)?);
        let generation = |field| Self::ids(&self.generation_config, "generation_config.json", field);
        let model = |field| Self::ids(&self.config, "config.json", field);
        let mut eos: Vec<u32> = Vec::new();
        for id in own("eos_token").into_iter().chain(generation("eos_token_id")?) {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        if eos.is_empty() {
            eos = model("eos_token_id")?;
        }
        let mut bos = own("bos_token");
        if bos.is_none() {
            bos = generation("bos_token_id")?.first().copied();
        }
        if bos.is_none() {
            bos = model("bos_token_id")?.first().copied();
        }
        Ok(SpecialIds { bos, eos, padding: own("pad_token"), unknown: own("unk_token") })
    }
}

/// A token given as its text or as an object with `content`.
pub(super) fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// Parses a JSON object.
pub(crate) fn parse_object(name: &str, bytes: &[u8]) -> Result<Map<String, Value>> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(TextError::invalid(name, "expected a JSON object")),
        Err(error) => Err(TextError::invalid(name, error)),
    }
}
