//! The rows of the table of families as GGUF files that llama.cpp's own converter wrote (tests/fixtures/model/rows-gguf):
//! names, permutations and metadata of the format, held to the same references as the folders.

mod common;

checks! { gguf: logits = check_logits, ranks = check_ranks => {
    falcon_40b: "falcon-40b",
    falcon_7b: "falcon-7b",
    gemma: "gemma",
    gemma2: "gemma2",
    gemma3: "gemma3",
    gpt2: "gpt2",
    gpt_neox: "gpt_neox",
    gpt_neox_sequential: "gpt_neox-sequential",
    granite: "granite",
    llama_attention_bias: "llama-attention-bias",
    llama_linear: "llama-linear",
    llama_llama3: "llama-llama3",
    llama_yarn: "llama-yarn",
    mistral_nemo: "mistral-nemo",
    mixtral: "mixtral",
    mpt: "mpt",
    mpt_6_heads: "mpt-6-heads",
    olmo: "olmo",
    olmo2_grouped: "olmo2-grouped",
    olmo3: "olmo3",
    olmoe: "olmoe",
    phi: "phi",
    phi3: "phi3",
    phi3_longrope: "phi3-longrope",
    phi4_mini: "phi4-mini",
    qwen1_5: "qwen1.5",
    qwen2_moe: "qwen2_moe",
    qwen3: "qwen3",
    qwen3_moe: "qwen3_moe",
    stablelm: "stablelm",
    starcoder2_no_bias: "starcoder2-no-bias",
} }
