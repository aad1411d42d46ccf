//! Every row of the table of families, in every variant that tests/fixtures/model/rows holds as a Hugging Face folder:
//! logits against transformers (float32 on the stored weights, so 1e-4 of the largest value is asked of every logit),
//! and the promise P2 bit for bit. Each has a test of its own in every module, so that a failure names it.

mod common;

use common::fixture;

checks! { folder: logits = check_logits, batch = check_batch, ranks = check_ranks => {
    bloom: "bloom",
    bloom_6_heads: "bloom-6-heads",
    cohere: "cohere",
    cohere_qk_norm: "cohere-qk-norm",
    deepseek_v2: "deepseek_v2",
    deepseek_v2_lite: "deepseek_v2-lite",
    deepseek_v3: "deepseek_v3",
    falcon_11b: "falcon-11b",
    falcon_40b: "falcon-40b",
    falcon_7b: "falcon-7b",
    falcon_rw: "falcon-rw",
    gemma: "gemma",
    gemma2: "gemma2",
    gemma3: "gemma3",
    glm4: "glm4",
    gpt2: "gpt2",
    gpt_neo: "gpt_neo",
    gpt_neox: "gpt_neox",
    gpt_neox_sequential: "gpt_neox-sequential",
    gpt_oss: "gpt_oss",
    gptj: "gptj",
    granite: "granite",
    llama_attention_bias: "llama-attention-bias",
    llama_dynamic: "llama-dynamic",
    llama_linear: "llama-linear",
    llama_llama3: "llama-llama3",
    llama_longrope: "llama-longrope",
    llama_mlp_bias_tied: "llama-mlp-bias-tied",
    llama_yarn: "llama-yarn",
    llama_yarn_mscale: "llama-yarn-mscale",
    mistral: "mistral",
    mistral_nemo: "mistral-nemo",
    mixtral: "mixtral",
    mixtral_window: "mixtral-window",
    mpt: "mpt",
    mpt_6_heads: "mpt-6-heads",
    olmo: "olmo",
    olmo3: "olmo3",
    olmo_tied: "olmo-tied",
    olmo2: "olmo2",
    olmo2_grouped: "olmo2-grouped",
    olmoe: "olmoe",
    opt: "opt",
    opt_350m: "opt-350m",
    phi: "phi",
    phi_qk_layernorm: "phi-qk-layernorm",
    phi3: "phi3",
    phi3_longrope: "phi3-longrope",
    phi3_longrope_short: "phi3-longrope-short",
    phi4_mini: "phi4-mini",
    phimoe: "phimoe",
    phimoe_longrope: "phimoe-longrope",
    qwen1_5: "qwen1.5",
    qwen2_layer_types: "qwen2-layer-types",
    qwen2_window: "qwen2-window",
    qwen2_moe: "qwen2_moe",
    qwen2_moe_sparse_step: "qwen2_moe-sparse-step",
    qwen3: "qwen3",
    qwen3_window_bias: "qwen3-window-bias",
    qwen3_moe: "qwen3_moe",
    qwen3_moe_mixed: "qwen3_moe-mixed",
    stablelm: "stablelm",
    stablelm_parallel: "stablelm-parallel",
    starcoder2: "starcoder2",
    starcoder2_no_bias: "starcoder2-no-bias",
    yi: "yi",
} }

#[test]
fn every_fixture_is_tested() {
    let source = include_str!("rows.rs");
    let folders = std::fs::read_dir(fixture("rows")).unwrap();
    for name in folders.map(|entry| entry.unwrap().file_name().into_string().unwrap()) {
        assert!(source.contains(&format!(": \"{name}\",")), "{name}");
    }
}
