//! From GGUF metadata to an [`Architecture`]: a pure function of the metadata and the tensor directory. The
//! directory tells what the metadata does not: vocabulary size, tied head, biases, stored rope divisors.

use std::collections::BTreeMap;

use super::families::row::{Flag, PositionRow};
use super::families::{self, Family};
use super::rope::ROPE_FREQS;
use super::{Architecture, AttentionSpec, BlockSpec, EmbeddingSpec, HeadSpec, MlpSpec, PositionSpec, RopeLayers, RopeScaling, RopeSpec};
use crate::checkpoint::TensorEntry;
use crate::error::{ModelError, Result};
use crate::gguf::Metadata;
use crate::gguf::metadata::config_error;

/// Reads the architecture from a parsed GGUF file.
///
/// # Errors
/// An unknown family, a missing or senseless key, or a variant that is not implemented; by name.
pub fn from_gguf(metadata: &Metadata, tensors: &BTreeMap<String, TensorEntry>) -> Result<Architecture> {
    from_gguf_as(families::of_gguf(metadata)?, metadata, tensors)
}

/// `general.architecture`.
pub(crate) fn architecture_name(metadata: &Metadata) -> Result<&str> {
    metadata.optional_string("general.architecture")?.ok_or_else(|| config_error("general.architecture", "is missing"))
}

/// As [`from_gguf`], for a family chosen by the operator; keys have the prefix that the file gives them.
///
/// # Errors
/// As [`from_gguf`].
pub(crate) fn from_gguf_as(family: &Family, metadata: &Metadata, tensors: &BTreeMap<String, TensorEntry>) -> Result<Architecture> {
    let name = architecture_name(metadata)?;
    if !["llama", "qwen2", "gpt2"].contains(&family.name) {
        return Err(ModelError::Unsupported {
            what: format!("a GGUF file of family {}", family.name),
            remedy: "take the Hugging Face folder of this model".to_owned(),
        });
    }
    let keys = Keys { metadata, name };
    if let Some(parts) = metadata.optional_u32("split.count")?
        && parts > 1
    {
        return Err(ModelError::Unsupported {
            what: format!("a GGUF model split into {parts} files"),
            remedy: "join them into one (llama-gguf-split --merge)".to_owned(),
        });
    }
    if let Some(experts) = metadata.optional_u32(&keys.key("expert_count"))?
        && experts > 0
    {
        return Err(ModelError::Unsupported {
            what: format!("GGUF metadata: {name}.expert_count = {experts}"),
            remedy: "mixture-of-experts models cannot be served yet".to_owned(),
        });
    }
    let hidden_size = keys.size("embedding_length")?;
    let layers = keys.size("block_count")?;
    if layers > 1 << 16 {
        return Err(config_error(&keys.key("block_count"), format!("is {layers}, more than any model has")));
    }
    let heads = keys.size("attention.head_count")?;
    let head_dim = head_dim(&keys, hidden_size, heads)?;
    let [eps, _] = family.gguf_eps_keys();
    let eps = keys.optional_float(eps)?.ok_or_else(|| config_error(&keys.key(eps), "is missing"))?;
    if let Some(window) = keys.optional_size("attention.sliding_window")?
        && window > 0
    {
        return Err(ModelError::Unsupported {
            what: format!("GGUF metadata: {name}.attention.sliding_window = {window}"),
            remedy: "take the Hugging Face folder of this model, whose configuration says which layers have the window".to_owned(),
        });
    }
    let names = &family.gguf.names;
    let has = |base: &str, ending: &str| tensors.contains_key(&format!("{base}.{ending}"));
    let embedding = format!("{}.weight", names.embedding[0]);
    let vocab_size = tensors.get(&embedding).and_then(|tensor| tensor.shape.first().copied());
    let vocab_size = vocab_size.ok_or_else(|| ModelError::MissingTensors { names: vec![embedding] })?;
    let bias = |flag: Flag, bases: &[&str]| match flag {
        Flag::Always => true,
        Flag::Never => false,
        Flag::Key(..) => bases.iter().any(|base| has(&format!("{}{base}", names.layer.replace("{}", "0")), "bias")),
    };
    Architecture {
        family: family.name,
        hidden_size,
        layers,
        vocab_size,
        context_length: keys.size("context_length")?,
        embedding: EmbeddingSpec { width: hidden_size, scale: 1.0, norm: false },
        norm: family.norm_spec(eps as f32, 0.0),
        block: BlockSpec::PRE_NORM,
        attention: AttentionSpec {
            heads,
            kv_heads: keys.optional_size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            value_dim: head_dim,
            scale: ((head_dim as f64).powf(-0.5)) as f32,
            qkv_bias: bias(family.attention.qkv_bias, &["attn_q", "attn_qkv"]),
            out_bias: bias(family.attention.out_bias, names.out),
            qk_norm: None,
            clip: None,
            softcap: None,
            sinks: false,
            windows: vec![None; layers],
            latent: None,
        },
        position: position(&keys, family, tensors, head_dim, layers)?,
        mlp: MlpSpec {
            intermediate_size: keys.size("feed_forward_length")?,
            gated: family.mlp.gated,
            activation: family.gguf.activation,
            bias: bias(family.mlp.bias, &["ffn_up"]),
        },
        experts: None,
        head: HeadSpec { tied: !names.head.iter().any(|head| has(head, "weight")), bias: false, scale: 1.0, softcap: None },
    }
    .validate("GGUF metadata")
}

/// Keys under the architecture's own prefix.
struct Keys<'a> {
    metadata: &'a Metadata,
    name: &'a str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.name)
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.metadata.size(&self.key(key))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        Ok(self.metadata.optional_u32(&self.key(key))?.map(|size| size as usize))
    }

    fn optional_float(&self, key: &str) -> Result<Option<f64>> {
        self.metadata.optional_float(&self.key(key))
    }
}

fn head_dim(keys: &Keys<'_>, hidden_size: usize, heads: usize) -> Result<usize> {
    let key_length = keys.optional_size("attention.key_length")?;
    let value_length = keys.optional_size("attention.value_length")?;
    if let (Some(key), Some(value)) = (key_length, value_length)
        && key != value
    {
        return Err(ModelError::Unsupported {
            what: format!("keys of {key} and values of {value} per head"),
            remedy: "only models whose keys and values are equally wide can be served".to_owned(),
        });
    }
    match key_length.or(value_length) {
        Some(length) => Ok(length),
        None if heads > 0 && hidden_size.is_multiple_of(heads) => Ok(hidden_size / heads),
        None => Err(config_error(&keys.key("attention.head_count"), format!("{hidden_size} is not a multiple of {heads} heads"))),
    }
}

fn position(
    keys: &Keys<'_>,
    family: &Family,
    tensors: &BTreeMap<String, TensorEntry>,
    head_dim: usize,
    layers: usize,
) -> Result<PositionSpec> {
    const DEFAULT_THETA: f64 = 10_000.0;
    if matches!(family.position, PositionRow::Learned { .. }) {
        return Ok(PositionSpec::Learned { offset: 0 });
    }
    let kind_key = keys.key("rope.scaling.type");
    let scaling = match keys.metadata.optional_string(&kind_key)?.unwrap_or("none") {
        "none" if tensors.contains_key(ROPE_FREQS) => RopeScaling::Tensor,
        "none" => match keys.optional_float("rope.scale_linear")? {
            Some(factor) => RopeScaling::Linear { factor },
            None => RopeScaling::Default,
        },
        "linear" => {
            let factor = keys.optional_float("rope.scaling.factor")?;
            RopeScaling::Linear { factor: factor.ok_or_else(|| config_error(&keys.key("rope.scaling.factor"), "is missing"))? }
        }
        other => {
            return Err(ModelError::Unsupported {
                what: format!("GGUF metadata: {kind_key} = {other:?}"),
                remedy: "take the Hugging Face folder of this model; GGUF files are served with scaling none or linear".to_owned(),
            });
        }
    };
    let rotary_dim = keys.optional_size("rope.dimension_count")?.unwrap_or(head_dim);
    let theta = keys.optional_float("rope.freq_base")?.unwrap_or(DEFAULT_THETA);
    Ok(PositionSpec::Rope(RopeLayers::uniform(RopeSpec { style: family.gguf.rope_style, rotary_dim, theta, scaling }, layers)))
}
