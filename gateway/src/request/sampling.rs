//! Sampling fields: read and range-checked here, completed by the model's defaults later.

use forge_shared::generate::SamplingParams;
use forge_shared::link::DefaultSampling;
use serde_json::Value;

use super::fields::{Fields, wrong_value};
use crate::error::ApiError;

/// Most entries of `logit_bias` and `stop_token_ids`.
pub(crate) const MAX_TOKEN_ENTRIES: usize = 1024;

/// What a request says about sampling; `None` is left to the model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SamplingFields {
    /// `temperature`.
    pub temperature: Option<f32>,
    /// `top_p`.
    pub top_p: Option<f32>,
    /// `top_k`; -1 is read as 0.
    pub top_k: Option<u32>,
    /// `min_p`.
    pub min_p: Option<f32>,
    /// `repetition_penalty`.
    pub repetition_penalty: Option<f32>,
    /// `presence_penalty`.
    pub presence_penalty: Option<f32>,
    /// `frequency_penalty`.
    pub frequency_penalty: Option<f32>,
    /// `logit_bias`.
    pub logit_bias: Vec<(u32, f32)>,
    /// `stop`.
    pub stop: Vec<String>,
    /// `stop_token_ids`.
    pub stop_token_ids: Vec<u32>,
    /// `min_tokens`.
    pub min_tokens: u32,
    /// `ignore_eos`.
    pub ignore_eos: bool,
    /// `skip_special_tokens`.
    pub skip_special_tokens: bool,
    /// Alternatives per token of the answer, if log-probabilities are wanted.
    pub logprobs: Option<u32>,
    /// Alternatives per token of the prompt, if their log-probabilities are wanted.
    pub prompt_logprobs: Option<u32>,
}

impl SamplingFields {
    /// Takes the fields both generating routes share; `logprobs` is spelled differently by each.
    pub(crate) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        Ok(SamplingFields {
            temperature: fields.number("temperature", 0.0, 2.0)?,
            top_p: fields.number("top_p", f32::MIN_POSITIVE, 1.0)?,
            top_k: fields.integer("top_k", -1, i64::from(u32::MAX))?.map(|k| k.max(0) as u32),
            min_p: fields.number("min_p", 0.0, 1.0)?,
            repetition_penalty: fields.number("repetition_penalty", 0.01, 100.0)?,
            presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?,
            frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?,
            logit_bias: fields.take("logit_bias").map(|value| logit_bias(&value)).transpose()?.unwrap_or_default(),
            stop: fields.take("stop").map(stop).transpose()?.unwrap_or_default(),
            stop_token_ids: fields.take("stop_token_ids").map(|value| stop_token_ids(&value)).transpose()?.unwrap_or_default(),
            min_tokens: fields.count("min_tokens", 0, u32::MAX)?.unwrap_or(0),
            ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
            skip_special_tokens: fields.bool("skip_special_tokens")?.unwrap_or(true),
            logprobs: None,
            prompt_logprobs: None,
        })
    }

    /// The parameters for an engine: the request's fields, else the model's defaults, else neutral ones.
    pub fn resolve(&self, defaults: &DefaultSampling, max_tokens: u32) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.or(defaults.temperature).unwrap_or(1.0),
            top_k: self.top_k.or(defaults.top_k).unwrap_or(0),
            top_p: self.top_p.or(defaults.top_p).unwrap_or(1.0),
            min_p: self.min_p.or(defaults.min_p).unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            logit_bias: self.logit_bias.clone(),
            max_tokens,
            min_tokens: self.min_tokens,
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token_ids.clone(),
            ignore_eos: self.ignore_eos,
            skip_special_tokens: self.skip_special_tokens,
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
        }
    }
}

/// A token id: a `u32`; the vocabulary is checked where the model is known.
pub(crate) fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

fn logit_bias(value: &Value) -> Result<Vec<(u32, f32)>, ApiError> {
    let name = "logit_bias";
    let map = value.as_object().ok_or_else(|| wrong_value(name, "an object of token ids and biases", value))?;
    if map.len() > MAX_TOKEN_ENTRIES {
        return Err(too_many(name, MAX_TOKEN_ENTRIES, map.len()));
    }
    let entry = |(key, bias): (&String, &Value)| {
        let path = || format!("{name}.{}", key.chars().take(32).collect::<String>());
        // Parsing alone would take "+5" and "05" as well, and then two keys could be one token.
        let token = key.parse::<u32>().ok().filter(|token| token.to_string() == *key);
        let token = token.ok_or_else(|| ApiError::invalid(path(), format!("{} is not a token id", path())))?;
        let bias = bias.as_f64().map(|bias| bias as f32).filter(|bias| (-100.0..=100.0).contains(bias));
        Ok((token, bias.ok_or_else(|| wrong_value(&path(), "a number from -100 to 100", &map[key]))?))
    };
    map.iter().map(entry).collect()
}

fn stop(value: Value) -> Result<Vec<String>, ApiError> {
    let most = SamplingParams::MAX_STOP_STRINGS;
    let expected = format!("a string or a list of at most {most} strings of 1 to 1024 bytes each");
    let list = match value {
        Value::String(text) => vec![Value::String(text)],
        Value::Array(list) if list.len() <= most => list,
        Value::Array(list) => return Err(too_many("stop", most, list.len())),
        other => return Err(wrong_value("stop", &expected, &other)),
    };
    let text = |value: Value| match value {
        Value::String(text) if (1..=1024).contains(&text.len()) => Ok(text),
        Value::String(text) => Err(ApiError::invalid("stop", format!("stop must be {expected}, got one of {} bytes", text.len()))),
        other => Err(wrong_value("stop", &expected, &other)),
    };
    list.into_iter().map(text).collect()
}

fn stop_token_ids(value: &Value) -> Result<Vec<u32>, ApiError> {
    let name = "stop_token_ids";
    let list = value.as_array().ok_or_else(|| wrong_value(name, "a list of token ids", value))?;
    if list.len() > MAX_TOKEN_ENTRIES {
        return Err(too_many(name, MAX_TOKEN_ENTRIES, list.len()));
    }
    list.iter().map(|id| token_id(id).ok_or_else(|| wrong_value(name, "a list of token ids", id))).collect()
}

/// A list or object with too many entries.
pub(crate) fn too_many(name: &str, most: usize, got: usize) -> ApiError {
    ApiError::invalid(name, format!("{name} may have at most {most} entries, got {got}"))
}
