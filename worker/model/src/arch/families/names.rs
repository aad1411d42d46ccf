//! Names of tensors: how a family calls what the decoder needs, and the ways to store it.
//!
//! Invariant: a list of names is in the order of preference; the first that a checkpoint has is meant.

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
    /// `{}` is the head, where each has a tensor of its own.
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

/// Names of multi-head latent attention; see [`crate::arch::LatentSpec`].
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
    /// Where keys and values are stored apart: [heads, latent, key], which is transposed, and [heads, value, latent].
    pub apart: Option<(&'static str, &'static str)>,
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

/// No tensor at all.
pub(super) const NONE: TensorNames = TensorNames {
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

/// LLaMA's names in a Hugging Face folder, which most families follow.
pub(super) const LLAMA: TensorNames = TensorNames {
    embedding: &["embed_tokens"],
    final_norm: &["norm"],
    head: &["lm_head", "language_model.lm_head"],
    layer: "layers.{}.",
    attention_norm: &["input_layernorm"],
    qkv: &[QkvNames::Separate { q: "self_attn.q_proj", k: "self_attn.k_proj", v: "self_attn.v_proj" }],
    out: &["self_attn.o_proj"],
    mlp_norm: &["post_attention_layernorm"],
    mlp: &[MlpNames::Separate { gate: "mlp.gate_proj", up: "mlp.up_proj", down: "mlp.down_proj" }],
    ..NONE
};

/// Norms of queries and keys as LLaMA-like families name them.
pub(super) const LLAMA_QK_NORM: TensorNames = TensorNames { q_norm: &["self_attn.q_norm"], k_norm: &["self_attn.k_norm"], ..LLAMA };

/// Norms before and after both parts, as Gemma 2 and 3 name them.
pub(super) const GEMMA_SANDWICH: TensorNames = TensorNames {
    attention_post_norm: &["post_attention_layernorm"],
    mlp_norm: &["pre_feedforward_layernorm"],
    mlp_post_norm: &["post_feedforward_layernorm"],
    ..LLAMA_QK_NORM
};

/// A plain GPT's names: `wte`, `h.N.ln_1` and so on.
pub(super) const GPT: TensorNames = TensorNames {
    embedding: &["wte"],
    positions: &["wpe"],
    final_norm: &["ln_f"],
    head: &["lm_head"],
    layer: "h.{}.",
    attention_norm: &["ln_1"],
    mlp_norm: &["ln_2"],
    mlp: &[MlpNames::Plain { up: "mlp.c_fc", down: "mlp.c_proj" }],
    ..NONE
};

/// Names of GPT-NeoX, BLOOM and Falcon within a layer.
pub(super) const QUERY_KEY_VALUE: TensorNames = TensorNames {
    embedding: &["word_embeddings"],
    embedding_norm: &["word_embeddings_layernorm"],
    final_norm: &["ln_f"],
    head: &["lm_head"],
    layer: "h.{}.",
    attention_norm: &["input_layernorm"],
    qkv: &[QkvNames::Grouped("self_attention.query_key_value")],
    out: &["self_attention.dense"],
    mlp_norm: &["post_attention_layernorm"],
    mlp: &[MlpNames::Plain { up: "mlp.dense_h_to_4h", down: "mlp.dense_4h_to_h" }],
    ..NONE
};

/// An expert of most families.
pub(super) const PROJECTIONS: ExpertNames = ExpertNames {
    router: "mlp.gate",
    correction_bias: &[],
    storage: &[ExpertStorage::PerExpert(MlpNames::Separate {
        gate: "mlp.experts.{}.gate_proj",
        up: "mlp.experts.{}.up_proj",
        down: "mlp.experts.{}.down_proj",
    })],
    shared: &[],
    shared_gate: "",
};

/// Mixtral's experts.
pub(super) const MIXTRAL_EXPERTS: ExpertNames = ExpertNames {
    router: "block_sparse_moe.gate",
    storage: &[ExpertStorage::PerExpert(MlpNames::Separate {
        gate: "block_sparse_moe.experts.{}.w1",
        up: "block_sparse_moe.experts.{}.w3",
        down: "block_sparse_moe.experts.{}.w2",
    })],
    ..PROJECTIONS
};

/// A GGUF file's own names, the same for most families.
pub(super) const GGUF: TensorNames = TensorNames {
    embedding: &["token_embd"],
    positions: &["position_embd"],
    embedding_norm: &["token_embd_norm"],
    final_norm: &["output_norm"],
    head: &["output"],
    layer: "blk.{}.",
    attention_norm: &["attn_norm"],
    attention_post_norm: &["post_attention_norm"],
    qkv: &[QkvNames::Separate { q: "attn_q", k: "attn_k", v: "attn_v" }, QkvNames::Concat("attn_qkv")],
    q_norm: &["attn_q_norm"],
    k_norm: &["attn_k_norm"],
    sinks: &["attn_sinks.weight"],
    latent: Some(LatentNames {
        q: "attn_q",
        q_a: "attn_q_a",
        q_a_norm: "attn_q_a_norm",
        q_b: "attn_q_b",
        kv_a: "attn_kv_a_mqa",
        kv_a_norm: "attn_kv_a_norm",
        kv_b: "attn_kv_b",
        apart: Some(("attn_k_b", "attn_v_b")),
    }),
    out: &["attn_output"],
    mlp_norm: &["ffn_norm"],
    mlp_post_norm: &["post_ffw_norm"],
    mlp: &[
        MlpNames::Separate { gate: "ffn_gate", up: "ffn_up", down: "ffn_down" },
        MlpNames::GateUp { gate_up: "ffn_up", down: "ffn_down" },
        MlpNames::Plain { up: "ffn_up", down: "ffn_down" },
    ],
    experts: Some(ExpertNames {
        router: "ffn_gate_inp",
        correction_bias: &["exp_probs_b.bias"],
        storage: &[
            ExpertStorage::Stacked(MlpNames::Separate { gate: "ffn_gate_exps", up: "ffn_up_exps", down: "ffn_down_exps" }),
            ExpertStorage::PerExpert(MlpNames::Separate { gate: "ffn_gate.{}", up: "ffn_up.{}", down: "ffn_down.{}" }),
        ],
        shared: &[MlpNames::Separate { gate: "ffn_gate_shexp", up: "ffn_up_shexp", down: "ffn_down_shexp" }],
        shared_gate: "ffn_gate_inp_shexp",
    }),
    ..NONE
};
