"""Tokens per second of Forge and llama.cpp on one machine, alternately in one run, so that both see the same noise.

    cargo build --release -p forge-tests --example bench_model
    python tests/bench/speed.py MODEL.gguf target/release/examples/bench_model [--threads 2] [--rounds 3]

Prefill of 512 tokens in one go, decode of 128 tokens after them; f16 keys and values for both. One line of JSON with
the best and the median of each; the best is what the machine can do, the median what one gets beside other work.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "parity"))

from llama import Llama  # noqa: E402

F16 = 1
PREFILL, DECODE = 512, 128


def llama_rates(llama):
    tokens = [20 + (7 * position) % 1000 for position in range(PREFILL + DECODE)]
    llama.reset()
    start = time.perf_counter()
    llama.feed_without_logits(tokens[:PREFILL])
    middle = time.perf_counter()
    for token in tokens[PREFILL:]:
        llama.feed_without_logits([token])
    end = time.perf_counter()
    return {"prefill": PREFILL / (middle - start), "decode": DECODE / (end - middle)}


def forge_rates(program, model, threads):
    sizes = ["--threads", str(threads), "--prefill", str(PREFILL), "--decode", str(DECODE), "--batch", "32"]
    report = json.loads(subprocess.run([program, model, *sizes], check=True, capture_output=True).stdout)
    return {
        "prefill": report["prefill_tokens_per_s"],
        "decode": report["decode_tokens_per_s"],
        "batch32_decode": report["batch_decode_tokens_per_s"],
    }


def summary(rounds):
    return {name: {"best": round(max(values), 1), "median": round(statistics.median(values), 1)}
            for name in rounds[0] for values in [[one[name] for one in rounds]]}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("program")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    llama = Llama(options.model, context=PREFILL + DECODE, threads=options.threads, kv_type=F16)
    llama_rates(llama)
    forge, other = [], []
    for _ in range(options.rounds):
        forge.append(forge_rates(options.program, options.model, options.threads))
        other.append(llama_rates(llama))
    print(json.dumps({"threads": options.threads, "forge": summary(forge), "llama.cpp": summary(other)}))


if __name__ == "__main__":
    main()
