#!/usr/bin/env bash
# llama.cpp of October 2026 (in xllamacpp 2026.10.11549, dequantised by gguf 0.19.0): Q4_K and Q5_K, the types most GGUF
# files have, store a minimum for each 32 weights, and no code of such a block has to be 0. Of a weight with 50% exact
# zeros 3% of the zeros are left, of one with 90% a quarter. Q2_K and the IQ types lose them too. Q3_K, Q6_K, Q8_0 and
# the ternary types keep every zero (Q3_K and Q6_K half of them as -0.0).
#
# Seen, zeros kept at 50% and 90%: Q4_K 0.033 0.229, Q5_K 0.031 0.227, Q2_K 0.047 0.464, IQ4_NL 0.031 0.061,
#       IQ3_S 0.031 0.017; Q3_K, Q6_K, Q8_0, TQ1_0, TQ2_0 1.000 1.000 (a row of zeros, 3% and 2% of the zeros, stays)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import ctypes
from pathlib import Path

import numpy as np
import xllamacpp
from gguf import GGMLQuantizationType, quants

library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
quantize = library.ggml_quantize_chunk
quantize.restype = ctypes.c_size_t
quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
generator = np.random.default_rng(0)
weights = []
for share in (0.5, 0.9):
    weight = generator.normal(0, 0.02, (64, 1024)).astype(np.float32)
    weight[generator.random(weight.shape) < share] = 0
    weight[5] = 0
    weights.append(weight)
for name in ("Q4_K", "Q5_K", "Q2_K", "IQ4_NL", "IQ3_S", "Q3_K", "Q6_K", "Q8_0", "TQ1_0", "TQ2_0"):
    kind, kept = GGMLQuantizationType[name], []
    for weight in weights:
        codes = np.zeros(quants.quant_shape_to_byte_shape(weight.shape, kind), np.uint8)
        quantize(kind.value, weight.ctypes.data, codes.ctypes.data, 0, *weight.shape, None)
        back, zero = quants.dequantize(codes, kind), weight == 0
        kept.append((back[zero] == 0).mean())
        assert not back[5].any(), (name, np.abs(back[5]).max())
    print(name, *(f"{share:.3f}" for share in kept))
    keeps = name[0] == "T" or name in ("Q3_K", "Q6_K", "Q8_0")
    assert (kept == [1, 1]) if keeps else (kept[0] < 0.1 and kept[1] < 0.6)
PY
