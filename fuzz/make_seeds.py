"""Writes the seeds of fuzz targets into fuzz/seeds/TARGET: small, valid, and unlike each other. Those of messages between
Forge's processes are written by tests, from the messages' own types (docs/testing.md).

    python fuzz/make_seeds.py

They are committed: the smoke test (tests/fuzz_smoke.rs) mutates them with a stable toolchain, and
`cargo +nightly fuzz run TARGET fuzz/corpus/TARGET fuzz/seeds/TARGET` starts from them.
"""

import base64
import json
import pathlib
import struct

SEEDS = pathlib.Path(__file__).resolve().parent / "seeds"
FIXTURES = SEEDS.parent.parent / "tests" / "fixtures"
CONFIGS = SEEDS.parent.parent / "cluster-configs"
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind, value):
    return string(value) if kind == STRING else struct.pack("<" + FORMATS[kind], value)


def array(kind, values):
    return ARRAY, struct.pack("<IQ", kind, len(values)) + b"".join(scalar(kind, value) for value in values)


def gguf(version, entries, tensors, alignment=32):
    """`tensors`: name, shape (fastest dimension first), type number, bytes."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    for key, (kind, value) in entries.items():
        out += string(key) + struct.pack("<I", kind) + (value if kind == ARRAY else scalar(kind, value))
    data = b""
    for name, shape, kind, raw in tensors:
        data += bytes(-len(data) % alignment)
        out += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        out += struct.pack("<IQ", kind, len(data))
        data += raw
    return out + bytes(-len(out) % alignment) + data


def gguf_seeds():
    llama = {
        "general.architecture": (STRING, "llama"),
        "general.name": (STRING, "seed"),
        "llama.block_count": (U32, 1),
        "llama.embedding_length": (U32, 32),
        "llama.context_length": (U32, 64),
        "llama.feed_forward_length": (U32, 32),
        "llama.attention.head_count": (U32, 2),
        "llama.attention.head_count_kv": (U32, 1),
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "llama.rope.freq_base": (F32, 10000.0),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.tokens": array(STRING, ["<s>", "a", "b", "ab"]),
        "tokenizer.ggml.token_type": array(I32, [3, 1, 1, 1]),
        "tokenizer.ggml.merges": array(STRING, ["a b"]),
        "tokenizer.ggml.add_bos_token": (BOOL, True),
    }
    matrix = ("token_embd.weight", [32, 4], 0, bytes(512))
    yield "llama", gguf(3, llama, [matrix, ("output_norm.weight", [32], 0, bytes(128))])
    yield "version2", gguf(2, {"general.architecture": (STRING, "gpt2")}, [("a", [4], 0, bytes(16))])
    kinds = {f"k{kind}": (kind, 1) for kind in FORMATS}
    yield "all_scalars", gguf(3, kinds, [("a", [1], 0, bytes(4))])
    arrays = {f"k{kind}": array(kind, [1, 0, 1]) for kind in FORMATS}
    nested = (ARRAY, struct.pack("<IQ", ARRAY, 2) + (struct.pack("<IQ", U8, 2) + b"ab") * 2)
    yield "all_arrays", gguf(3, {**arrays, "nested": nested}, [("a", [1], 0, bytes(4))])
    types = [("f16", [2], 1, bytes(4)), ("bf16", [2], 30, bytes(4)), ("q4_0", [32], 2, bytes(18)), ("q4_1", [32], 3, bytes(20)), ("q8_0", [32, 2], 8, bytes(68))]  # fmt: skip
    yield "all_types", gguf(3, {"general.alignment": (U32, 64)}, types, alignment=64)
    yield "other_type", gguf(3, {}, [("iq2_xxs", [256], 16, bytes(66))])


def vocabulary():
    """Pieces, their scores and their types: what SentencePiece writes for a handful of letters."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<t>", 0.0, 4), ("\u2581", -3.0, 1), ("a", -4.0, 1), ("b", -5.0, 1)]
    return pieces + [("\u2581a", -1.0, 1), ("ab", -2.0, 1), ("aa", -2.5, 1)]


def charsmap():
    """One rule, A to a: a trie of 256 units in which only the unit of A leads on."""
    units = [0] * 512
    units[0] = 256 << 10
    units[256 ^ ord("A")] = ord("A") | 1 << 8 | (256 ^ 300) << 10
    units[(256 ^ ord("A")) ^ (256 ^ 300)] = 1 << 31
    blob = struct.pack("<512I", *units)
    return struct.pack("<I", len(blob)) + blob + b"a\0"


def gguf_tokenizer_seeds():
    def file(model, **more):
        texts, scores, kinds = zip(*vocabulary())
        entries = {
            "tokenizer.ggml.model": (STRING, model),
            "tokenizer.ggml.tokens": array(STRING, texts),
            "tokenizer.ggml.scores": array(F32, scores),
            "tokenizer.ggml.token_type": array(I32, kinds),
            "tokenizer.ggml.bos_token_id": (U32, 1),
            "tokenizer.ggml.eos_token_id": (U32, 2),
            "tokenizer.ggml.unknown_token_id": (U32, 0),
        }
        return gguf(3, entries | {f"tokenizer.ggml.{key}": value for key, value in more.items()}, [("a", [1], 0, bytes(4))])

    yield "llama", file("llama", add_space_prefix=(BOOL, False), add_bos_token=(BOOL, True))
    yield "t5", file("t5", remove_extra_whitespaces=(BOOL, True), precompiled_charsmap=array(U8, charsmap()))
    yield "gpt2", file("gpt2", pre=(STRING, "bloom"), merges=array(STRING, ["a b", "a a"]))


def varint(value):
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def message(fields):
    """Protobuf: field number and value, by the value's type."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            raw = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(raw)) + raw
    return out


def sentencepiece_seeds():
    pieces = [(1, message([(1, text), (2, score), (3, kind)])) for text, score, kind in vocabulary()]
    bytes_ = [(1, message([(1, f"<0x{byte:02X}>"), (2, 0.0), (3, 6)])) for byte in range(256)]
    yield "bpe", message(pieces + [(2, message([(3, 2)])), (3, message([(4, 0)]))])
    yield "byte_fallback", message(pieces + bytes_ + [(2, message([(3, 2), (35, 1)])), (3, message([(3, 0)]))])
    yield "unigram", message(pieces + [(2, message([(3, 1), (24, 1)])), (3, message([(2, charsmap())]))])
    yield "unused", message(pieces + [(1, message([(1, "abab"), (2, -0.5), (3, 5)])), (2, message([(3, 2)]))])
    yield "other_algorithm", message(pieces + [(2, message([(3, 3)]))])


def tokenizer_json_seeds():
    def file(model, **more):
        return json.dumps({"version": "1.0", "model": model, **more}, separators=(",", ":")).encode()

    special = [{"id": 3, "content": "<s>", "special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": True}]
    bpe = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    yield "bpe", file(bpe, added_tokens=special, pre_tokenizer=level, decoder=level)
    split = {"type": "Split", "pattern": {"Regex": "a+| ?b+|\\s+"}, "behavior": "Isolated", "invert": False}
    pair = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    single = {"type": "TemplateProcessing", "single": pair, "pair": pair, "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}}
    yield "template", file(bpe, added_tokens=special, pre_tokenizer=split, post_processor=single)
    pieces = [[text, score] for text, score, _ in vocabulary()]
    rules = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap()).decode()}
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    yield "unigram", file({"type": "Unigram", "unk_id": 0, "vocab": pieces}, normalizer=rules, pre_tokenizer=space, decoder=space)
    words = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
    yield "wordpiece", file({**words, "vocab": {"[UNK]": 0, "a": 1, "##b": 2}}, decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})


def vocab_merges_seeds():
    yield "small", b'{"a":0,"b":1,"ab":2,"\xc4\xa0":3}\0#version: 0.2\na b\n'
    yield "no_merges", b'{"a":0,"b":1}\0'
    yield "wrong_merge", b'{"a":0,"b":1}\0a b\nb b\n'


def chat_template_seeds():
    for name in ["chatml", "generation", "parts", "smollm2"]:
        yield name, (FIXTURES / "text" / "templates" / f"{name}.jinja").read_bytes()
    carried = "{% set ns = namespace(x=[]) %}{% for i in range(9) %}{% set ns.x = ns.x + [i] %}{% endfor %}{{ ns.x | join }}"
    yield "carried", carried.encode()
    yield "calls", b"{% macro f(n) %}{% if n %}{{ f(n - 1) ~ 'a' * n }}{% endif %}{% endmacro %}{{ f(3) | upper }}"


def safetensors_seeds():
    def file(header, data=b""):
        raw = json.dumps(header).encode() if isinstance(header, dict) else header
        return struct.pack("<Q", len(raw)) + raw + data

    def entry(dtype, shape, start, end):
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    yield "two", file({"a": entry("F32", [2, 2], 0, 16), "b": entry("F16", [3], 16, 22)}, bytes(22))
    yield "metadata", file({"__metadata__": {"format": "pt"}, "w": entry("BF16", [1, 4], 0, 8)}, bytes(8))
    yield "scalar", file({"s": entry("F32", [], 0, 4)}, bytes(4))
    yield "other_type", file({"i": entry("I64", [1], 0, 8)}, bytes(8))
    yield "empty", file({})
    yield "gap", file({"a": entry("F32", [1], 4, 8)}, bytes(8))


def torch_seeds():
    """Of tests/fixtures/torch/make.py, which torch.save wrote."""
    for name in ("types-2", "types-4", "shared", "evil", "compressed", "training", "transposed"):
        yield name, (FIXTURES / "torch" / "files" / f"{name}.bin").read_bytes()


def config_seeds():
    """Of rows that are as unlike as possible."""
    for name in ("gpt2", "mixtral", "gemma3", "phi3-longrope", "deepseek_v3", "falcon-7b", "gpt_oss", "llama-yarn"):
        yield name, (FIXTURES / "model" / "rows" / name / "config.json").read_bytes()


def weight_index_seeds():
    yield "two", {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    yield "one", {"weight_map": {"a.b.c": "x"}}
    yield "elsewhere", {"weight_map": {"a": "../x", "b": "/x", "c": "a/b"}}


def chat_seeds():
    user = [{"role": "user", "content": "Why is the sky blue?"}]
    yield "plain", {"model": "forge", "messages": user}
    yield "sampling", {
        "model": "forge", "messages": user, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "n": 2, "seed": 7,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "logit_bias": {"5": -100, "6": 1.5},
        "stop": ["END", "\n"], "max_completion_tokens": 16, "min_tokens": 1, "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    yield "stream", {"messages": user, "stream": True, "stream_options": {"include_usage": True}}
    parts = [{"type": "text", "text": "a\u00e9\U0001f600"}, {"type": "text", "text": ""}]
    yield "parts", {"messages": [{"role": "system", "content": "x"}, {"role": "user", "name": "n", "content": parts}]}
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "tool", "tool_call_id": "c", "content": "3"}]
    yield "turns", {"messages": turns, "add_generation_prompt": False, "continue_final_message": False, "metadata": {"a": "b"}}
    yield "refused", {"messages": user, "response_format": {"type": "json_schema"}, "tools": [{"type": "function"}]}
    yield "template", {"messages": user, "chat_template_kwargs": {"enable_thinking": False, "x": 1.5}, "cache_salt": "s"}


def completion_seeds():
    yield "text", {"model": "forge", "prompt": "Once upon a time", "max_tokens": 4, "echo": True, "logprobs": 2}
    yield "texts", {"prompt": ["a", "b"], "n": 2, "best_of": 2, "stop": "x", "user": "u"}
    yield "ids", {"prompt": [1, 2, 3], "stop_token_ids": [2], "ignore_eos": True, "skip_special_tokens": False}
    yield "lists", {"prompt": [[1], [2, 3]], "priority": -1, "return_token_ids": True, "suffix": ""}


def process_config_seeds():
    """Of cluster-configs, and the other formats and corners."""
    for name in ("laptop/coordinator", "laptop/worker", "laptop/gateway", "one-host/worker-1"):
        yield name.replace("/", "-"), (CONFIGS / f"{name}.yaml").read_bytes()
    head = {"apiVersion": "forge/v1", "kind": "Worker"}
    devices = [{"kind": "cuda", "cores": 132, "memory": "80GiB", "numaNode": 1}, {"cores": 2, "memory": 1 << 30}]
    yield "json", json.dumps(head | {"devices": devices, "reserve": "1GiB", "telemetry": {"isJson": True}}).encode()
    yield "toml", b"# a comment\napiVersion = \"forge/v1\"\nkind = \"Coordinator\"\nleaseMs = 3000\n\n[membership]\ntokenFile = \"t\"\n"


def context_file_seeds():
    yield "one", b'{\n  "servers": [\n    "127.0.0.1:7000"\n  ]\n}\n'
    yield "three", json.dumps({"servers": ["a.example:7000", "10.0.0.2:7000", "[fd00::3]:7000"]}).encode()
    yield "escaped", b'{"servers":["\\u0061:1"]}'
    yield "no_port", b'{"servers":["a.example"]}'


def service_file_seeds():
    head = "apiVersion: forge/v1\nkind: ModelService\n"
    yield "yaml", (head + "metadata:\n  name: demo\nspec:\n  model: smollm2:135m\n  replicas: 2\n  gateway:\n    port: 8001\n").encode()
    yield "anchors", (head + "spec:\n  model: &m a/b\n  replicas: 1\n").encode()
    yield "toml", b"apiVersion = \"forge/v1\"\nkind = \"ModelService\"\n[spec]\nmodel = \"a/b\"\nreplicas = 3\n"
    yield "json", json.dumps({"apiVersion": "forge/v1", "kind": "ModelService", "spec": {"model": "x.gguf", "maxModelLen": 512}}).encode()


def portable_text_seeds():
    def portable(fields):
        return b"FORGETXT" + struct.pack("<I", 1) + message(fields)

    texts, scores, kinds = zip(*vocabulary())
    packed = b"".join(varint(kind) for kind in kinds)

    def from_gguf(model, more):
        floats = message([(1, struct.pack(f"<{len(scores)}f", *scores))])
        fields = [(1, "tiny"), (2, model), *((4, text) for text in texts), (5, packed), (6, floats), (8, 1), (9, 2), (11, 0)]
        return message(fields + more)

    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    yield "llama", portable([(2, from_gguf("llama", [(13, 1), (18, template)]))])
    yield "t5", portable([(2, from_gguf("t5", [(16, 1), (17, charsmap())]))])
    yield "gpt2", portable([(2, from_gguf("gpt2", [(3, "bloom"), (7, "a b"), (7, "a a")])), (3, template)])
    pieces = [(1, message([(1, text), (2, score), (3, kind)])) for text, score, kind in vocabulary()]
    model = message(pieces + [(2, message([(3, 2)])), (3, message([(4, 0)]))])
    yield "sentencepiece", portable([(1, message([(2, model), (8, '{"eos_token_id": [2]}'), (10, template)]))])
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}, "added_tokens": []}
    yield "tokenizer_json", portable([(1, message([(1, json.dumps(tokenizer))]))])


def main():
    def encoded(seeds):
        return ((name, json.dumps(body).encode()) for name, body in seeds)

    targets = {
        "gguf": gguf_seeds(),
        "gguf_tokenizer": gguf_tokenizer_seeds(),
        "sentencepiece": sentencepiece_seeds(),
        "tokenizer_json": tokenizer_json_seeds(),
        "vocab_merges": vocab_merges_seeds(),
        "chat_template": chat_template_seeds(),
        "safetensors": safetensors_seeds(),
        "torch": torch_seeds(),
        "config": config_seeds(),
        "weight_index": encoded(weight_index_seeds()),
        "chat_request": encoded(chat_seeds()),
        "completion_request": encoded(completion_seeds()),
        "process_config": process_config_seeds(),
        "context_file": context_file_seeds(),
        "service_file": service_file_seeds(),
        "portable_text": portable_text_seeds(),
    }
    for target, seeds in targets.items():
        folder = SEEDS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, raw in seeds:
            (folder / name).write_bytes(raw)
            print(f"{target}/{name}: {len(raw)} bytes")


if __name__ == "__main__":
    main()
