"""Writes what llama.cpp answers on the real SmolLM2: smollm2_greedy.json of tests/fixtures/parity, and smollm2_f32.json
of an f32 copy of the same weights.

    python tests/parity/make_golden.py MODEL.gguf [--only greedy|f32] [--threads N]

Per case: the prompt's token ids, 64 greedy tokens, and at each of them the gap between llama.cpp's two largest
logits; at some positions the leading alternatives with their log-probabilities, twice: after a prompt computed at once, and
after one computed token by token (and the most likely token at each position of the latter). The two differ, because activations are rounded to 8 bits: how much is llama.cpp's own
uncertainty, and the measure for ours. For the document the log-probability of each token. `parity_real.rs` checks
Forge against the files without llama.cpp at hand.

The f32 copy rounds no activation, so there is one run, and more digits of it. Its prompts and its document are those
of the other file, by name.
"""

import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from llama import VERSION, Llama
from prompts import CASES, DOCUMENT

STEPS = 64
POSITIONS = [0, 5, 20, 63]
TOP = 20
EXACT_TOP = 16
HERE = pathlib.Path(__file__).resolve().parent
OUT = HERE.parent / "fixtures" / "parity"


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


def document_logprobs(llama):
    """Token ids of the document and the log-probability of each but the first."""
    llama.reset()
    tokens = llama.tokenize(DOCUMENT)
    logprobs = log_softmax(llama.feed(tokens, all_logits=True))
    chosen = logprobs[np.arange(len(tokens) - 1), tokens[1:]]
    print(f"document: {len(tokens)} tokens, perplexity {np.exp(-chosen.mean()):.4f}")
    return tokens, chosen


def write(name, golden):
    """One line per case, so that a change shows which."""
    lines = [f" {json.dumps(key)}: {json.dumps(golden[key])}," for key in ("model_sha256", "made_by")]
    lines += [' "cases": [', ",\n".join("  " + json.dumps(case, separators=(",", ":")) for case in golden["cases"]), " ],"]
    lines += [f' "document": {json.dumps(golden["document"], separators=(",", ":"))}']
    path = OUT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["{", *lines, "}"]) + "\n")
    print(f"{path}: {path.stat().st_size} bytes")


def greedy_golden(llama):
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
    tokens, logprobs = document_logprobs(llama)
    return {"cases": cases, "document": {"tokens": tokens, "logprobs": [round(float(value), 4) for value in logprobs]}}


def exact_golden(llama):
    cases = []
    for name, text in CASES.items():
        tokens, gaps, rows = greedy(llama, llama.tokenize(text), STEPS)
        leading = {}
        for position in POSITIONS:
            logprobs = log_softmax(rows[position])
            ids = np.argsort(-logprobs, kind="stable")[:EXACT_TOP]
            leading[str(position)] = [[int(i), round(float(logprobs[i]), 6)] for i in ids]
        cases.append({"name": name, "tokens": tokens, "gaps": [round(gap, 4) for gap in gaps], "leading": leading})
        print(f"{name}: smallest gap {min(gaps):.4f}", flush=True)
    _, logprobs = document_logprobs(llama)
    return {"cases": cases, "document": [round(float(value), 6) for value in logprobs]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--only", choices=["greedy", "f32"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    head = {
        "model_sha256": hashlib.sha256(options.model.read_bytes()).hexdigest(),
        "made_by": f"xllamacpp {VERSION}: f32 keys and values, flash attention off",
    }
    if options.only != "f32":
        write("smollm2_greedy.json", head | greedy_golden(Llama(options.model, threads=options.threads)))
    if options.only != "greedy":
        with tempfile.TemporaryDirectory() as folder:
            copy = pathlib.Path(folder) / "f32.gguf"
            subprocess.run([sys.executable, HERE / "dequantize.py", options.model, copy], check=True)
            write("smollm2_f32.json", head | exact_golden(Llama(copy, threads=options.threads)))


if __name__ == "__main__":
    main()
