"""A model of a million random weights, written at once: slow enough to be in the middle of an answer, small enough for CI.

Its tokenizer is that of a fixture (one token per printable character), so any prompt is fine. Same folder, same bytes: the
weights come from a fixed seed. Its answers mean nothing; that they are the same is what a test looks at.
"""

import json
import pathlib
import random
import shutil
import struct

FIXTURE = pathlib.Path(__file__).resolve().parents[1] / "fixtures/eval/model"
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_WIDTH, VOCABULARY, CONTEXT = 128, 384, 4, 8, 4, 16, 96, 1024
# The bytes of a bfloat16 of 2^-5 to 2^-4: its mantissa, and its sign with a fixed exponent.
MANTISSA = bytes(byte & 0x7F for byte in range(256))
SIGN = bytes(byte & 0x80 | 0x3D for byte in range(256))
ONE = struct.pack("<H", 0x3F80)


def write(folder):
    """Writes the model's folder; its path."""
    folder.mkdir()
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(FIXTURE / name, folder / name)
    config = json.loads((FIXTURE / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_WIDTH,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder / "model.safetensors", shapes())
    return folder


def shapes():
    yield "model.embed_tokens.weight", [VOCABULARY, HIDDEN]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, rows, columns in [
            ("self_attn.q_proj", HEADS * HEAD_WIDTH, HIDDEN),
            ("self_attn.k_proj", KV_HEADS * HEAD_WIDTH, HIDDEN),
            ("self_attn.v_proj", KV_HEADS * HEAD_WIDTH, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HEADS * HEAD_WIDTH),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ]:
            yield f"{at}.{name}.weight", [rows, columns]
        for norm in ["input_layernorm", "post_attention_layernorm"]:
            yield f"{at}.{norm}.weight", [HIDDEN]
    yield "model.norm.weight", [HIDDEN]
    yield "lm_head.weight", [VOCABULARY, HIDDEN]


def write_tensors(file, named):
    chance, header, data = random.Random(1), {}, bytearray()
    for name, shape in named:
        begin = len(data)
        if len(shape) == 1:
            data += ONE * shape[0]
        else:
            count = shape[0] * shape[1]
            weights = bytearray(2 * count)
            weights[0::2] = chance.randbytes(count).translate(MANTISSA)
            weights[1::2] = chance.randbytes(count).translate(SIGN)
            data += weights
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, len(data)]}
    head = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + data)
