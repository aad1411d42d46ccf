//! Rows of families that follow LLaMA, each written as its differences.

use forge_kernels::{ActivationKind, NormKind, RopeStyle};

use super::names::{self, MlpNames, QkvNames, TensorNames};
use super::row::*;
use super::{Family, HfRow};
use crate::arch::{BlockOrder, BlockSpec, QkNormOver};

pub(super) const RMS: NormRow =
    NormRow { kind: NormKind::Rms, eps: &["rms_norm_eps"], default_eps: 1e-6, weight_offset: 0.0, weight: true, bias: false };

/// A block under all conditions.
const ONE: BlockCase = BlockCase { when: &[], block: BlockSpec::PRE_NORM };

/// Norms after both parts as well.
pub(super) const SANDWICH: BlockSpec = BlockSpec { attention_post_norm: true, mlp_post_norm: true, ..BlockSpec::PRE_NORM };

const LLAMA_HF: HfRow = HfRow {
    prefixes: &["model.", "language_model.model.", "model.language_model.", ""],
    transposed: false,
    names: names::LLAMA,
    ignored: &["rotary_emb.inv_freq"],
    beside: &[],
    layers_beside: false,
};

const LLAMA_GGUF: GgufRow = GgufRow {
    rope_style: RopeStyle::Neox,
    activation: ActivationKind::Silu,
    names: names::GGUF,
    layers_scaled_by_share: None,
    yarn_truncates: true,
    normalize: false,
};

/// What is beside the decoder in models that also take images.
const IMAGE_TOWERS: &[&str] =
    &["vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.", "vision_model."];

/// Norms of each head with one weight for all, as Qwen 3 and Gemma 3 have them.
const QK_NORM_HEAD: QkNormRow =
    QkNormRow { when: Flag::Always, over: QkNormOver::Head, kind: NormKind::Rms, bias: false, weight_offset: 0.0 };

/// LLaMA 1 to 3, Yi, SmolLM, DeepSeek-LLM and -Coder: what the other rows differ from.
pub(super) const LLAMA: Family = Family {
    name: "llama",
    model_types: &["llama"],
    gguf_architectures: &["llama"],
    sizes: SizeKeys {
        hidden_size: Size::needed(&["hidden_size"]),
        layers: Size::needed(&["num_hidden_layers"]),
        heads: Size::needed(&["num_attention_heads"]),
        kv_heads: KvHeads::Key(Size::derived(&["num_key_value_heads"], Derived::Heads)),
        head_dim: Size::derived(&["head_dim"], Derived::HeadShare),
        context_length: Size::or(&["max_position_embeddings"], 2048),
        intermediate_size: Size::needed(&["intermediate_size"]),
        vocab_size: Size::needed(&["vocab_size"]),
    },
    embedding: EmbeddingRow { scale: EmbeddingScale::One, width: None, norm: false },
    position: PositionRow::Rope(RopeRow::NEOX),
    norm: RMS,
    blocks: &[ONE],
    residual_scale: Number::constant(1.0),
    attention: AttentionRow {
        scale: ScoreScale::RootOfHead,
        qkv_bias: Flag::Key("attention_bias", false),
        out_bias: Flag::Key("attention_bias", false),
        qk_norm: None,
        clip: None,
        softcap: None,
        sinks: false,
        windows: None,
        latent: None,
    },
    mlp: MlpRow {
        gated: true,
        activation: ActivationRow { keys: &["hidden_act"], absent: "silu", gelu_is_tanh: false },
        bias: Flag::Key("mlp_bias", false),
    },
    experts: None,
    head: HeadRow { tied_default: false, bias: Flag::Never, scale: HeadScale::One, softcap: None },
    fixed: &[],
    hf: LLAMA_HF,
    gguf: GgufRow { rope_style: RopeStyle::Gptj, ..LLAMA_GGUF },
};

/// LLaMA without biases.
pub(super) const NO_BIAS: Family = Family {
    attention: AttentionRow { qkv_bias: Flag::Never, out_bias: Flag::Never, ..LLAMA.attention },
    mlp: MlpRow { bias: Flag::Never, ..LLAMA.mlp },
    gguf: LLAMA_GGUF,
    ..LLAMA
};

/// Mistral 7B, Nemo, Small; of Mistral Small 3.1 and later the text part.
pub(super) const MISTRAL: Family = Family {
    name: "mistral",
    model_types: &["mistral", "mistral3"],
    gguf_architectures: &["mistral3"],
    sizes: SizeKeys {
        // Text parts of models that also take images leave out what is as in the class.
        hidden_size: Size::or(&["hidden_size"], 4096),
        layers: Size::or(&["num_hidden_layers"], 32),
        heads: Size::or(&["num_attention_heads"], 32),
        kv_heads: KvHeads::Key(Size { keys: &["num_key_value_heads"], absent: Some(8), derived: Derived::Heads }),
        context_length: Size::or(&["max_position_embeddings"], 131_072),
        intermediate_size: Size::or(&["intermediate_size"], 14_336),
        vocab_size: Size::or(&["vocab_size"], 32_000),
        ..LLAMA.sizes
    },
    attention: AttentionRow {
        windows: Some(WindowRow { size: Number::key(&["sliding_window"], 4096.0), switch: None, layers: WindowLayers::All }),
        ..NO_BIAS.attention
    },
    hf: HfRow { beside: IMAGE_TOWERS, ..LLAMA_HF },
    gguf: LLAMA.gguf,
    ..NO_BIAS
};

const QWEN_WINDOWS: WindowRow = WindowRow {
    size: Number::key(&["sliding_window"], 4096.0),
    switch: Some("use_sliding_window"),
    layers: WindowLayers::From("max_window_layers", 28),
};

/// Qwen 1.5, 2 and 2.5.
pub(super) const QWEN2: Family = Family {
    name: "qwen2",
    model_types: &["qwen2"],
    gguf_architectures: &["qwen2"],
    sizes: SizeKeys {
        kv_heads: KvHeads::Key(Size { keys: &["num_key_value_heads"], absent: Some(32), derived: Derived::Heads }),
        context_length: Size::or(&["max_position_embeddings"], 32_768),
        ..LLAMA.sizes
    },
    attention: AttentionRow { qkv_bias: Flag::Always, windows: Some(QWEN_WINDOWS), ..NO_BIAS.attention },
    ..NO_BIAS
};

/// Qwen 3.
pub(super) const QWEN3: Family = Family {
    name: "qwen3",
    model_types: &["qwen3"],
    gguf_architectures: &["qwen3"],
    sizes: SizeKeys { head_dim: Size::or(&["head_dim"], 128), ..QWEN2.sizes },
    attention: AttentionRow { qk_norm: Some(QK_NORM_HEAD), windows: Some(QWEN_WINDOWS), ..LLAMA.attention },
    hf: HfRow { names: names::LLAMA_QK_NORM, ..LLAMA_HF },
    ..QWEN2
};

/// Phi-3, 3.5 and 4.
pub(super) const PHI3: Family = Family {
    name: "phi3",
    model_types: &["phi3"],
    gguf_architectures: &["phi3"],
    sizes: SizeKeys { context_length: Size::or(&["max_position_embeddings"], 4096), ..LLAMA.sizes },
    position: PositionRow::Rope(RopeRow {
        aliases: &[("su", "longrope"), ("yarn", "longrope")],
        original_context: Some(4096.0),
        ..RopeRow::NEOX
    }),
    norm: NormRow { default_eps: 1e-5, ..RMS },
    attention: AttentionRow {
        windows: Some(WindowRow { size: Number::optional(&["sliding_window"]), switch: None, layers: WindowLayers::All }),
        ..NO_BIAS.attention
    },
    hf: HfRow {
        names: TensorNames {
            qkv: &[QkvNames::Concat("self_attn.qkv_proj")],
            mlp: &[MlpNames::GateUp { gate_up: "mlp.gate_up_proj", down: "mlp.down_proj" }],
            ..names::LLAMA
        },
        ..LLAMA_HF
    },
    ..NO_BIAS
};

/// Gemma 1.
pub(super) const GEMMA: Family = Family {
    name: "gemma",
    model_types: &["gemma"],
    gguf_architectures: &["gemma"],
    sizes: SizeKeys {
        hidden_size: Size::or(&["hidden_size"], 3072),
        layers: Size::or(&["num_hidden_layers"], 28),
        heads: Size::or(&["num_attention_heads"], 16),
        kv_heads: KvHeads::Key(Size::or(&["num_key_value_heads"], 16)),
        head_dim: Size::or(&["head_dim"], 256),
        context_length: Size::or(&["max_position_embeddings"], 8192),
        intermediate_size: Size::or(&["intermediate_size"], 24_576),
        vocab_size: Size::or(&["vocab_size"], 256_000),
    },
    embedding: EmbeddingRow { scale: EmbeddingScale::RootOfHidden, ..LLAMA.embedding },
    norm: NormRow { weight_offset: 1.0, ..RMS },
    mlp: MlpRow {
        activation: ActivationRow { keys: &["hidden_act"], absent: "gelu_pytorch_tanh", gelu_is_tanh: true },
        bias: Flag::Never,
        ..LLAMA.mlp
    },
    head: HeadRow { tied_default: true, ..LLAMA.head },
    fixed: &[Fixed("use_bidirectional_attention", Only::Bool(false))],
    gguf: GgufRow { activation: ActivationKind::GeluTanh, ..LLAMA_GGUF },
    ..LLAMA
};

/// Gemma 2.
pub(super) const GEMMA2: Family = Family {
    name: "gemma2",
    model_types: &["gemma2"],
    gguf_architectures: &["gemma2"],
    sizes: SizeKeys {
        hidden_size: Size::or(&["hidden_size"], 2304),
        layers: Size::or(&["num_hidden_layers"], 26),
        heads: Size::or(&["num_attention_heads"], 8),
        kv_heads: KvHeads::Key(Size::or(&["num_key_value_heads"], 4)),
        intermediate_size: Size::or(&["intermediate_size"], 9216),
        ..GEMMA.sizes
    },
    blocks: &[BlockCase { when: &[], block: SANDWICH }],
    attention: AttentionRow {
        scale: ScoreScale::RootOf(Number::key(&["query_pre_attn_scalar"], 256.0)),
        softcap: Some(Number::key(&["attn_logit_softcapping"], 50.0)),
        windows: Some(WindowRow {
            size: Number::key(&["sliding_window"], 4096.0),
            switch: None,
            layers: WindowLayers::AllButEvery(&[], 2),
        }),
        ..LLAMA.attention
    },
    mlp: MlpRow {
        activation: ActivationRow { keys: &["hidden_activation"], absent: "gelu_pytorch_tanh", gelu_is_tanh: false },
        ..GEMMA.mlp
    },
    head: HeadRow { softcap: Some(Number::key(&["final_logit_softcapping"], 30.0)), ..GEMMA.head },
    hf: HfRow { names: names::GEMMA_SANDWICH, ..LLAMA_HF },
    gguf: GgufRow { layers_scaled_by_share: Some(46), ..GEMMA.gguf },
    ..GEMMA
};

/// Gemma 3; of those that take images the text part.
pub(super) const GEMMA3: Family = Family {
    name: "gemma3",
    model_types: &["gemma3_text", "gemma3"],
    gguf_architectures: &["gemma3"],
    sizes: SizeKeys {
        context_length: Size::or(&["max_position_embeddings"], 131_072),
        vocab_size: Size::or(&["vocab_size"], 262_208),
        ..GEMMA2.sizes
    },
    position: PositionRow::Rope(RopeRow {
        theta: Number::key(&["rope_theta"], 1_000_000.0),
        local: Some(LocalRope::Theta(Number::key(&["rope_local_base_freq"], 10_000.0))),
        ..RopeRow::NEOX
    }),
    attention: AttentionRow {
        qk_norm: Some(QkNormRow { weight_offset: 1.0, ..QK_NORM_HEAD }),
        softcap: Some(Number::optional(&["attn_logit_softcapping"])),
        windows: Some(WindowRow {
            size: Number::key(&["sliding_window"], 4096.0),
            switch: None,
            layers: WindowLayers::AllButEvery(&["sliding_window_pattern", "_sliding_window_pattern"], 6),
        }),
        ..GEMMA2.attention
    },
    head: HeadRow { softcap: Some(Number::optional(&["final_logit_softcapping"])), ..GEMMA.head },
    hf: HfRow { beside: IMAGE_TOWERS, ..GEMMA2.hf },
    gguf: GgufRow { layers_scaled_by_share: Some(62), ..GEMMA.gguf },
    ..GEMMA2
};

/// StableLM 3B, 2 and 12B.
pub(super) const STABLELM: Family = Family {
    name: "stablelm",
    model_types: &["stablelm"],
    gguf_architectures: &["stablelm"],
    sizes: SizeKeys {
        kv_heads: KvHeads::Key(Size::or(&["num_key_value_heads"], 32)),
        context_length: Size::or(&["max_position_embeddings"], 4096),
        ..LLAMA.sizes
    },
    position: PositionRow::Rope(RopeRow { rotary: Rotary::Share(Number::key(&["partial_rotary_factor"], 0.25)), ..RopeRow::NEOX }),
    norm: NormRow { kind: NormKind::Layer, eps: &["layer_norm_eps"], default_eps: 1e-5, bias: true, ..RMS },
    blocks: &[
        BlockCase {
            when: &[When::Bool("use_parallel_residual", false, true)],
            block: BlockSpec { order: BlockOrder::Parallel, mlp_pre_norm: false, ..BlockSpec::PRE_NORM },
        },
        ONE,
    ],
    attention: AttentionRow {
        qkv_bias: Flag::Key("use_qkv_bias", false),
        qk_norm: Some(QkNormRow {
            when: Flag::Key("qk_layernorm", false),
            over: QkNormOver::EachHead,
            kind: NormKind::Layer,
            ..QK_NORM_HEAD
        }),
        ..NO_BIAS.attention
    },
    hf: HfRow {
        names: TensorNames { q_norm: &["self_attn.q_layernorm.norms.{}"], k_norm: &["self_attn.k_layernorm.norms.{}"], ..names::LLAMA },
        ..LLAMA_HF
    },
    ..NO_BIAS
};

/// StarCoder 2.
pub(super) const STARCODER2: Family = Family {
    name: "starcoder2",
    model_types: &["starcoder2"],
    gguf_architectures: &["starcoder2"],
    sizes: SizeKeys {
        kv_heads: KvHeads::Key(Size::or(&["num_key_value_heads"], 2)),
        context_length: Size::or(&["max_position_embeddings"], 4096),
        ..LLAMA.sizes
    },
    norm: NormRow { kind: NormKind::Layer, eps: &["norm_epsilon"], default_eps: 1e-5, bias: true, ..RMS },
    attention: AttentionRow { qkv_bias: Flag::Key("use_bias", true), out_bias: Flag::Key("use_bias", true), ..PHI3.attention },
    mlp: MlpRow {
        gated: false,
        activation: ActivationRow { keys: &["hidden_act"], absent: "gelu_pytorch_tanh", gelu_is_tanh: false },
        bias: Flag::Key("use_bias", true),
    },
    head: HeadRow { tied_default: true, ..LLAMA.head },
    hf: HfRow { names: TensorNames { mlp: &[MlpNames::Plain { up: "mlp.c_fc", down: "mlp.c_proj" }], ..names::LLAMA }, ..LLAMA_HF },
    gguf: GgufRow { activation: ActivationKind::GeluTanh, ..LLAMA_GGUF },
    ..LLAMA
};

/// OLMo 1.
pub(super) const OLMO: Family = Family {
    name: "olmo",
    model_types: &["olmo"],
    gguf_architectures: &["olmo"],
    norm: NormRow { kind: NormKind::Layer, eps: &[], default_eps: 1e-5, weight: false, ..RMS },
    attention: AttentionRow { clip: Some(Number::optional(&["clip_qkv"])), ..LLAMA.attention },
    mlp: NO_BIAS.mlp,
    ..LLAMA
};

/// OLMo 2.
pub(super) const OLMO2: Family = Family {
    name: "olmo2",
    model_types: &["olmo2"],
    gguf_architectures: &["olmo2"],
    norm: NormRow { default_eps: 1e-5, ..RMS },
    blocks: &[BlockCase { when: &[], block: BlockSpec { attention_pre_norm: false, mlp_pre_norm: false, ..SANDWICH } }],
    attention: AttentionRow { qk_norm: Some(QkNormRow { over: QkNormOver::Full, ..QK_NORM_HEAD }), ..LLAMA.attention },
    mlp: NO_BIAS.mlp,
    hf: HfRow { names: names::GEMMA_SANDWICH, ..LLAMA_HF },
    gguf: LLAMA_GGUF,
    ..LLAMA
};

/// OLMo 3.
pub(super) const OLMO3: Family = Family {
    name: "olmo3",
    model_types: &["olmo3"],
    position: PositionRow::Rope(RopeRow {
        theta: Number::key(&["rope_theta"], 500_000.0),
        local: Some(LocalRope::SameTheta),
        ..RopeRow::NEOX
    }),
    attention: AttentionRow {
        windows: Some(WindowRow {
            size: Number::key(&["sliding_window"], 4096.0),
            switch: None,
            layers: WindowLayers::AllButEvery(&[], 4),
        }),
        ..OLMO2.attention
    },
    ..OLMO2
};

/// Granite 3.
pub(super) const GRANITE: Family = Family {
    name: "granite",
    model_types: &["granite"],
    gguf_architectures: &["granite"],
    embedding: EmbeddingRow { scale: EmbeddingScale::Key(Number::key(&["embedding_multiplier"], 1.0)), ..LLAMA.embedding },
    residual_scale: Number::key(&["residual_multiplier"], 1.0),
    attention: AttentionRow { scale: ScoreScale::Key(Number::key(&["attention_multiplier"], 1.0)), ..LLAMA.attention },
    head: HeadRow { scale: HeadScale::DividedBy(Number::key(&["logits_scaling"], 1.0)), ..LLAMA.head },
    ..LLAMA
};

/// Command-R.
pub(super) const COHERE: Family = Family {
    name: "cohere",
    model_types: &["cohere"],
    gguf_architectures: &["command-r"],
    sizes: SizeKeys { context_length: Size::or(&["max_position_embeddings"], 8192), ..LLAMA.sizes },
    position: PositionRow::Rope(RopeRow { style: RopeStyle::Gptj, theta: Number::key(&["rope_theta"], 500_000.0), ..RopeRow::NEOX }),
    norm: NormRow { kind: NormKind::Layer, eps: &["layer_norm_eps"], default_eps: 1e-5, ..RMS },
    blocks: &[BlockCase { when: &[], block: BlockSpec { order: BlockOrder::Parallel, mlp_pre_norm: false, ..BlockSpec::PRE_NORM } }],
    attention: AttentionRow {
        qk_norm: Some(QkNormRow {
            when: Flag::Key("use_qk_norm", false),
            over: QkNormOver::EachHead,
            kind: NormKind::Layer,
            ..QK_NORM_HEAD
        }),
        ..LLAMA.attention
    },
    mlp: NO_BIAS.mlp,
    head: HeadRow { tied_default: true, scale: HeadScale::Times(Number::key(&["logit_scale"], 0.0625)), ..LLAMA.head },
    hf: HfRow { names: names::LLAMA_QK_NORM, ..LLAMA_HF },
    ..LLAMA
};

/// GLM-4.
pub(super) const GLM4: Family = Family {
    name: "glm4",
    model_types: &["glm4"],
    gguf_architectures: &["glm4"],
    sizes: SizeKeys {
        kv_heads: KvHeads::Key(Size::or(&["num_key_value_heads"], 2)),
        head_dim: Size::or(&["head_dim"], 128),
        context_length: Size::or(&["max_position_embeddings"], 131_072),
        ..LLAMA.sizes
    },
    position: PositionRow::Rope(RopeRow {
        style: RopeStyle::Gptj,
        rotary: Rotary::Share(Number::key(&["partial_rotary_factor"], 0.5)),
        ..RopeRow::NEOX
    }),
    norm: NormRow { default_eps: 1.562_5e-7, ..RMS },
    blocks: &[BlockCase { when: &[], block: SANDWICH }],
    attention: AttentionRow { qkv_bias: Flag::Key("attention_bias", true), ..NO_BIAS.attention },
    hf: HfRow {
        names: TensorNames {
            attention_post_norm: &["post_self_attn_layernorm"],
            mlp_norm: &["post_attention_layernorm"],
            mlp_post_norm: &["post_mlp_layernorm"],
            mlp: &[MlpNames::GateUp { gate_up: "mlp.gate_up_proj", down: "mlp.down_proj" }],
            ..names::LLAMA
        },
        ..LLAMA_HF
    },
    gguf: LLAMA.gguf,
    ..NO_BIAS
};
