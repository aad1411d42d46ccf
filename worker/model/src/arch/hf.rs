//! From `config.json` to an [`Architecture`]: a pure function. Understands the spellings of transformers 4
//! (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).

use forge_kernels::{ActivationKind, RopeStyle};
use serde_json::Value;

use super::families::{self, Bias, Family};
use super::{Architecture, AttentionSpec, BlockSpec, EmbeddingSpec, HeadSpec, MlpSpec, PositionSpec, RopeLayers, RopeScaling, RopeSpec};
use crate::error::{ModelError, Result};
use crate::json::Json;

const FILE: &str = "config.json";

/// Reads the architecture from a parsed config.json.
///
/// # Errors
/// An unknown family, a missing or senseless key, or a variant that is not implemented; by name.
pub fn from_config_json(config: &Value) -> Result<Architecture> {
    from_config_json_as(families::by_model_type(config)?, config)
}

/// As [`from_config_json`], for a family chosen by the operator.
///
/// # Errors
/// As [`from_config_json`].
pub(crate) fn from_config_json_as(family: &Family, config: &Value) -> Result<Architecture> {
    let json = Json { file: FILE, value: config };
    refuse_variants(&json, family)?;
    let keys = &family.hf.keys;
    let hidden_size = json.size(keys.hidden_size)?;
    let layers = json.size(keys.layers)?;
    let heads = json.size(keys.heads)?;
    let head_dim = match json.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
        None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => return Err(json.error(keys.heads, format!("{} = {hidden_size} is not a multiple of {heads} heads", keys.hidden_size))),
    };
    let intermediate_size = match (json.optional_size(keys.intermediate_size)?, keys.default_intermediate_factor) {
        (Some(size), _) => size,
        (None, Some(factor)) => hidden_size.saturating_mul(factor),
        (None, None) => return Err(json.error(keys.intermediate_size, "is missing")),
    };
    let context_length = json.optional_size(keys.context_length)?.unwrap_or(keys.default_context);
    let position = if family.rope {
        PositionSpec::Rope(RopeLayers::uniform(rope(&json, head_dim, context_length)?, layers.min(1 << 16)))
    } else {
        PositionSpec::Learned { offset: 0 }
    };
    let bias = |bias: Bias| match bias {
        Bias::Always => Ok(true),
        Bias::Never => Ok(false),
        Bias::Key(key) => json.optional_bool(key).map(Option::unwrap_or_default),
    };
    Architecture {
        family: family.name,
        hidden_size,
        layers,
        vocab_size: json.size("vocab_size")?,
        context_length,
        embedding: EmbeddingSpec { width: hidden_size, scale: 1.0, norm: false },
        norm: family.norm_spec(json.optional_float(keys.eps)?.unwrap_or(keys.default_eps) as f32),
        block: BlockSpec::PRE_NORM,
        attention: AttentionSpec {
            heads,
            kv_heads: json.optional_size("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            value_dim: head_dim,
            scale: ((head_dim as f64).powf(-0.5)) as f32,
            qkv_bias: bias(family.qkv_bias)?,
            out_bias: bias(family.out_bias)?,
            qk_norm: None,
            clip: None,
            softcap: None,
            sinks: false,
            windows: windows(&json, family, layers)?,
            latent: None,
        },
        position,
        mlp: MlpSpec {
            intermediate_size,
            gated: family.gated,
            activation: activation(&json, keys.activation, keys.default_activation)?,
            bias: bias(family.mlp_bias)?,
        },
        experts: None,
        head: HeadSpec {
            tied: json.optional_bool("tie_word_embeddings")?.unwrap_or(family.hf.tied_default),
            bias: false,
            scale: 1.0,
            softcap: None,
        },
    }
    .validate(FILE)
}

fn refuse_variants(json: &Json<'_>, family: &Family) -> Result<()> {
    if let Some(quantization) = json.get("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        return Err(ModelError::Unsupported {
            what: format!("a checkpoint quantized by `{method}` (config.json: quantization_config)"),
            remedy: "take the unquantized checkpoint, or a GGUF file as Q4_0, Q4_1 or Q8_0".to_owned(),
        });
    }
    for &(key, only) in family.hf.fixed {
        if json.optional_bool(key)?.is_some_and(|value| value != only) {
            return Err(ModelError::Unsupported {
                what: format!("config.json: {key} = {}", !only),
                remedy: format!("only models with {key} = {only} can be served"),
            });
        }
    }
    Ok(())
}

fn activation(json: &Json<'_>, key: &str, default: &str) -> Result<ActivationKind> {
    match json.optional_str(key)?.unwrap_or(default) {
        "silu" | "swish" => Ok(ActivationKind::Silu),
        "gelu" => Ok(ActivationKind::GeluErf),
        "gelu_new" | "gelu_pytorch_tanh" => Ok(ActivationKind::GeluTanh),
        "relu" => Ok(ActivationKind::Relu),
        other => Err(ModelError::Unsupported {
            what: format!("config.json: {key} = {other:?}"),
            remedy: "supported activations: silu, gelu, gelu_new, gelu_pytorch_tanh, relu".to_owned(),
        }),
    }
}

/// Sliding windows per layer: from `layer_types`, or every layer from `max_window_layers` on.
fn windows(json: &Json<'_>, family: &Family, layers: usize) -> Result<Vec<Option<u32>>> {
    // Bounded by `validate` later, but the list is made here.
    if layers > 1 << 16 {
        return Err(json.error(family.hf.keys.layers, format!("is {layers}, more than any model has")));
    }
    if !family.hf.keys.windows || !json.optional_bool("use_sliding_window")?.unwrap_or(false) {
        return Ok(vec![None; layers]);
    }
    let window = match json.optional_id("sliding_window")? {
        None => return Ok(vec![None; layers]),
        Some(0) => return Err(json.error("sliding_window", "is 0, must be at least 1")),
        Some(window) => window,
    };
    let Some(types) = json.get("layer_types") else {
        let first = json.size("max_window_layers")?;
        return Ok((0..layers).map(|layer| (layer >= first).then_some(window)).collect());
    };
    let types = types.as_array().filter(|types| types.len() == layers);
    let types = types.ok_or_else(|| json.error("layer_types", format!("must be a list of {layers} names")))?;
    types
        .iter()
        .map(|kind| match kind.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => Ok(Some(window)),
            _ => Err(json.error("layer_types", format!("holds {kind}; known are full_attention and sliding_attention"))),
        })
        .collect()
}

fn rope(json: &Json<'_>, head_dim: usize, context_length: usize) -> Result<RopeSpec> {
    const DEFAULT_THETA: f64 = 10_000.0;
    let (key, value) = match (json.get("rope_parameters"), json.get("rope_scaling")) {
        (Some(value), _) => ("rope_parameters", value),
        (None, Some(value)) => ("rope_scaling", value),
        (None, None) => ("rope_scaling", &Value::Null),
    };
    let params = Json { file: FILE, value };
    if !(value.is_null() || value.is_object()) {
        return Err(json.error(key, "must be an object"));
    }
    if value.as_object().is_some_and(|object| object.values().any(Value::is_object)) {
        return Err(ModelError::Unsupported {
            what: format!("config.json: {key} per layer type"),
            remedy: "models whose layers rotate differently cannot be served yet".to_owned(),
        });
    }
    let theta = match params.optional_float("rope_theta")? {
        Some(theta) => theta,
        None => json.optional_float("rope_theta")?.unwrap_or(DEFAULT_THETA),
    };
    let partial = match params.optional_float("partial_rotary_factor")? {
        Some(partial) => partial,
        None => json.optional_float("partial_rotary_factor")?.unwrap_or(1.0),
    };
    let kind = match params.optional_str("rope_type")? {
        Some(kind) => kind,
        None => params.optional_str("type")?.unwrap_or("default"),
    };
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: params.float("factor")? },
        "dynamic" => RopeScaling::Dynamic { factor: params.float("factor")?, trained_context: context_length as f64 },
        "llama3" => RopeScaling::Llama3 {
            factor: params.float("factor")?,
            low_freq_factor: params.float("low_freq_factor")?,
            high_freq_factor: params.float("high_freq_factor")?,
            original_context: params.float("original_max_position_embeddings")?,
        },
        "yarn" => yarn(&params, context_length)?,
        other => {
            return Err(ModelError::Unsupported {
                what: format!("config.json: {key}: rope_type = {other:?}"),
                remedy: "supported: default, linear, llama3, yarn".to_owned(),
            });
        }
    };
    Ok(RopeSpec { style: RopeStyle::Neox, rotary_dim: (head_dim as f64 * partial) as usize, theta, scaling })
}

fn yarn(params: &Json<'_>, context_length: usize) -> Result<RopeScaling> {
    let original_context = params.optional_float("original_max_position_embeddings")?.unwrap_or(context_length as f64);
    let factor = params.optional_float("factor")?.unwrap_or(context_length as f64 / original_context);
    let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let attention_factor = match params.optional_float("attention_factor")? {
        Some(given) => given,
        None => match (params.optional_float("mscale")?, params.optional_float("mscale_all_dim")?) {
            (Some(some), Some(all)) if some != 0.0 && all != 0.0 => magnitude(some) / magnitude(all),
            _ => magnitude(1.0),
        },
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_context,
        beta_fast: params.optional_float("beta_fast")?.unwrap_or(32.0),
        beta_slow: params.optional_float("beta_slow")?.unwrap_or(1.0),
        attention_factor,
        truncate: params.optional_bool("truncate")?.unwrap_or(true),
    })
}

#[cfg(test)]
#[path = "hf_tests.rs"]
mod tests;
