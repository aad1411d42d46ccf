//! The table of model families: one row each, names and differences as data.
//!
//! Adding a family is adding a row and a golden test; the readers ([`super::hf`], [`super::gguf`]), the name check
//! (`weights`) and the decoder follow the row.

use forge_kernels::{ActivationKind, NormKind, RopeStyle};

use super::NormSpec;
use crate::error::{ModelError, Result};
use crate::gguf::Metadata;

/// A row of the table.
#[derive(Debug)]
pub struct Family {
    /// Name of the row.
    pub name: &'static str,
    /// `model_type` values of config.json.
    pub model_types: &'static [&'static str],
    /// `general.architecture` values of GGUF metadata.
    pub gguf_architectures: &'static [&'static str],
    pub(crate) norm: NormKind,
    pub(crate) gated: bool,
    pub(crate) rope: bool,
    pub(crate) qkv_bias: Bias,
    pub(crate) out_bias: Bias,
    pub(crate) mlp_bias: Bias,
    pub(crate) hf: HfRow,
    pub(crate) gguf: GgufRow,
}

/// Whether products have biases. In a GGUF file, which has no such keys, `Key` goes by the tensors of layer 0.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bias {
    Always,
    Never,
    /// A boolean of config.json, false where absent.
    Key(&'static str),
}

/// How a family is written in a Hugging Face folder.
#[derive(Debug)]
pub(crate) struct HfRow {
    pub keys: ConfigKeys,
    /// Keys that change the computation in a way not implemented, with the one value that is.
    pub fixed: &'static [(&'static str, bool)],
    pub tied_default: bool,
    /// Prefix of every name but the head's; older files lack it.
    pub prefix: &'static str,
    /// Matrices are stored [inputs, outputs] (GPT-2's Conv1D) and are transposed in memory at load.
    pub transposed: bool,
    pub names: TensorNames,
    /// Endings of names that hold no weights (masks, frequencies saved by old exporters).
    pub ignored: &'static [&'static str],
}

/// How a family is written in a GGUF file; names are the format's own, the same for all families.
#[derive(Debug)]
pub(crate) struct GgufRow {
    /// The converter permutes q and k rows of some families, which turns the pair layout into the other one.
    pub rope_style: RopeStyle,
    pub activation: ActivationKind,
    pub names: TensorNames,
}

/// Keys of config.json with the values that the family's configuration class has where a key is absent.
#[derive(Debug)]
pub(crate) struct ConfigKeys {
    pub hidden_size: &'static str,
    pub layers: &'static str,
    pub heads: &'static str,
    pub context_length: &'static str,
    pub default_context: usize,
    pub intermediate_size: &'static str,
    /// Where the inner width may be left out: this many times the hidden size.
    pub default_intermediate_factor: Option<usize>,
    pub eps: &'static str,
    pub default_eps: f64,
    pub activation: &'static str,
    pub default_activation: &'static str,
    /// Keys of sliding windows are honoured (else the family has none).
    pub windows: bool,
}

/// Base names of a tensor (`.weight` and `.bias` are appended): the first that the checkpoint has is meant. Empty where
/// the family has no such tensor.
pub(crate) type Names = &'static [&'static str];

/// Names of tensors. `{}` in `layer` is the layer; names of a layer's tensors follow it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TensorNames {
    pub embedding: Names,
    pub positions: Names,
    pub embedding_norm: Names,
    /// Projections between an embedding and a hidden size that differ.
    pub project_in: Names,
    pub project_out: Names,
    pub final_norm: Names,
    pub head: Names,
    pub layer: &'static str,
    pub attention_norm: Names,
    pub attention_post_norm: Names,
    /// Ways to store q, k and v: the first of which the checkpoint has a tensor is meant.
    pub qkv: &'static [QkvNames],
    pub q_norm: Names,
    pub k_norm: Names,
    /// Its whole name, without `.weight`.
    pub sinks: Names,
    pub latent: Option<LatentNames>,
    pub out: Names,
    pub mlp_norm: Names,
    pub mlp_post_norm: Names,
    /// Ways to store a layer's MLP, as for `qkv`.
    pub mlp: &'static [MlpNames],
    pub experts: Option<ExpertNames>,
}

/// How q, k and v are stored.
#[derive(Debug, Clone, Copy)]
pub(crate) enum QkvNames {
    Separate {
        q: &'static str,
        k: &'static str,
        v: &'static str,
    },
    /// One matrix of rows q, then k, then v.
    Concat(&'static str),
    /// One matrix of rows [KV heads, (query heads of the group, key, value), head_dim]. With as many KV heads as query
    /// heads that is [heads, (q, k, v), head_dim].
    Grouped(&'static str),
}

/// Names of multi-head latent attention; see [`super::LatentSpec`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct LatentNames {
    /// Where there is no query latent.
    pub q: &'static str,
    pub q_a: &'static str,
    pub q_a_norm: &'static str,
    pub q_b: &'static str,
    pub kv_a: &'static str,
    pub kv_a_norm: &'static str,
    /// Rows [heads, (key, value), …].
    pub kv_b: &'static str,
}

/// How an MLP is stored.
#[derive(Debug, Clone, Copy)]
pub(crate) enum MlpNames {
    Separate {
        gate: &'static str,
        up: &'static str,
        down: &'static str,
    },
    /// One matrix of rows gate, then up.
    GateUp {
        gate_up: &'static str,
        down: &'static str,
    },
    /// No gate.
    Plain {
        up: &'static str,
        down: &'static str,
    },
}

/// Names of a layer's experts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExpertNames {
    pub router: &'static str,
    /// Its whole name, without `.weight`.
    pub correction_bias: Names,
    /// Ways to store experts: the first of which the checkpoint has a tensor is meant.
    pub storage: &'static [ExpertStorage],
    pub shared: &'static [MlpNames],
    pub shared_gate: &'static str,
}

/// How experts are stored.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ExpertStorage {
    /// Tensors of each; `{}` in the names is the expert.
    PerExpert(MlpNames),
    /// Three-dimensional tensors [experts, outputs, inputs] with `.weight` (GGUF).
    Stacked(MlpNames),
    /// Whole names of [experts, inputs, outputs], with `_bias` appended for biases; outputs are gate and up by turns
    /// (GPT-OSS).
    TransposedByTurns { gate_up: &'static str, down: &'static str },
}

const NO_NAMES: TensorNames = TensorNames {
    embedding: &[],
    positions: &[],
    embedding_norm: &[],
    project_in: &[],
    project_out: &[],
    final_norm: &[],
    head: &[],
    layer: "",
    attention_norm: &[],
    attention_post_norm: &[],
    qkv: &[],
    q_norm: &[],
    k_norm: &[],
    sinks: &[],
    latent: None,
    out: &[],
    mlp_norm: &[],
    mlp_post_norm: &[],
    mlp: &[],
    experts: None,
};

const LLAMA_NAMES: TensorNames = TensorNames {
    embedding: &["embed_tokens"],
    final_norm: &["norm"],
    head: &["lm_head"],
    layer: "layers.{}.",
    attention_norm: &["input_layernorm"],
    qkv: &[QkvNames::Separate { q: "self_attn.q_proj", k: "self_attn.k_proj", v: "self_attn.v_proj" }],
    out: &["self_attn.o_proj"],
    mlp_norm: &["post_attention_layernorm"],
    mlp: &[MlpNames::Separate { gate: "mlp.gate_proj", up: "mlp.up_proj", down: "mlp.down_proj" }],
    ..NO_NAMES
};

const GGUF_NAMES: TensorNames = TensorNames {
    embedding: &["token_embd"],
    positions: &["position_embd"],
    final_norm: &["output_norm"],
    head: &["output"],
    layer: "blk.{}.",
    attention_norm: &["attn_norm"],
    qkv: &[QkvNames::Separate { q: "attn_q", k: "attn_k", v: "attn_v" }, QkvNames::Concat("attn_qkv")],
    out: &["attn_output"],
    mlp_norm: &["ffn_norm"],
    mlp: &[MlpNames::Separate { gate: "ffn_gate", up: "ffn_up", down: "ffn_down" }],
    ..NO_NAMES
};

const LLAMA_KEYS: ConfigKeys = ConfigKeys {
    hidden_size: "hidden_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    context_length: "max_position_embeddings",
    default_context: 2048,
    intermediate_size: "intermediate_size",
    default_intermediate_factor: None,
    eps: "rms_norm_eps",
    default_eps: 1e-6,
    activation: "hidden_act",
    default_activation: "silu",
    windows: false,
};

/// All rows.
pub static FAMILIES: [Family; 3] = [
    Family {
        name: "llama",
        model_types: &["llama"],
        gguf_architectures: &["llama"],
        norm: NormKind::Rms,
        gated: true,
        rope: true,
        qkv_bias: Bias::Key("attention_bias"),
        out_bias: Bias::Key("attention_bias"),
        mlp_bias: Bias::Key("mlp_bias"),
        hf: HfRow {
            keys: LLAMA_KEYS,
            fixed: &[],
            tied_default: false,
            prefix: "model.",
            transposed: false,
            names: LLAMA_NAMES,
            ignored: &["rotary_emb.inv_freq"],
        },
        gguf: GgufRow { rope_style: RopeStyle::Gptj, activation: ActivationKind::Silu, names: GGUF_NAMES },
    },
    Family {
        name: "qwen2",
        model_types: &["qwen2"],
        gguf_architectures: &["qwen2"],
        norm: NormKind::Rms,
        gated: true,
        rope: true,
        qkv_bias: Bias::Always,
        out_bias: Bias::Never,
        mlp_bias: Bias::Never,
        hf: HfRow {
            keys: ConfigKeys { default_context: 32768, windows: true, ..LLAMA_KEYS },
            fixed: &[],
            tied_default: false,
            prefix: "model.",
            transposed: false,
            names: LLAMA_NAMES,
            ignored: &["rotary_emb.inv_freq"],
        },
        gguf: GgufRow { rope_style: RopeStyle::Neox, activation: ActivationKind::Silu, names: GGUF_NAMES },
    },
    Family {
        name: "gpt2",
        model_types: &["gpt2"],
        gguf_architectures: &["gpt2"],
        norm: NormKind::Layer,
        gated: false,
        rope: false,
        qkv_bias: Bias::Always,
        out_bias: Bias::Always,
        mlp_bias: Bias::Always,
        hf: HfRow {
            keys: ConfigKeys {
                hidden_size: "n_embd",
                layers: "n_layer",
                heads: "n_head",
                context_length: "n_positions",
                default_context: 1024,
                intermediate_size: "n_inner",
                default_intermediate_factor: Some(4),
                eps: "layer_norm_epsilon",
                default_eps: 1e-5,
                activation: "activation_function",
                default_activation: "gelu_new",
                windows: false,
            },
            fixed: &[("scale_attn_weights", true), ("scale_attn_by_inverse_layer_idx", false), ("add_cross_attention", false)],
            tied_default: true,
            prefix: "transformer.",
            transposed: true,
            names: TensorNames {
                embedding: &["wte"],
                positions: &["wpe"],
                final_norm: &["ln_f"],
                head: &["lm_head"],
                layer: "h.{}.",
                attention_norm: &["ln_1"],
                qkv: &[QkvNames::Concat("attn.c_attn")],
                out: &["attn.c_proj"],
                mlp_norm: &["ln_2"],
                mlp: &[MlpNames::Plain { up: "mlp.c_fc", down: "mlp.c_proj" }],
                ..NO_NAMES
            },
            ignored: &[".attn.bias", ".attn.masked_bias"],
        },
        gguf: GgufRow {
            rope_style: RopeStyle::Neox,
            activation: ActivationKind::GeluTanh,
            names: TensorNames { mlp: &[MlpNames::Plain { up: "ffn_up", down: "ffn_down" }], ..GGUF_NAMES },
        },
    },
];

impl Family {
    /// The norm of this family's residual stream.
    pub(crate) fn norm_spec(&self, eps: f32) -> NormSpec {
        NormSpec { kind: self.norm, eps, weight_offset: 0.0, weight: true, bias: self.norm == NormKind::Layer }
    }

    fn ignores(&self, tensor: &str) -> bool {
        self.hf.ignored.iter().any(|ending| tensor.ends_with(ending))
    }
}

/// Whether a tensor of a Hugging Face folder holds no weights: in this family, or in any where it is not known.
pub(crate) fn is_ignored(family: Option<&Family>, tensor: &str) -> bool {
    match family {
        Some(family) => family.ignores(tensor),
        None => FAMILIES.iter().any(|family| family.ignores(tensor)),
    }
}

/// The row that an operator names: by its own name, a `model_type` or a `general.architecture`.
///
/// # Errors
/// [`ModelError::UnknownFamily`].
pub fn named(found: &str) -> Result<&'static Family> {
    let by = |names: fn(&Family) -> &'static [&'static str]| FAMILIES.iter().find(|family| names(family).contains(&found));
    by_name(found)
        .or_else(|| by(|family| family.model_types))
        .or_else(|| by(|family| family.gguf_architectures))
        .ok_or_else(|| unknown(found))
}

/// The row with this name (that of [`super::Architecture::family`]).
pub fn by_name(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.name == name)
}

/// The row for a config.json.
///
/// # Errors
/// [`ModelError::UnknownFamily`], or no `model_type`.
pub fn by_model_type(config: &serde_json::Value) -> Result<&'static Family> {
    let found = config.get("model_type").and_then(serde_json::Value::as_str).ok_or_else(|| ModelError::Config {
        file: "config.json".to_owned(),
        key: "model_type".to_owned(),
        reason: "is missing or no string".to_owned(),
    })?;
    FAMILIES.iter().find(|family| family.model_types.contains(&found)).ok_or_else(|| unknown(found))
}

/// The row for a GGUF file's `general.architecture`.
///
/// # Errors
/// [`ModelError::UnknownFamily`], or no such key.
pub fn of_gguf(metadata: &Metadata) -> Result<&'static Family> {
    let found = super::gguf::architecture_name(metadata)?;
    FAMILIES.iter().find(|family| family.gguf_architectures.contains(&found)).ok_or_else(|| unknown(found))
}

fn unknown(found: &str) -> ModelError {
    let supported = FAMILIES.iter().map(|family| family.name).collect::<Vec<_>>().join(", ");
    ModelError::UnknownFamily { found: found.to_owned(), supported }
}
