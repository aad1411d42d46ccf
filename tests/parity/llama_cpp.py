"""Forge against llama.cpp on the real SmolLM2: greedy answers, divergence of whole distributions, perplexity.

    cargo build --release -p forge-tests --example logits
    python tests/parity/llama_cpp.py MODEL.gguf target/release/examples/logits [--text FILE] [--prompts FILE.json]

With a quantized file both engines round activations to 8 bits, and llama.cpp differs from itself between prefill and
decode as much as from us (docs/testing.md): the bounds are then 1.3 times llama.cpp's own divergence (or 1e-3) and
1.3 times as many prompts as differ from itself. An f32 file (dequantize.py) has no such noise: equal tokens and 1e-3.

Heavy and on demand; continuous integration checks the recorded answers instead (parity_real.rs). Other prompts and
texts than ours: a JSON object of name and text, and any text file (the first 1,500 tokens count).
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

import numpy as np

from llama import Llama
from make_golden import STEPS, greedy, log_softmax, token_by_token
from prompts import CASES, DOCUMENT

UNDECIDED_GAP = 0.02
MAX_MEAN_DIVERGENCE = 1e-3
OWN_FACTOR = 1.3
MAX_PERPLEXITY_CHANGE = 5e-3
TEXT_TOKENS = 1500


def forge_logits(program, model, sequences, vocabulary):
    """Rows of logits per (tokens, first row) of `sequences`."""
    lines = "".join(json.dumps({"tokens": tokens, "first": first}) + "\n" for tokens, first in sequences)
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "logits.f32"
        subprocess.run([program, model, out], input=lines.encode(), check=True)
        rows = np.fromfile(out, np.float32).reshape(-1, vocabulary)
    counts = [len(tokens) - first for tokens, first in sequences]
    assert sum(counts) == len(rows), f"{sum(counts)} rows expected, {len(rows)} came"
    return np.split(rows, np.cumsum(counts)[:-1])


def divergences(theirs, ours):
    """Kullback-Leibler divergence per row, over the whole vocabulary."""
    theirs, ours = log_softmax(theirs), log_softmax(ours)
    return (np.exp(theirs) * (theirs - ours)).sum(axis=-1)


def compare_greedy(name, tokens, gaps, ours):
    """Compared tokens and the first difference, up to where llama.cpp itself is undecided."""
    for i, (token, gap, row) in enumerate(zip(tokens, gaps, ours)):
        if gap < UNDECIDED_GAP:
            return i, None
        if int(row.argmax()) != token:
            return i, f"{name} at {i}: {int(row.argmax())} instead of {token} (gap {gap:.4f})"
    return len(tokens), None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("program")
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("--prompts", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    cases = json.loads(options.prompts.read_text()) if options.prompts else CASES
    text = options.text.read_text() if options.text else DOCUMENT
    llama = Llama(options.model, threads=options.threads)
    vocabulary = llama.vocab_size

    differences, own_differences, compared, all_divergences, own_divergences = [], 0, 0, [], []
    for name, prompt_text in cases.items():
        prompt = llama.tokenize(prompt_text)
        tokens, gaps, theirs = greedy(llama, prompt, STEPS)
        (ours,) = forge_logits(options.program, options.model, [(prompt + tokens[:-1], len(prompt) - 1)], vocabulary)
        count, difference = compare_greedy(name, tokens, gaps, ours)
        compared += count
        rows = divergences(np.stack(theirs), ours)
        all_divergences.append(rows)
        stepwise = np.stack(token_by_token(llama, prompt, tokens))
        llama.reset()
        batch = llama.feed(prompt + tokens[:-1], all_logits=True)[len(prompt) - 1 :]
        own_divergences.append(divergences(batch, stepwise))
        own_differences += compare_greedy(name, batch.argmax(axis=-1), gaps, stepwise)[1] is not None
        print(f"{name}: {count} tokens compared, divergence {rows.mean():.2e}, {difference or 'equal'}", flush=True)
        if difference:
            differences.append(difference)
    mean = float(np.concatenate(all_divergences).mean())
    own = float(np.concatenate(own_divergences).mean())
    bound = max(MAX_MEAN_DIVERGENCE, OWN_FACTOR * own)
    print(
        f"{len(cases)} prompts, {compared} tokens compared, {len(differences)} prompts differ (llama.cpp from itself "
        f"{own_differences}), mean divergence {mean:.2e} (its own {own:.2e})"
    )
    failures = differences if len(differences) > OWN_FACTOR * own_differences else []
    if mean > bound:
        failures.append(f"mean divergence {mean:.2e}")

    tokens = llama.tokenize(text)[:TEXT_TOKENS]
    llama.reset()
    theirs = llama.feed(tokens, all_logits=True)[:-1]
    (ours,) = forge_logits(options.program, options.model, [(tokens[:-1], 0)], vocabulary)
    rows = divergences(theirs, ours)
    chosen = np.arange(len(tokens) - 1), np.array(tokens[1:])
    perplexities = [float(np.exp(-log_softmax(logits)[chosen].mean())) for logits in (ours, theirs)]
    print(f"text: {len(tokens)} tokens, divergence {rows.mean():.2e}, largest {rows.max():.2e}, perplexity {perplexities[0]:.4f}, llama.cpp {perplexities[1]:.4f}")
    if rows.mean() > bound:
        failures.append(f"mean divergence {rows.mean():.2e} on the text")
    if abs(perplexities[0] / perplexities[1] - 1) > MAX_PERPLEXITY_CHANGE:
        failures.append(f"perplexity {perplexities[0]} instead of {perplexities[1]}")
    print("\n".join(["FAILED", *failures]) if failures else "passed")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
