"""Writes tests/fixtures/parity/smollm2_greedy.json: what llama.cpp answers on the real SmolLM2.

    python tests/parity/make_golden.py MODEL.gguf [THREADS]

Per case: the prompt's token ids, 64 greedy tokens, and at each of them the gap between llama.cpp's two largest
logits; at some positions the leading alternatives with their log-probabilities, twice: after a prompt computed at once, and
after one computed token by token (and the most likely token at each position of the latter). The two differ, because activations are rounded to 8 bits: how much is llama.cpp's own
uncertainty, and the measure for ours. For the document the log-probability of each token. `parity_real.rs` checks
Forge against the file without llama.cpp at hand.
"""

import hashlib
import json
import pathlib
import sys

import numpy as np

from llama import VERSION, Llama
from prompts import CASES, DOCUMENT

STEPS = 64
POSITIONS = [0, 5, 20, 63]
TOP = 20
OUT = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "parity" / "smollm2_greedy.json"


def log_softmax(rows):
    rows = rows.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))


def greedy(llama, prompt, steps):
    """Tokens, gaps and logit rows of `steps` greedy choices; an end token does not stop it."""
    llama.reset()
    row = llama.feed(prompt)[0]
    tokens, gaps, rows = [], [], []
    for _ in range(steps):
        second, first = np.partition(row, -2)[-2:]
        tokens.append(int(row.argmax()))
        gaps.append(float(first - second))
        rows.append(row)
        row = llama.feed([tokens[-1]])[0]
    return tokens, gaps, rows


def token_by_token(llama, prompt, tokens):
    """Logit rows at the positions that choose `tokens`, the prompt being computed one token at a time as well."""
    llama.reset()
    rows = [llama.feed([token])[0] for token in prompt + tokens[:-1]]
    return rows[len(prompt) - 1 :]


def leading(row, again):
    logprobs, again = log_softmax(row), log_softmax(again)
    ids = np.argsort(-logprobs, kind="stable")[:TOP]
    return [[int(i), round(float(logprobs[i]), 4), round(float(again[i]), 4)] for i in ids]


def main():
    path = pathlib.Path(sys.argv[1])
    llama = Llama(path, threads=int(sys.argv[2]) if len(sys.argv) > 2 else 2)
    cases = []
    for name, text in CASES.items():
        prompt = llama.tokenize(text)
        tokens, gaps, rows = greedy(llama, prompt, STEPS)
        case = {"name": name, "prompt": prompt, "tokens": tokens, "gaps": [round(gap, 4) for gap in gaps]}
        again = token_by_token(llama, prompt, tokens)
        case["again"] = [int(row.argmax()) for row in again]
        case["leading"] = {str(i): leading(rows[i], again[i]) for i in POSITIONS}
        cases.append(case)
        print(f"{name}: {len(prompt)} prompt tokens, smallest gap {min(gaps):.4f}")
    llama.reset()
    tokens = llama.tokenize(DOCUMENT)
    logprobs = log_softmax(llama.feed(tokens, all_logits=True))
    chosen = logprobs[np.arange(len(tokens) - 1), tokens[1:]]
    print(f"document: {len(tokens)} tokens, perplexity {np.exp(-chosen.mean()):.4f}")
    golden = {
        "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "made_by": f"xllamacpp {VERSION}: f32 keys and values, flash attention off",
        "cases": cases,
        "document": {"tokens": tokens, "logprobs": [round(float(value), 4) for value in chosen]},
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    lines = ["{"]
    lines += [f" {json.dumps(key)}: {json.dumps(golden[key])}," for key in ("model_sha256", "made_by")]
    lines += [' "cases": [', ",\n".join("  " + json.dumps(case, separators=(",", ":")) for case in cases), " ],"]
    lines += [f' "document": {json.dumps(golden["document"], separators=(",", ":"))}', "}"]
    OUT.write_text("\n".join(lines) + "\n")
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
