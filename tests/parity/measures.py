"""What `forgectl eval` prints, against llama.cpp and against numpy.

    cargo build --release --bin forgectl && cargo build --release -p forge-tests --example logits
    python tests/parity/measures.py FORGECTL LOGITS MODEL.gguf OTHER.gguf [--text FILE] [--chunks 4]

1. chunked perplexity of MODEL: llama.cpp computes the same chunks of the same tokens.
2. divergence of OTHER from MODEL: numpy on the logits of both, dumped by examples/logits.rs.

Heavy and on demand; the figures of transformers and lm-eval on a tiny model are recorded in tests/fixtures/eval and
checked by forgectl/tests/eval.rs.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

import numpy as np

from llama import Llama
from llama_cpp import forge_logits
from make_golden import log_softmax
from prompts import DOCUMENT

CONTEXT = 512
MAX_PERPLEXITY_CHANGE = 5e-3
MAX_FIGURE_CHANGE = 1e-3


def eval_json(program, *arguments):
    command = [program, "eval", *arguments, "--context", str(CONTEXT), "--kv-cache-dtype", "f32", "-o", "json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def chunks_of(tokens, prefix, count):
    for start in list(range(0, len(tokens) - CONTEXT + 1, CONTEXT))[:count]:
        chunk = tokens[start : start + CONTEXT]
        yield chunk if prefix is None else [prefix, *chunk[1:]]


def losses(rows, chunk):
    """Negative log-likelihoods of a chunk's second half, from the rows of all its tokens."""
    first = CONTEXT // 2
    scored = log_softmax(rows[first : CONTEXT - 1])
    return -scored[np.arange(len(scored)), chunk[first + 1 :]]


def compare(name, ours, theirs, bound):
    change = abs(ours / theirs - 1.0) if theirs else abs(ours)
    print(f"{name}: forgectl {ours:.6g}, reference {theirs:.6g}, apart by {100 * change:.4f} %")
    assert change <= bound, name


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("forgectl", "logits", "model", "other"):
        parser.add_argument(name)
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("--chunks", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = options.text or pathlib.Path(folder) / "text.txt"
        if not options.text:
            text.write_text(DOCUMENT)
        limits = ("--chunks", str(options.chunks))
        report = eval_json(options.forgectl, "perplexity", options.model, text, *limits)
        divergence = eval_json(options.forgectl, "kld", options.model, options.other, text, *limits)
        llama = Llama(options.model, context=CONTEXT)
        tokens = llama.tokenize(text.read_text())
    prefix = report["protocol"].get("prefixToken")
    chunks = list(chunks_of(tokens, prefix, options.chunks))
    theirs = []
    for chunk in chunks:
        llama.reset()
        theirs.append(losses(llama.feed(chunk, all_logits=True), chunk))
    theirs = np.concatenate(theirs)
    assert len(theirs) == report["tokens"], f"{len(theirs)} tokens scored by llama.cpp, {report['tokens']} by forgectl"
    compare("perplexity", report["perplexity"]["value"], np.exp(theirs.mean()), MAX_PERPLEXITY_CHANGE)

    sequences = [(chunk[:-1], CONTEXT // 2) for chunk in chunks]
    base, other = (np.concatenate(forge_logits(options.logits, path, sequences, llama.vocab_size)) for path in (options.model, options.other))
    base, other = log_softmax(base), log_softmax(other)
    kld = (np.exp(base) * (base - other)).sum(-1)
    targets = np.concatenate([chunk[CONTEXT // 2 + 1 :] for chunk in chunks])
    rows = np.arange(len(targets))
    deltas = np.exp(other[rows, targets]) - np.exp(base[rows, targets])
    compare("mean divergence", divergence["meanKld"]["value"], kld.mean(), MAX_FIGURE_CHANGE)
    compare("median divergence", divergence["medianKld"], np.median(kld), MAX_FIGURE_CHANGE)
    compare("99 % divergence", divergence["p99Kld"], np.quantile(kld, 0.99), MAX_FIGURE_CHANGE)
    compare("largest divergence", divergence["maxKld"], kld.max(), MAX_FIGURE_CHANGE)
    compare("RMS Δp", divergence["rmsDeltaP"]["value"], np.sqrt((deltas**2).mean()), MAX_FIGURE_CHANGE)
    compare("same top-1", divergence["sameTop"]["value"], (base.argmax(-1) == other.argmax(-1)).mean(), MAX_FIGURE_CHANGE)
    change = np.exp(-other[rows, targets].mean()) - np.exp(-base[rows, targets].mean())
    compare("Δ perplexity", divergence["deltaPerplexity"]["value"], change, MAX_FIGURE_CHANGE)


if __name__ == "__main__":
    main()
