"""Tokenizers against llama.cpp (GGUF files, vocabularies alone will do) and transformers (folders).

    python tokenizers.py PROGRAM PATH ...

PROGRAM is the example `text_results` of forge-text. Paths are GGUF files and Hugging Face folders at hand; a llama.cpp
source package has vocabularies of many families (models/ggml-vocab-*.gguf). Needs gguf, xllamacpp of the version that
llama.py names, transformers and sentencepiece. The texts are those of tests/fixtures/text/corpus.py, random
characters, and lines of `.inp` files beside a vocabulary.
"""

import json
import pathlib
import random
import subprocess
import sys

import gguf

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "fixtures" / "text"))
from corpus import CORPUS, HOSTILE  # noqa: E402
from llama_vocab import LlamaVocabulary  # noqa: E402

ALPHABETS = [
    "abc XYZ 's 'LL 012 \n\t.,!?/", "äößÉñ ǅ ſ", "привет МИР", "漢字かなカナ。、", "한글 조합", "שלום مرحبا ١٢", "👍🏽👨‍👩‍👧🇩🇪❤️", "\u0300\u0301e\u200d\u00a0\u3000",
    "<s></s><|im_start|>", "    \n\n\r\n \t",
]  # fmt: skip


def texts(path):
    generator = random.Random(7)
    mixed = "".join(ALPHABETS)
    made = ["".join(generator.choice(generator.choice([mixed, *ALPHABETS])) for _ in range(generator.randrange(1, 60))) for _ in range(400)]
    lines = path.with_name(path.name + ".inp")
    given = lines.read_text().split("\n__ggml_vocab_test__\n") if lines.exists() else []
    return CORPUS + HOSTILE + given + made


def metadata(path):
    """`tokenizer.ggml.*` without the prefix, as JSON."""
    fields = gguf.GGUFReader(path).fields
    take = {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in fields.items() if key.startswith("tokenizer.ggml.")}
    return take | {"name": fields["general.name"].contents() if "general.name" in fields else None}


def reference(path):
    """Functions for ids of a text, and for ids with what goes around it."""
    if path.is_dir():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path)
        return lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.encode
    vocabulary = LlamaVocabulary(path)
    return vocabulary.encode, lambda text: vocabulary.encode(text, add_special=True)


def main():
    program, *paths = sys.argv[1:]
    failed = False
    for path in map(pathlib.Path, paths):
        given = texts(path)
        request = {"texts": given} | ({"folder": str(path)} if path.is_dir() else {"gguf": metadata(path)})
        done = subprocess.run([program], input=json.dumps(request), capture_output=True, text=True)
        if done.returncode:
            print(f"{path.name}: {done.stderr}")
            failed = True
            continue
        result = json.loads(done.stdout)
        if "error" in result:
            print(f"{path.name}: {result['error'][:200]}")
            continue
        plain, around = reference(path)
        differing = lost = 0
        for text, found in zip(given, result["results"]):
            expected = {"ids": plain(text), "with_special": around(text)}
            if any(found[key] != ids for key, ids in expected.items()):
                differing += 1
                if differing <= 3:
                    print(f"{path.name}: {text!r}\n  reference {expected['ids']}\n  Forge     {found['ids']}")
            lost += found["decoded"] != text
            if found["decoded"] != found["streamed"]:
                print(f"{path.name}: {text!r} streams as {found['streamed']!r}, decodes as {found['decoded']!r}")
                failed = True
        print(f"{path.name}: {len(given)} texts, {differing} differ, {lost} do not come back as they went in")
        failed |= differing > 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
