"""The logits that llama.cpp computes for some token ids, by its C interface in the package xllamacpp (x86-64, Linux).

python benchmarks/llama_cpp.py MODEL.gguf IDS.json LOGITS.npy
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp


class Settings(ctypes.Structure):
    """Settings that llama.cpp fills and takes back; larger than any of its own, as nothing here reads them."""

    _fields_ = (("data", ctypes.c_uint8 * 1024),)


class Batch(ctypes.Structure):
    """Tokens, as `llama_batch` has them."""

    _fields_ = (
        ("count", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    )


def library() -> Any:
    """llama.cpp, with the types of what is called."""
    found = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    found.llama_model_default_params.restype = found.llama_context_default_params.restype = Settings
    found.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Settings]
    found.llama_init_from_model.argtypes = [ctypes.c_void_p, Settings]
    found.llama_decode.argtypes = [ctypes.c_void_p, Batch]
    found.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    found.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    found.llama_model_get_vocab.argtypes = found.llama_vocab_n_tokens.argtypes = [ctypes.c_void_p]
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab"):
        getattr(found, name).restype = ctypes.c_void_p
    return found


def main() -> int:
    """Write the logits, of shape (tokens, vocabulary); return the exit code."""
    file, rows, out = sys.argv[1:]
    ids = json.loads(Path(rows).read_text())
    llama = library()
    log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama.llama_log_set(log, None)
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {file}")
    context = llama.llama_init_from_model(model, llama.llama_context_default_params())
    count = len(ids)
    first = (ctypes.c_int32 * 1)(0)
    numbers = [(ctypes.c_int32 * count)(*values) for values in (ids, range(count), [1] * count)]
    places = (ctypes.c_void_p * count)(*[ctypes.addressof(first)] * count)
    wanted = (ctypes.c_int8 * count)(*[1] * count)
    token, pos, sequences = map(ctypes.addressof, numbers)
    batch = Batch(count, token, None, pos, sequences, ctypes.addressof(places), ctypes.addressof(wanted))
    if llama.llama_decode(context, batch):
        sys.exit("llama.cpp cannot compute the tokens")
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    rows_of = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, place), (size,)) for place in range(count)]
    np.save(out, np.stack(rows_of))
    return 0


if __name__ == "__main__":
    sys.exit(main())
