//! Decoders with quantized weights of every type (tests/fixtures/model/quantized): logits, and the promise P2 bit for bit.

mod common;

checks! { quantized: logits = check_rounded_logits, batch = check_batch, ranks = check_ranks => {
    llama_q4_0: "llama-q4_0",
    llama_q4_1: "llama-q4_1",
    llama_q8_0: "llama-q8_0",
    llama_q5_0: "llama-q5_0",
    llama_q5_1: "llama-q5_1",
    llama_q2_k: "llama-q2_k",
    llama_q3_k: "llama-q3_k",
    llama_q4_k: "llama-q4_k",
    llama_q5_k: "llama-q5_k",
    llama_q6_k: "llama-q6_k",
    llama_iq4_nl: "llama-iq4_nl",
    llama_iq4_xs: "llama-iq4_xs",
    llama_mxfp4: "llama-mxfp4",
    qwen3moe_q4_0: "qwen3moe-q4_0",
    qwen3moe_q4_1: "qwen3moe-q4_1",
    qwen3moe_q8_0: "qwen3moe-q8_0",
    qwen3moe_q5_0: "qwen3moe-q5_0",
    qwen3moe_q5_1: "qwen3moe-q5_1",
    qwen3moe_q2_k: "qwen3moe-q2_k",
    qwen3moe_q3_k: "qwen3moe-q3_k",
    qwen3moe_q4_k: "qwen3moe-q4_k",
    qwen3moe_q5_k: "qwen3moe-q5_k",
    qwen3moe_q6_k: "qwen3moe-q6_k",
    qwen3moe_iq4_nl: "qwen3moe-iq4_nl",
    qwen3moe_iq4_xs: "qwen3moe-iq4_xs",
    qwen3moe_mxfp4: "qwen3moe-mxfp4",
} }

mod folders {
    crate::checks! { quantized_folder: logits = check_rounded_logits, batch = check_batch, ranks = check_ranks => {
        gpt_oss_mxfp4: "gpt_oss-mxfp4",
    } }
}

/// 8-bit floats with every kind of scales; `tests/loaders.rs` has their logits.
mod eight_bit_floats {
    crate::checks! { torch_folder: batch = check_batch, ranks = check_ranks => {
        block: "fp8-block",
        row: "fp8-row",
        matrix: "fp8-matrix",
        plain: "fp8-plain",
    } }
}
