//! Sampling a model's makers recommend, from `generation_config.json`. (GGUF metadata holds none.)
//!
//! What it is not: the ids that end or begin a text. Those are the tokenizer's, read by forge-text.
//!
//! Invariant: a request that gives none of these parameters is valid under them.

use forge_shared::generate::SamplingParams;
use serde_json::Value;

use crate::error::Result;
use crate::json::Json;

/// What the model's makers recommend. A request overrides any of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Temperature. 0, greedy, where `do_sample` is false: only if it is written so, for its absence (which also
    /// means greedy to its makers' library) says nothing on what clients of this API expect.
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
    /// From a folder's JSON files. Ranges are a request's own: [`SamplingParams::check`].
    ///
    /// # Errors
    /// A key of another type or a number out of range, by file and key.
    pub(crate) fn from_json(generation: Option<&Value>) -> Result<Self> {
        let generation = Json { file: "generation_config.json", value: generation.unwrap_or(&Value::Null) };
        let float = |key: &str| -> Result<_> { Ok(generation.optional_float(key)?.map(|value| value as f32)) };
        let mut defaults = GenerationDefaults {
            temperature: float("temperature")?,
            top_p: float("top_p")?,
            top_k: generation.optional_id("top_k")?,
            min_p: float("min_p")?,
            repetition_penalty: float("repetition_penalty")?,
        };
        // API fields and keys of the file have the same names.
        let invalid = defaults.as_params().check().err();
        if let Some(invalid) = invalid {
            return Err(generation.error(invalid.field, format!("is {}, must be {}", invalid.actual, invalid.expected)));
        }
        if generation.optional_bool("do_sample")? == Some(false) {
            defaults.temperature = Some(0.0);
        }
        Ok(defaults)
    }

    /// The parameters of a request that gives none.
    fn as_params(&self) -> SamplingParams {
        let default = SamplingParams::default();
        SamplingParams {
            temperature: self.temperature.unwrap_or(default.temperature),
            top_p: self.top_p.unwrap_or(default.top_p),
            top_k: self.top_k.unwrap_or(default.top_k),
            min_p: self.min_p.unwrap_or(default.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(default.repetition_penalty),
            ..default
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(generation: Value) -> Result<GenerationDefaults> {
        GenerationDefaults::from_json(Some(&generation))
    }

    #[test]
    fn what_no_request_may_ask_for_is_refused_by_file_and_key() {
        for (key, value) in [
            ("temperature", json!(2.5)),
            ("temperature", json!(-1)),
            ("temperature", json!(1e300)),
            ("top_p", json!(0)),
            ("top_p", json!(1.01)),
            ("min_p", json!(-0.1)),
            ("repetition_penalty", json!(0.001)),
            ("repetition_penalty", json!("1")),
        ] {
            let message = read(json!({ key: value })).unwrap_err().to_string();
            assert!(message.contains("generation_config.json") && message.contains(key), "{message}");
        }
        let bounds = json!({"temperature": 2, "top_p": 1, "min_p": 1, "repetition_penalty": 0.01, "top_k": 0});
        assert_eq!(read(bounds).unwrap().repetition_penalty, Some(0.01));
    }

    #[test]
    fn only_an_explicit_do_sample_of_false_is_greedy() {
        let temperature = |generation| read(generation).unwrap().temperature;
        assert_eq!(temperature(json!({"do_sample": false, "temperature": 0.6})), Some(0.0));
        assert_eq!(temperature(json!({"do_sample": false})), Some(0.0));
        assert_eq!(temperature(json!({"do_sample": true, "temperature": 0.6})), Some(0.6));
        assert_eq!(temperature(json!({"temperature": 0.6})), Some(0.6));
        assert_eq!(temperature(json!({"do_sample": null})), None);
        assert_eq!(GenerationDefaults::from_json(None).unwrap(), GenerationDefaults::default());
    }
}
