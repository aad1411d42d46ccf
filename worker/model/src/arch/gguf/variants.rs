//! Keys of GGUF metadata that ask for a computation that is not done here.
//!
//! Invariant: under the architecture's own prefix, a key about attention, rotation, experts, a scale or a cap is one that
//! this module knows, or says that it is off, or is refused by name.

use super::keys::Keys;
use crate::error::{ModelError, Result};
use crate::gguf::metadata::{Array, Value};

/// Keys that are read, or that repeat what the tensors tell.
const KNOWN: &[&str] = &[
    "attention.clamp_kqv",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.key_length_mla",
    "attention.kv_lora_rank",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.max_alibi_bias",
    "attention.q_lora_rank",
    "attention.scale",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.value_length",
    "attention.value_length_mla",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "expert_feed_forward_length",
    "expert_gating_func",
    "expert_group_count",
    "expert_group_used_count",
    "expert_shared_count",
    "expert_shared_feed_forward_length",
    "expert_used_count",
    "expert_weights_norm",
    "expert_weights_scale",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.global.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
];

/// Ollama's key of the base of windowed layers, which a family without any has no use for.
const LOCAL_BASE: &str = "rope.local.freq_base";

/// Beginnings and parts of keys that change the computation.
const BEGINNINGS: &[&str] = &["attention.", "rope.", "expert", "swiglu_", "nextn_predict_layers", "moe_", "ssm.", "altup."];
const PARTS: &[&str] = &["scale", "cap"];

/// Keys whose one value is what is computed.
const ONE_VALUE: &[(&str, Value)] = &[
    ("attention.causal", Value::Bool(true)),
    ("rope.scaling.yarn_ext_factor", Value::Float(1.0)),
    ("rope.scaling.yarn_attn_factor", Value::Float(1.0)),
];

impl Keys<'_> {
    pub fn refuse_variants(&self) -> Result<()> {
        let windowed = self.family.attention.windows.is_some();
        for (key, value) in self.metadata.iter() {
            let Some(own) = key.strip_prefix(self.name).and_then(|rest| rest.strip_prefix('.')) else { continue };
            let matters = BEGINNINGS.iter().any(|beginning| own.starts_with(beginning)) || PARTS.iter().any(|part| own.contains(part));
            let passes = match ONE_VALUE.iter().find(|(known, _)| *known == own) {
                Some((_, computed)) => value == computed,
                None => !matters || KNOWN.contains(&own) || (windowed && own == LOCAL_BASE) || is_off(value),
            };
            if !passes {
                let remedy = match own {
                    "rope.dimension_sections" => {
                        "positions of several dimensions belong to models that take images; take one that takes text"
                    }
                    "attention.causal" => "only decoders, which see what is before a token, can be served",
                    _ => "this asks for a computation that is not known; take the Hugging Face folder of this model",
                };
                return Err(ModelError::Unsupported {
                    what: format!("GGUF metadata: {key} = {}", shown(value)),
                    remedy: remedy.to_owned(),
                });
            }
        }
        Ok(())
    }
}

/// Writers put 0 or nothing where a model has no such thing.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Unsigned(number) => *number == 0,
        Value::Signed(number) => *number == 0,
        Value::Float(number) => *number == 0.0,
        Value::Bool(on) => !on,
        Value::String(text) => text.is_empty(),
        Value::Array(Array::I32(numbers)) => numbers.iter().all(|number| *number == 0),
        Value::Array(Array::U32(numbers)) => numbers.iter().all(|number| *number == 0),
        Value::Array(Array::F32(numbers)) => numbers.iter().all(|number| *number == 0.0),
        Value::Array(Array::Bool(flags)) => flags.iter().all(|on| !on),
        Value::Array(_) => false,
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Unsigned(number) => number.to_string(),
        Value::Signed(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Bool(on) => on.to_string(),
        Value::String(text) => format!("{text:?}"),
        Value::Array(_) => "a list".to_owned(),
    }
}
