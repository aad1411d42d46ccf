//! Rows of families with experts.

use forge_kernels::{NormKind, RopeStyle};

use super::dense::{LLAMA, NO_BIAS, OLMO2, QWEN2, QWEN3, RMS};
use super::names::{self, ExpertNames, ExpertStorage, LatentNames, MlpNames, TensorNames};
use super::row::*;
use super::{Family, HfRow};
use crate::arch::BlockSpec;

/// Mixtral's experts: what the others differ from.
const EXPERTS: ExpertsRow = ExpertsRow {
    count: Size::or(&["num_local_experts", "num_experts"], 8),
    per_token: Size::or(&["num_experts_per_tok"], 2),
    intermediate_size: Size::needed(&["intermediate_size"]),
    layers: ExpertLayers::All,
    clamped: None,
    bias: false,
    score: ScoreRow::Softmax,
    normalize: Flag::Always,
    scale: Number::constant(1.0),
    groups: GroupsRow::No,
    router_bias: false,
    correction_bias: false,
    shared: SharedRow::No,
};

/// Mixtral.
pub(super) const MIXTRAL: Family = Family {
    name: "mixtral",
    model_types: &["mixtral"],
    gguf_architectures: &["llama"],
    sizes: SizeKeys {
        kv_heads: KvHeads::Key(Size { keys: &["num_key_value_heads"], absent: Some(8), derived: Derived::Heads }),
        context_length: Size::or(&["max_position_embeddings"], 131_072),
        ..LLAMA.sizes
    },
    position: PositionRow::Rope(RopeRow { theta: Number::key(&["rope_theta"], 1_000_000.0), ..RopeRow::NEOX }),
    norm: NormRow { default_eps: 1e-5, ..RMS },
    attention: AttentionRow {
        windows: Some(WindowRow { size: Number::optional(&["sliding_window"]), switch: None, layers: WindowLayers::All }),
        ..NO_BIAS.attention
    },
    experts: Some(EXPERTS),
    hf: HfRow { names: TensorNames { experts: Some(names::MIXTRAL_EXPERTS), ..names::LLAMA }, ..LLAMA.hf },
    gguf: GgufRow { normalize: true, ..LLAMA.gguf },
    ..NO_BIAS
};

/// Qwen 1.5 and 2 with experts.
pub(super) const QWEN2_MOE: Family = Family {
    name: "qwen2_moe",
    model_types: &["qwen2_moe"],
    gguf_architectures: &["qwen2moe"],
    sizes: SizeKeys {
        kv_heads: KvHeads::Key(Size { keys: &["num_key_value_heads"], absent: Some(16), derived: Derived::Heads }),
        ..QWEN2.sizes
    },
    attention: AttentionRow {
        qkv_bias: Flag::Key("qkv_bias", true),
        windows: Some(WindowRow {
            size: Number::key(&["sliding_window"], 4096.0),
            switch: Some("use_sliding_window"),
            layers: WindowLayers::AlternateBelow("max_window_layers", 28),
        }),
        ..NO_BIAS.attention
    },
    experts: Some(ExpertsRow {
        count: Size::or(&["num_experts"], 60),
        per_token: Size::or(&["num_experts_per_tok"], 4),
        intermediate_size: Size::or(&["moe_intermediate_size"], 1408),
        layers: ExpertLayers::Sparse,
        normalize: Flag::Key("norm_topk_prob", false),
        shared: SharedRow::Gated(Size::or(&["shared_expert_intermediate_size"], 5632)),
        ..EXPERTS
    }),
    hf: HfRow {
        names: TensorNames {
            experts: Some(ExpertNames {
                shared: &[MlpNames::Separate {
                    gate: "mlp.shared_expert.gate_proj",
                    up: "mlp.shared_expert.up_proj",
                    down: "mlp.shared_expert.down_proj",
                }],
                shared_gate: "mlp.shared_expert_gate",
                ..names::PROJECTIONS
            }),
            ..names::LLAMA
        },
        ..LLAMA.hf
    },
    ..QWEN2
};

/// Qwen 3 with experts.
pub(super) const QWEN3_MOE: Family = Family {
    name: "qwen3_moe",
    model_types: &["qwen3_moe"],
    gguf_architectures: &["qwen3moe"],
    sizes: SizeKeys {
        kv_heads: KvHeads::Key(Size { keys: &["num_key_value_heads"], absent: Some(4), derived: Derived::Heads }),
        head_dim: Size::derived(&["head_dim"], Derived::HeadShare),
        ..QWEN3.sizes
    },
    attention: AttentionRow {
        windows: Some(WindowRow {
            size: Number::key(&["sliding_window"], 4096.0),
            switch: Some("use_sliding_window"),
            layers: WindowLayers::All,
        }),
        ..QWEN3.attention
    },
    experts: Some(ExpertsRow {
        count: Size::or(&["num_local_experts", "num_experts"], 128),
        per_token: Size::or(&["num_experts_per_tok"], 8),
        intermediate_size: Size::or(&["moe_intermediate_size"], 768),
        layers: ExpertLayers::Sparse,
        normalize: Flag::Key("norm_topk_prob", false),
        ..EXPERTS
    }),
    hf: HfRow { names: TensorNames { experts: Some(names::PROJECTIONS), ..names::LLAMA_QK_NORM }, ..LLAMA.hf },
    gguf: GgufRow { normalize: true, ..QWEN3.gguf },
    ..QWEN3
};

/// OLMoE.
pub(super) const OLMOE: Family = Family {
    name: "olmoe",
    model_types: &["olmoe"],
    gguf_architectures: &["olmoe"],
    sizes: SizeKeys { context_length: Size::or(&["max_position_embeddings"], 4096), ..LLAMA.sizes },
    blocks: LLAMA.blocks,
    attention: AttentionRow { clip: Some(Number::optional(&["clip_qkv"])), ..OLMO2.attention },
    experts: Some(ExpertsRow {
        count: Size::or(&["num_experts", "num_local_experts"], 64),
        per_token: Size::or(&["num_experts_per_tok"], 8),
        normalize: Flag::Key("norm_topk_prob", false),
        ..EXPERTS
    }),
    hf: HfRow { names: TensorNames { experts: Some(names::PROJECTIONS), ..names::LLAMA_QK_NORM }, ..LLAMA.hf },
    ..OLMO2
};

/// Phi-3.5-MoE.
pub(super) const PHIMOE: Family = Family {
    name: "phimoe",
    model_types: &["phimoe"],
    gguf_architectures: &["phimoe"],
    position: PositionRow::Rope(RopeRow { theta: Number::key(&["rope_theta"], 1_000_000.0), stored_magnitudes: true, ..RopeRow::NEOX }),
    norm: NormRow { kind: NormKind::Layer, default_eps: 1e-5, bias: true, ..RMS },
    attention: AttentionRow { windows: MIXTRAL.attention.windows, ..LLAMA.attention },
    experts: Some(ExpertsRow {
        count: Size::or(&["num_local_experts"], 16),
        score: ScoreRow::SparseMixer { jitter: Number::key(&["router_jitter_noise"], 0.01) },
        normalize: Flag::Never,
        ..EXPERTS
    }),
    head: HeadRow { bias: Flag::Key("lm_head_bias", false), ..LLAMA.head },
    gguf: NO_BIAS.gguf,
    ..MIXTRAL
};

/// DeepSeek-V2 and its Lite.
pub(super) const DEEPSEEK_V2: Family = Family {
    name: "deepseek_v2",
    model_types: &["deepseek_v2"],
    gguf_architectures: &["deepseek2"],
    position: PositionRow::Rope(RopeRow { style: RopeStyle::Gptj, ..RopeRow::NEOX }),
    attention: AttentionRow {
        scale: ScoreScale::RootOfHeadAndYarn,
        latent: Some(LatentRow { query_rank: Number::key(&["q_lora_rank"], 1536.0), norm_eps: 1e-6 }),
        ..LLAMA.attention
    },
    experts: Some(ExpertsRow {
        count: Size::or(&["n_routed_experts", "num_experts"], 64),
        per_token: Size::needed(&["num_experts_per_tok"]),
        intermediate_size: Size::or(&["moe_intermediate_size"], 1407),
        layers: ExpertLayers::From("first_k_dense_replace", 0),
        normalize: Flag::Never,
        scale: Number::key(&["routed_scaling_factor"], 1.0),
        groups: GroupsRow::If("topk_method", "group_limited_greedy"),
        shared: SharedRow::Count("n_shared_experts", 2),
        ..EXPERTS
    }),
    fixed: &[
        Fixed("mlp_bias", Only::Bool(false)),
        Fixed("norm_topk_prob", Only::Bool(false)),
        Fixed("scoring_func", Only::Texts(&["softmax"])),
        Fixed("topk_method", Only::Texts(&["greedy", "group_limited_greedy"])),
        Fixed("moe_layer_freq", Only::Number(1.0)),
    ],
    hf: HfRow {
        names: TensorNames {
            latent: Some(LatentNames {
                q: "self_attn.q_proj",
                q_a: "self_attn.q_a_proj",
                q_a_norm: "self_attn.q_a_layernorm",
                q_b: "self_attn.q_b_proj",
                kv_a: "self_attn.kv_a_proj_with_mqa",
                kv_a_norm: "self_attn.kv_a_layernorm",
                kv_b: "self_attn.kv_b_proj",
                apart: None,
            }),
            experts: Some(ExpertNames {
                correction_bias: &["mlp.gate.e_score_correction_bias"],
                shared: &[MlpNames::Separate {
                    gate: "mlp.shared_experts.gate_proj",
                    up: "mlp.shared_experts.up_proj",
                    down: "mlp.shared_experts.down_proj",
                }],
                ..names::PROJECTIONS
            }),
            ..names::LLAMA
        },
        ..LLAMA.hf
    },
    gguf: GgufRow { rope_style: RopeStyle::Gptj, ..NO_BIAS.gguf },
    mlp: NO_BIAS.mlp,
    ..LLAMA
};

/// DeepSeek-V3 and R1.
pub(super) const DEEPSEEK_V3: Family = Family {
    name: "deepseek_v3",
    model_types: &["deepseek_v3"],
    sizes: SizeKeys { context_length: Size::or(&["max_position_embeddings"], 4096), ..LLAMA.sizes },
    experts: Some(ExpertsRow {
        count: Size::or(&["n_routed_experts", "num_local_experts"], 256),
        per_token: Size::or(&["num_experts_per_tok"], 8),
        intermediate_size: Size::or(&["moe_intermediate_size"], 2048),
        layers: ExpertLayers::From("first_k_dense_replace", 3),
        score: ScoreRow::Sigmoid,
        normalize: Flag::Key("norm_topk_prob", true),
        scale: Number::key(&["routed_scaling_factor"], 2.5),
        groups: GroupsRow::BestTwo,
        correction_bias: true,
        shared: SharedRow::Count("n_shared_experts", 1),
        ..EXPERTS
    }),
    fixed: &[
        Fixed("scoring_func", Only::Texts(&["sigmoid"])),
        Fixed("topk_method", Only::Texts(&["noaux_tc"])),
        Fixed("moe_layer_freq", Only::Number(1.0)),
        Fixed("rope_interleave", Only::Bool(true)),
    ],
    hf: HfRow { layers_beside: true, ..DEEPSEEK_V2.hf },
    ..DEEPSEEK_V2
};

/// GPT-OSS.
pub(super) const GPT_OSS: Family = Family {
    name: "gpt_oss",
    model_types: &["gpt_oss"],
    gguf_architectures: &["gpt-oss"],
    sizes: SizeKeys {
        kv_heads: KvHeads::Key(Size { keys: &["num_key_value_heads"], absent: Some(8), derived: Derived::Heads }),
        head_dim: Size { keys: &["head_dim"], absent: Some(64), derived: Derived::HeadShare },
        context_length: Size::or(&["max_position_embeddings"], 131_072),
        ..LLAMA.sizes
    },
    position: PositionRow::Rope(RopeRow {
        theta: Number::key(&["rope_theta"], 150_000.0),
        absent: Some(
            r#"{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
                "original_max_position_embeddings": 4096}"#,
        ),
        ..RopeRow::NEOX
    }),
    norm: NormRow { default_eps: 1e-5, ..RMS },
    blocks: &[BlockCase { when: &[], block: BlockSpec::PRE_NORM }],
    attention: AttentionRow {
        qkv_bias: Flag::Key("attention_bias", true),
        out_bias: Flag::Key("attention_bias", true),
        sinks: true,
        windows: Some(WindowRow { size: Number::key(&["sliding_window"], 128.0), switch: None, layers: WindowLayers::AllButEvery(&[], 2) }),
        ..LLAMA.attention
    },
    mlp: NO_BIAS.mlp,
    experts: Some(ExpertsRow {
        count: Size::or(&["num_local_experts", "num_experts"], 128),
        per_token: Size::or(&["num_experts_per_tok"], 4),
        clamped: Some((Number::key(&["swiglu_limit"], 7.0), Number::key(&["swiglu_alpha"], 1.702))),
        bias: true,
        score: ScoreRow::SoftmaxOfChosen,
        normalize: Flag::Never,
        router_bias: true,
        ..EXPERTS
    }),
    fixed: &[Fixed("hidden_act", Only::Texts(&["silu"]))],
    hf: HfRow {
        names: TensorNames {
            sinks: &["self_attn.sinks"],
            experts: Some(ExpertNames {
                router: "mlp.router",
                storage: &[ExpertStorage::TransposedByTurns { gate_up: "mlp.experts.gate_up_proj", down: "mlp.experts.down_proj" }],
                ..names::PROJECTIONS
            }),
            ..names::LLAMA
        },
        ..LLAMA.hf
    },
    gguf: GgufRow {
        names: TensorNames { mlp_norm: &["post_attention_norm", "ffn_norm"], attention_post_norm: &[], ..names::GGUF },
        yarn_truncates: false,
        ..NO_BIAS.gguf
    },
    ..LLAMA
};
