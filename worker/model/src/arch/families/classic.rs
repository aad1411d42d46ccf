//! Rows of families older than LLaMA or apart from it: layer norms, plain MLPs, learned and linear positions.

use forge_kernels::{ActivationKind, NormKind, RopeStyle};

use super::dense::{LLAMA, NO_BIAS, RMS};
use super::names::{self, MlpNames, QkvNames, TensorNames};
use super::row::*;
use super::{Family, HfRow};
use crate::arch::{BlockOrder, BlockSpec, QkNormOver};

/// Both parts read one norm's output.
const PARALLEL: BlockSpec = BlockSpec { order: BlockOrder::Parallel, mlp_pre_norm: false, ..BlockSpec::PRE_NORM };

const LAYER_NORM: NormRow = NormRow { kind: NormKind::Layer, eps: &["layer_norm_epsilon"], default_eps: 1e-5, bias: true, ..RMS };

const ALIBI: AlibiRow = AlibiRow { max_bias: Number::constant(8.0), scaled: false, rounded: false };

const PLAIN_GGUF: GgufRow = GgufRow { activation: ActivationKind::GeluTanh, ..NO_BIAS.gguf };

/// GPT-2: what the rows of this file differ from.
pub(super) const GPT2: Family = Family {
    name: "gpt2",
    model_types: &["gpt2"],
    gguf_architectures: &["gpt2"],
    sizes: SizeKeys {
        hidden_size: Size::needed(&["n_embd", "hidden_size"]),
        layers: Size::needed(&["n_layer", "num_hidden_layers"]),
        heads: Size::needed(&["n_head", "num_attention_heads"]),
        kv_heads: KvHeads::Key(Size::derived(&[], Derived::Heads)),
        head_dim: Size::derived(&[], Derived::HeadShare),
        context_length: Size::or(&["n_positions", "max_position_embeddings"], 1024),
        intermediate_size: Size::derived(&["n_inner"], Derived::TimesHidden(4)),
        vocab_size: Size::needed(&["vocab_size"]),
    },
    position: PositionRow::Learned { offset: 0 },
    norm: LAYER_NORM,
    attention: AttentionRow { qkv_bias: Flag::Always, out_bias: Flag::Always, ..LLAMA.attention },
    mlp: MlpRow {
        gated: false,
        activation: ActivationRow { keys: &["activation_function"], absent: "gelu_new", gelu_is_tanh: false },
        bias: Flag::Always,
    },
    head: HeadRow { tied_default: true, ..LLAMA.head },
    fixed: &[
        Fixed("scale_attn_weights", Only::Bool(true)),
        Fixed("scale_attn_by_inverse_layer_idx", Only::Bool(false)),
        Fixed("add_cross_attention", Only::Bool(false)),
    ],
    hf: HfRow {
        prefixes: &["transformer.", ""],
        transposed: true,
        names: TensorNames { qkv: &[QkvNames::Concat("attn.c_attn")], out: &["attn.c_proj"], ..names::GPT },
        ignored: &[".attn.bias", ".attn.masked_bias"],
        beside: &[],
        layers_beside: false,
    },
    gguf: PLAIN_GGUF,
    ..LLAMA
};

/// GPT-NeoX, Pythia.
pub(super) const GPT_NEOX: Family = Family {
    name: "gpt_neox",
    model_types: &["gpt_neox"],
    gguf_architectures: &["gptneox"],
    sizes: SizeKeys {
        hidden_size: LLAMA.sizes.hidden_size,
        layers: LLAMA.sizes.layers,
        heads: LLAMA.sizes.heads,
        context_length: Size::or(&["max_position_embeddings"], 2048),
        intermediate_size: Size::needed(&["intermediate_size"]),
        ..GPT2.sizes
    },
    position: PositionRow::Rope(RopeRow {
        theta: Number::key(&["rotary_emb_base"], 10_000.0),
        rotary: Rotary::Share(Number::key(&["rotary_pct"], 0.25)),
        ..RopeRow::NEOX
    }),
    norm: NormRow { eps: &["layer_norm_eps"], ..LAYER_NORM },
    blocks: &[
        BlockCase {
            when: &[When::Bool("use_parallel_residual", true, true)],
            block: BlockSpec { order: BlockOrder::Parallel, ..BlockSpec::PRE_NORM },
        },
        BlockCase { when: &[], block: BlockSpec::PRE_NORM },
    ],
    attention: AttentionRow { qkv_bias: Flag::Key("attention_bias", true), out_bias: Flag::Key("attention_bias", true), ..GPT2.attention },
    mlp: MlpRow { activation: ActivationRow { keys: &["hidden_act"], absent: "gelu", gelu_is_tanh: false }, ..GPT2.mlp },
    head: LLAMA.head,
    fixed: &[],
    hf: HfRow {
        prefixes: &["gpt_neox.", ""],
        transposed: false,
        names: TensorNames {
            embedding: &["embed_in"],
            embedding_norm: &[],
            final_norm: &["final_layer_norm"],
            head: &["embed_out"],
            layer: "layers.{}.",
            qkv: &[QkvNames::Grouped("attention.query_key_value")],
            out: &["attention.dense"],
            ..names::QUERY_KEY_VALUE
        },
        ignored: &[".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"],
        ..GPT2.hf
    },
    gguf: GgufRow { activation: ActivationKind::GeluErf, ..PLAIN_GGUF },
    ..GPT2
};

/// GPT-Neo, whose scores are not scaled.
pub(super) const GPT_NEO: Family = Family {
    name: "gpt_neo",
    model_types: &["gpt_neo"],
    gguf_architectures: &[],
    sizes: SizeKeys {
        hidden_size: Size::needed(&["hidden_size"]),
        layers: Size::needed(&["num_layers", "num_hidden_layers"]),
        heads: Size::needed(&["num_heads", "num_attention_heads"]),
        context_length: Size::or(&["max_position_embeddings"], 2048),
        intermediate_size: Size::derived(&["intermediate_size"], Derived::TimesHidden(4)),
        ..GPT2.sizes
    },
    attention: AttentionRow {
        scale: ScoreScale::Key(Number::constant(1.0)),
        qkv_bias: Flag::Never,
        windows: Some(WindowRow {
            size: Number::key(&["window_size"], 256.0),
            switch: None,
            layers: WindowLayers::Repeated { key: "attention_types", full: "global", windowed: "local" },
        }),
        ..GPT2.attention
    },
    fixed: &[],
    hf: HfRow {
        transposed: false,
        names: TensorNames {
            qkv: &[QkvNames::Separate { q: "attn.attention.q_proj", k: "attn.attention.k_proj", v: "attn.attention.v_proj" }],
            out: &["attn.attention.out_proj"],
            ..names::GPT
        },
        ignored: &[".attn.attention.bias", ".attn.attention.masked_bias"],
        ..GPT2.hf
    },
    ..GPT2
};

/// GPT-J.
pub(super) const GPTJ: Family = Family {
    name: "gptj",
    model_types: &["gptj"],
    gguf_architectures: &[],
    sizes: SizeKeys { context_length: Size::or(&["n_positions", "max_position_embeddings"], 2048), ..GPT2.sizes },
    position: PositionRow::Rope(RopeRow { style: RopeStyle::Gptj, rotary: Rotary::Width("rotary_dim", 64), ..RopeRow::NEOX }),
    blocks: &[BlockCase { when: &[], block: PARALLEL }],
    attention: NO_BIAS.attention,
    head: HeadRow { bias: Flag::Always, ..LLAMA.head },
    fixed: &[],
    hf: HfRow {
        transposed: false,
        names: TensorNames {
            qkv: &[QkvNames::Separate { q: "attn.q_proj", k: "attn.k_proj", v: "attn.v_proj" }],
            out: &["attn.out_proj"],
            mlp: &[MlpNames::Plain { up: "mlp.fc_in", down: "mlp.fc_out" }],
            ..names::GPT
        },
        ignored: &[".attn.bias", ".attn.masked_bias", ".attn.embed_positions"],
        ..GPT2.hf
    },
    ..GPT2
};

/// OPT; the 350m is the one with norms of sums, a narrower embedding and no final norm.
pub(super) const OPT: Family = Family {
    name: "opt",
    model_types: &["opt"],
    gguf_architectures: &[],
    sizes: SizeKeys { intermediate_size: Size::needed(&["ffn_dim"]), ..GPT_NEOX.sizes },
    embedding: EmbeddingRow { width: Some("word_embed_proj_dim"), ..LLAMA.embedding },
    position: PositionRow::Learned { offset: 2 },
    norm: NormRow { eps: &[], ..LAYER_NORM },
    blocks: &[
        BlockCase {
            when: &[When::Bool("do_layer_norm_before", true, true), When::Bool("_remove_final_layer_norm", false, false)],
            block: BlockSpec::PRE_NORM,
        },
        BlockCase {
            when: &[When::Bool("do_layer_norm_before", true, true)],
            block: BlockSpec { final_norm: false, ..BlockSpec::PRE_NORM },
        },
        BlockCase {
            when: &[],
            block: BlockSpec {
                order: BlockOrder::NormOfSum,
                attention_pre_norm: false,
                attention_post_norm: true,
                mlp_pre_norm: false,
                mlp_post_norm: true,
                final_norm: false,
                ..BlockSpec::PRE_NORM
            },
        },
    ],
    attention: AttentionRow { qkv_bias: Flag::Key("enable_bias", true), out_bias: Flag::Key("enable_bias", true), ..GPT2.attention },
    mlp: MlpRow {
        activation: ActivationRow { keys: &["activation_function"], absent: "relu", gelu_is_tanh: false },
        bias: Flag::Key("enable_bias", true),
        ..GPT2.mlp
    },
    fixed: &[Fixed("layer_norm_elementwise_affine", Only::Bool(true))],
    hf: HfRow {
        prefixes: &["model.decoder.", "decoder.", ""],
        transposed: false,
        names: TensorNames {
            embedding: &["embed_tokens"],
            positions: &["embed_positions"],
            project_in: &["project_in"],
            project_out: &["project_out"],
            final_norm: &["final_layer_norm"],
            layer: "layers.{}.",
            attention_norm: &["self_attn_layer_norm"],
            attention_post_norm: &["self_attn_layer_norm"],
            out: &["self_attn.out_proj"],
            mlp_norm: &["final_layer_norm"],
            mlp_post_norm: &["final_layer_norm"],
            mlp: &[MlpNames::Plain { up: "fc1", down: "fc2" }],
            ..names::LLAMA
        },
        ignored: &[],
        ..GPT2.hf
    },
    ..GPT2
};

/// BLOOM.
pub(super) const BLOOM: Family = Family {
    name: "bloom",
    model_types: &["bloom"],
    gguf_architectures: &["bloom"],
    sizes: SizeKeys {
        hidden_size: Size::needed(&["n_embed", "hidden_size"]),
        context_length: Size::or(&["seq_length"], 2048),
        intermediate_size: Size::derived(&[], Derived::TimesHidden(4)),
        ..GPT2.sizes
    },
    embedding: EmbeddingRow { norm: true, ..LLAMA.embedding },
    position: PositionRow::Alibi(ALIBI),
    mlp: MlpRow { activation: ActivationRow { keys: &[], absent: "gelu_new", gelu_is_tanh: false }, ..GPT2.mlp },
    fixed: &[Fixed("apply_residual_connection_post_layernorm", Only::Bool(false))],
    hf: HfRow { transposed: false, names: names::QUERY_KEY_VALUE, ignored: &[], ..GPT2.hf },
    ..GPT2
};

/// MPT.
pub(super) const MPT: Family = Family {
    name: "mpt",
    model_types: &["mpt"],
    gguf_architectures: &["mpt"],
    sizes: SizeKeys {
        hidden_size: Size::needed(&["d_model", "hidden_size"]),
        layers: Size::needed(&["n_layers", "num_hidden_layers"]),
        heads: Size::needed(&["n_heads", "num_attention_heads"]),
        context_length: Size::or(&["max_seq_len"], 2048),
        // The library has 4 whatever `expansion_ratio` says; a file that differs has other shapes.
        intermediate_size: Size::derived(&[], Derived::TimesHidden(4)),
        ..GPT2.sizes
    },
    position: PositionRow::Alibi(AlibiRow { max_bias: Number::key(&["attn_config.alibi_bias_max"], 8.0), ..ALIBI }),
    norm: NormRow { bias: false, ..LAYER_NORM },
    attention: AttentionRow {
        scale: ScoreScale::Key(Number::optional(&["attn_config.softmax_scale"])),
        clip: Some(Number::optional(&["attn_config.clip_qkv"])),
        ..NO_BIAS.attention
    },
    mlp: MlpRow { activation: ActivationRow { keys: &[], absent: "gelu", gelu_is_tanh: false }, bias: Flag::Never, ..GPT2.mlp },
    fixed: &[
        Fixed("attn_config.alibi", Only::Bool(true)),
        Fixed("attn_config.attn_type", Only::Texts(&["multihead_attention"])),
        Fixed("attn_config.qk_ln", Only::Bool(false)),
        Fixed("attn_config.prefix_lm", Only::Bool(false)),
        Fixed("no_bias", Only::Bool(true)),
        Fixed("logit_scale", Only::Null),
        Fixed("embedding_fraction", Only::Number(1.0)),
        Fixed("norm_type", Only::Texts(&["low_precision_layernorm", "layernorm"])),
    ],
    hf: HfRow {
        transposed: false,
        names: TensorNames {
            final_norm: &["norm_f"],
            layer: "blocks.{}.",
            attention_norm: &["norm_1"],
            qkv: &[QkvNames::Concat("attn.Wqkv")],
            out: &["attn.out_proj"],
            mlp_norm: &["norm_2"],
            mlp: &[MlpNames::Plain { up: "ffn.up_proj", down: "ffn.down_proj" }],
            ..names::GPT
        },
        ignored: &[],
        ..GPT2.hf
    },
    gguf: GgufRow { activation: ActivationKind::GeluErf, ..PLAIN_GGUF },
    ..GPT2
};

/// Falcon 7B, 40B, 11B and RW.
pub(super) const FALCON: Family = Family {
    name: "falcon",
    model_types: &["falcon"],
    gguf_architectures: &["falcon"],
    sizes: SizeKeys {
        hidden_size: Size::needed(&["n_embed", "hidden_size"]),
        kv_heads: KvHeads::MultiQuery(Size::derived(&["num_kv_heads"], Derived::Heads)),
        intermediate_size: Size::derived(&["ffn_hidden_size"], Derived::TimesHidden(4)),
        ..GPT_NEOX.sizes
    },
    position: PositionRow::AlibiIf("alibi", AlibiRow { scaled: true, rounded: true, ..ALIBI }, RopeRow::NEOX),
    blocks: &[
        BlockCase {
            when: &[
                When::Bool("new_decoder_architecture", false, true),
                When::Bool("parallel_attn", true, true),
                When::Size("num_ln_in_parallel_attn", 2, 2),
            ],
            block: BlockSpec { order: BlockOrder::Parallel, ..BlockSpec::PRE_NORM },
        },
        BlockCase {
            when: &[
                When::Bool("new_decoder_architecture", false, true),
                When::Bool("parallel_attn", true, true),
                When::Size("num_ln_in_parallel_attn", 2, 1),
            ],
            block: PARALLEL,
        },
        BlockCase {
            when: &[When::Bool("new_decoder_architecture", false, false), When::Bool("parallel_attn", true, true)],
            block: PARALLEL,
        },
        BlockCase {
            when: &[When::Bool("new_decoder_architecture", false, false), When::Bool("parallel_attn", true, false)],
            block: BlockSpec::PRE_NORM,
        },
    ],
    attention: AttentionRow { qkv_bias: Flag::Key("bias", false), out_bias: Flag::Key("bias", false), ..GPT2.attention },
    mlp: MlpRow {
        activation: ActivationRow { keys: &["activation"], absent: "gelu", gelu_is_tanh: false },
        bias: Flag::Key("bias", false),
        ..GPT2.mlp
    },
    fixed: &[],
    hf: HfRow {
        transposed: false,
        names: TensorNames {
            attention_norm: &["ln_attn", "input_layernorm"],
            mlp_norm: &["ln_mlp", "post_attention_layernorm"],
            embedding_norm: &[],
            ..names::QUERY_KEY_VALUE
        },
        ignored: &["rotary_emb.inv_freq", "rotary.inv_freq"],
        ..GPT2.hf
    },
    gguf: GgufRow {
        activation: ActivationKind::GeluErf,
        // With two norms, that of attention is the second in a file.
        names: TensorNames { attention_norm: &["attn_norm_2", "attn_norm"], mlp_norm: &["attn_norm"], ..names::GGUF },
        ..PLAIN_GGUF
    },
    ..GPT2
};

/// Phi-1, 1.5 and 2.
pub(super) const PHI: Family = Family {
    name: "phi",
    model_types: &["phi"],
    gguf_architectures: &["phi2"],
    sizes: LLAMA.sizes,
    position: PositionRow::Rope(RopeRow { rotary: Rotary::Share(Number::key(&["partial_rotary_factor"], 0.5)), ..RopeRow::NEOX }),
    norm: NormRow { eps: &["layer_norm_eps"], ..LAYER_NORM },
    blocks: &[BlockCase { when: &[], block: PARALLEL }],
    attention: AttentionRow {
        qk_norm: Some(QkNormRow {
            when: Flag::Key("qk_layernorm", false),
            over: QkNormOver::Head,
            kind: NormKind::Layer,
            bias: true,
            weight_offset: 0.0,
        }),
        ..GPT2.attention
    },
    mlp: MlpRow { activation: ActivationRow { keys: &["hidden_act"], absent: "gelu_new", gelu_is_tanh: false }, ..GPT2.mlp },
    head: HeadRow { bias: Flag::Always, ..LLAMA.head },
    fixed: &[],
    hf: HfRow {
        names: TensorNames {
            final_norm: &["final_layernorm"],
            q_norm: &["self_attn.q_layernorm"],
            k_norm: &["self_attn.k_layernorm"],
            out: &["self_attn.dense"],
            mlp: &[MlpNames::Plain { up: "mlp.fc1", down: "mlp.fc2" }],
            ..names::LLAMA
        },
        ..LLAMA.hf
    },
    ..GPT2
};
