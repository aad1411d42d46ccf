"""Tokens per second of Forge and llama.cpp for every storage type that both read, alternately in one run.

    cargo build --release -p forge-tests --example bench_model
    python tests/bench/by_type.py target/release/examples/bench_model [--types Q4_K,Q6_K] [--threads 2] [--rounds 3]

For each type it writes a LLaMA of half a billion parameters whose weights are random blocks of that type with sane
scales (the speed does not depend on the values), and removes it again. A table row has the best of the rounds: what
the machine can do. The last column says whether Forge keeps 0.7 of llama.cpp's
decode, 1 of its prefill.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import gguf
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "parity"))

from llama import Llama  # noqa: E402

F16 = 1
HIDDEN, LAYERS, INNER, HEADS, KV_HEADS, VOCABULARY = 1024, 24, 4096, 16, 4, 32000
# Where the f16 scales of a block lie, and a value for each that gives weights of about 0.02.
SCALES = {
    "Q4_0": {0: 0.004}, "Q4_1": {0: 0.004, 2: -0.03}, "Q5_0": {0: 0.002}, "Q5_1": {0: 0.002, 2: -0.03}, "Q8_0": {0: 0.0003},
    "Q2_K": {80: 0.002, 82: 0.002}, "Q3_K": {108: 0.0005}, "Q4_K": {0: 0.0001, 2: 0.0005}, "Q5_K": {0: 0.00005, 2: 0.0005},
    "Q6_K": {208: 0.00002}, "IQ4_NL": {0: 0.0003}, "IQ4_XS": {0: 0.00002}, "MXFP4": {}, "F16": {}, "BF16": {}, "F32": {},
}  # fmt: skip
DENSE = {"F16": np.float16, "BF16": np.float32, "F32": np.float32}


def matrix(name, rows, columns, random):
    """A random matrix in the type's blocks, as rows of bytes (or of elements)."""
    if name in DENSE:
        values = random.normal(0, 0.02, (rows, columns)).astype(DENSE[name])
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16) if name == "BF16" else values
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    blocks = np.frombuffer(random.bytes(rows * columns // elements * size), np.uint8).reshape(-1, size).copy()
    for at, scale in SCALES[name].items():
        blocks[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = 121
    return blocks.reshape(rows, -1)


def write_model(path, name):
    """Matrices of the layers in the type, the embedding (and so the head) in Q8_0."""
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    visible = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    alphabet = visible + [chr(256 + index) for index in range(256 - len(visible))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(alphabet + [f"<{index}>" for index in range(VOCABULARY - len(alphabet))])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(VOCABULARY - 1)

    def add(tensor, kind, rows, columns):
        kind_number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(tensor, matrix(kind, rows, columns, random), raw_dtype=kind_number)

    add("token_embd.weight", "Q8_0", VOCABULARY, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    kv = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        writer.add_tensor(prefix + "attn_norm.weight", np.ones(HIDDEN, np.float32))
        writer.add_tensor(prefix + "ffn_norm.weight", np.ones(HIDDEN, np.float32))
        add(prefix + "attn_q.weight", name, HIDDEN, HIDDEN)
        add(prefix + "attn_k.weight", name, kv, HIDDEN)
        add(prefix + "attn_v.weight", name, kv, HIDDEN)
        add(prefix + "attn_output.weight", name, HIDDEN, HIDDEN)
        add(prefix + "ffn_gate.weight", name, INNER, HIDDEN)
        add(prefix + "ffn_up.weight", name, INNER, HIDDEN)
        add(prefix + "ffn_down.weight", name, HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_rates(llama, prefill, decode):
    tokens = [20 + (7 * position) % 1000 for position in range(prefill + decode)]
    llama.reset()
    start = time.perf_counter()
    llama.feed_without_logits(tokens[:prefill])
    middle = time.perf_counter()
    for token in tokens[prefill:]:
        llama.feed_without_logits([token])
    return prefill / (middle - start), decode / (time.perf_counter() - middle)


def forge_rates(program, model, threads, prefill, decode):
    sizes = ["--threads", str(threads), "--prefill", str(prefill), "--decode", str(decode), "--batch", "1"]
    report = json.loads(subprocess.run([program, model, *sizes], check=True, capture_output=True).stdout)
    return report["prefill_tokens_per_s"], report["decode_tokens_per_s"]


def measure(name, options, folder):
    path = str(folder / f"{name}.gguf")
    write_model(path, name)
    llama = Llama(path, context=options.prefill + options.decode, threads=options.threads, kv_type=F16)
    llama_rates(llama, options.prefill, 2)
    forge, other = [], []
    for _ in range(options.rounds):
        forge.append(forge_rates(options.program, path, options.threads, options.prefill, options.decode))
        other.append(llama_rates(llama, options.prefill, options.decode))
    pathlib.Path(path).unlink()
    return [(max(rate[at] for rate in forge), max(rate[at] for rate in other)) for at in (0, 1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program")
    parser.add_argument("--types", default=",".join(SCALES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    options = parser.parse_args()
    print(f"{'type':>7} {'prefill/s':>10} {'llama.cpp':>10} {'ratio':>6} {'decode/s':>9} {'llama.cpp':>10} {'ratio':>6}  limits")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.types.split(","):
            (prefill, prefill_other), (decode, decode_other) = measure(name, options, pathlib.Path(folder))
            ratios = prefill / prefill_other, decode / decode_other
            kept = "kept" if ratios[0] >= 1 and ratios[1] >= 0.7 else "missed"
            print(f"{name:>7} {prefill:>10.1f} {prefill_other:>10.1f} {ratios[0]:>6.2f}", end=" ")
            print(f"{decode:>9.1f} {decode_other:>10.1f} {ratios[1]:>6.2f}  {kept}", flush=True)


if __name__ == "__main__":
    main()
