//! Defaults a model brings for generating text: special token ids and sampling parameters, from
//! `generation_config.json`, `config.json` or GGUF metadata.

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
