//! Defaults a model brings for generating text: special token ids and sampling parameters, from
//! `generation_config.json`, `config.json` or GGUF metadata.

use serde_json::Value;

use crate::error::Result;
use crate::gguf::Metadata;
use crate::gguf::metadata::config_error;
use crate::json::Json;

/// What the model's makers recommend. A request overrides any of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Ids that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Id that begins a text, where the model has one.
    pub bos_token_id: Option<u32>,
    /// Padding id.
    pub pad_token_id: Option<u32>,
    /// Whether sampling is recommended (else greedy).
    pub do_sample: Option<bool>,
    /// Temperature.
    pub temperature: Option<f32>,
    /// Nucleus mass.
    pub top_p: Option<f32>,
    /// Candidates kept.
    pub top_k: Option<u32>,
    /// Probability floor relative to the best candidate.
    pub min_p: Option<f32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
}

impl GenerationDefaults {
    /// From a folder's JSON files; generation_config.json wins over config.json.
    ///
    /// # Errors
    /// A key of another type, or a number out of range.
    pub fn from_json(config: &Value, generation: Option<&Value>) -> Result<Self> {
        let config = Json { file: "config.json", value: config };
        let generation = Json { file: "generation_config.json", value: generation.unwrap_or(&Value::Null) };
        let id = |key: &str| match generation.optional_id(key)? {
            Some(id) => Ok(Some(id)),
            None => config.optional_id(key),
        };
        let mut eos_token_ids = generation.ids("eos_token_id")?;
        if eos_token_ids.is_empty() {
            eos_token_ids = config.ids("eos_token_id")?;
        }
        let float = |key: &str, allowed: std::ops::RangeInclusive<f64>| match generation.optional_float(key)? {
            Some(value) if !allowed.contains(&value) => Err(generation.error(key, format!("is {value}, must be within {allowed:?}"))),
            value => Ok(value.map(|value| value as f32)),
        };
        Ok(GenerationDefaults {
            eos_token_ids,
            bos_token_id: id("bos_token_id")?,
            pad_token_id: id("pad_token_id")?,
            do_sample: generation.optional_bool("do_sample")?,
            temperature: float("temperature", 0.0..=100.0)?,
            top_p: float("top_p", 0.0..=1.0)?,
            top_k: generation.optional_id("top_k")?,
            min_p: float("min_p", 0.0..=1.0)?,
            repetition_penalty: float("repetition_penalty", 1e-3..=1e3)?,
        })
    }

    /// From GGUF metadata, which holds token ids only.
    ///
    /// # Errors
    /// A key of another type.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self> {
        let id = |name: &str| metadata.optional_u32(&format!("tokenizer.ggml.{name}_token_id"));
        let mut eos_token_ids: Vec<u32> = [id("eos")?, id("eot")?, id("eom")?].into_iter().flatten().collect();
        eos_token_ids.dedup();
        Ok(GenerationDefaults { eos_token_ids, bos_token_id: id("bos")?, pad_token_id: id("padding")?, ..Self::default() })
    }

    /// Refuses ids that end or begin a text but are no tokens. (Padding is never computed with.)
    pub(crate) fn check(&self, vocab_size: usize) -> Result<()> {
        match self.eos_token_ids.iter().chain(&self.bos_token_id).find(|&&id| id as usize >= vocab_size) {
            Some(id) => Err(config_error("eos_token_id or bos_token_id", format!("is {id}, outside the vocabulary of {vocab_size}"))),
            None => Ok(()),
        }
    }
}
