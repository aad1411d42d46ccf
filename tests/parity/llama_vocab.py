"""llama.cpp's tokenizer alone: ids of a GGUF file's vocabulary, which needs no weights."""

import ctypes
import os

from llama import _LOG, _library

# Byte offset of `vocab_only` in the model parameters, for the version that llama.py pins: behind it stand three
# more flags that are off and, at 74, `use_extra_bufts`, which is on. A changed layout is noticed by that.
VOCAB_ONLY, EXTRA_BUFFERS = 72, 74


class LlamaVocabulary:
    """The vocabulary of a GGUF file."""

    def __init__(self, path):
        self._lib = lib = _library()
        self._silent = _LOG(lambda level, text, data: None)
        lib.llama_log_set(self._silent, None)
        lib.llama_model_free.argtypes = [ctypes.c_void_p]
        lib.llama_detokenize.argtypes = [
            ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_char_p, ctypes.c_int32,
            ctypes.c_bool, ctypes.c_bool,
        ]  # fmt: skip
        params = lib.llama_model_default_params()
        if list(params.raw[VOCAB_ONLY : EXTRA_BUFFERS + 1]) != [0, 0, 1]:
            raise SystemExit("llama.cpp's model parameters have another layout")
        params.raw[VOCAB_ONLY] = 1
        self._model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}")
        self._vocab = lib.llama_model_get_vocab(self._model)

    def __del__(self):
        if getattr(self, "_model", None):
            self._lib.llama_model_free(self._model)

    def encode(self, text, add_special=False, parse_special=True):
        """Token ids of a text."""
        raw = text.encode()
        out = (ctypes.c_int32 * (2 * len(raw) + 16))()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), out, len(out), add_special, parse_special)
        if count < 0:
            raise ValueError(f"llama.cpp needs {-count} tokens")
        return list(out[:count])

    def decode(self, ids):
        """Bytes of token ids, special tokens included."""
        array = (ctypes.c_int32 * max(len(ids), 1))(*ids)
        size = 64 * len(ids) + 64
        buffer = ctypes.create_string_buffer(size)
        count = self._lib.llama_detokenize(self._vocab, array, len(ids), buffer, size, False, True)
        if count < 0:
            raise ValueError(f"llama.cpp needs {-count} bytes")
        return buffer.raw[:count]
