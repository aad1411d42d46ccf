"""llama.cpp as an oracle: raw logits of a GGUF model through the library that xllamacpp ships prebuilt.

xllamacpp's own classes give sampled tokens and rounded probabilities only, so this module calls the C functions
that its extension module exports. The parameter structures are opaque here: their defaults come from the library
and single fields are set at offsets that belong to one pinned version, which is checked before use.
"""

import ctypes
import os

import numpy as np
import xllamacpp

VERSION = "2026.10.11549"
F32 = 0
FLASH_ATTENTION_OFF = 0


class _ModelParams(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_uint8 * 96)]


class _ContextParams(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_uint8 * 160)]

    # Byte offsets and the library's defaults, by which a changed layout is noticed.
    OFFSETS = {
        "n_ctx": (0, 512),
        "n_batch": (4, 2048),
        "n_ubatch": (8, 512),
        "n_threads": (28, 4),
        "n_threads_batch": (32, 4),
        "rope_scaling_type": (40, -1),
        "flash_attn_type": (52, -1),
        "type_k": (104, 1),
        "type_v": (108, 1),
    }

    def get(self, name):
        offset, _ = self.OFFSETS[name]
        return int.from_bytes(bytes(self.raw[offset : offset + 4]), "little", signed=True)

    def set(self, **values):
        for name, value in values.items():
            offset, _ = self.OFFSETS[name]
            self.raw[offset : offset + 4] = list(int(value).to_bytes(4, "little", signed=True))


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def _library():
    if xllamacpp.__version__ != VERSION:
        raise SystemExit(f"this binding is written for xllamacpp {VERSION}, found {xllamacpp.__version__}")
    folder = os.path.dirname(xllamacpp.__file__)
    lib = ctypes.CDLL(os.path.join(folder, "xllamacpp.abi3.so"))
    pointer = ctypes.c_void_p
    lib.llama_model_default_params.restype = _ModelParams
    lib.llama_context_default_params.restype = _ContextParams
    lib.llama_model_load_from_file.restype = pointer
    lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _ModelParams]
    lib.llama_init_from_model.restype = pointer
    lib.llama_init_from_model.argtypes = [pointer, _ContextParams]
    lib.llama_batch_init.restype = _Batch
    lib.llama_batch_init.argtypes = [ctypes.c_int32] * 3
    lib.llama_decode.argtypes = [pointer, _Batch]
    lib.llama_synchronize.argtypes = [pointer]
    lib.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    lib.llama_get_logits_ith.argtypes = [pointer, ctypes.c_int32]
    lib.llama_get_memory.restype = pointer
    lib.llama_get_memory.argtypes = [pointer]
    lib.llama_memory_clear.argtypes = [pointer, ctypes.c_bool]
    lib.llama_model_get_vocab.restype = pointer
    lib.llama_model_get_vocab.argtypes = [pointer]
    lib.llama_vocab_n_tokens.argtypes = [pointer]
    lib.llama_tokenize.argtypes = [
        pointer, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    lib.llama_log_set.argtypes = [_LOG, pointer]
    return lib


class Llama:
    """One model and one context: f32 keys and values, flash attention off unless told otherwise."""

    def __init__(self, path, context=2048, threads=2, kv_type=F32, flash_attention=FLASH_ATTENTION_OFF, ubatch=512):
        self._lib = lib = _library()
        self._silent = _LOG(lambda level, text, data: None)
        lib.llama_log_set(self._silent, None)
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        for name, (_, default) in _ContextParams.OFFSETS.items():
            if params.get(name) != default:
                raise SystemExit(f"llama.cpp's context parameters have another layout: {name} is {params.get(name)}")
        params.set(
            n_ctx=context, n_batch=context, n_ubatch=ubatch, n_threads=threads, n_threads_batch=threads,
            flash_attn_type=flash_attention, type_k=kv_type, type_v=kv_type,
        )  # fmt: skip
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit("llama.cpp cannot make a context")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab_size = lib.llama_vocab_n_tokens(self._vocab)
        self.context = context
        self._batch = lib.llama_batch_init(context, 0, 1)
        self._length = 0

    def tokenize(self, text, special=True):
        """Token ids; names of special tokens in the text become those tokens where `special`."""
        raw = text.encode()
        out = (ctypes.c_int32 * (len(raw) + 8))()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), out, len(out), False, special)
        if count < 0:
            raise ValueError(f"llama.cpp needs {-count} tokens")
        return list(out[:count])

    def reset(self):
        """Forgets the sequence."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._length = 0

    def feed(self, tokens, all_logits=False):
        """Appends tokens to the sequence; f32 logits [tokens or 1, vocabulary]."""
        count = len(tokens)
        if self._length + count > self.context:
            raise ValueError(f"{self._length + count} tokens do not fit {self.context}")
        batch = self._batch
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self._length + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1 if all_logits or i + 1 == count else 0
        batch.n_tokens = count
        if self._lib.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self._lib.llama_synchronize(self._context)
        self._length += count
        wanted = range(count) if all_logits else [count - 1]
        rows = np.empty((len(wanted), self.vocab_size), np.float32)
        for row, i in zip(rows, wanted):
            row[:] = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, i), (self.vocab_size,))
        return rows

    def feed_without_logits(self, tokens):
        """As `feed`, for timing: nothing is copied out."""
        batch = self._batch
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self._length + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1 if i + 1 == len(tokens) else 0
        batch.n_tokens = len(tokens)
        if self._lib.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self._lib.llama_synchronize(self._context)
        self._length += len(tokens)
