#!/usr/bin/env bash
# torchao 0.18: `IntxFakeQuantizeConfig(torch.int1, group_size=128)` has the codes -1 and 0, and as a scale twice the
# largest magnitude of a group. So no weight is further from 0 than half a scale, and all are rounded to 0: in every
# forward pass the layer multiplies by a matrix of zeros, and training goes on without a warning, by the biases and what
# is not quantised. With is_symmetric=False over 99% are 0.
#
# Seen: zeros of a new nn.Linear: int4 0.067, int2 0.332, int1 1.000, int1 asymmetric 0.994
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 torchao==0.18.0 numpy==2.4.6
"$work/venv/bin/python" - 2>"$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

zeros = {}
for name, dtype, symmetric in (
    ("int4", torch.int4, True),
    ("int2", torch.int2, True),
    ("int1", torch.int1, True),
    ("int1 asymmetric", torch.int1, False),
):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 256, bias=False))
    config = IntxFakeQuantizeConfig(dtype, group_size=128, is_symmetric=symmetric)
    quantize_(model, QATConfig(weight_config=config, step="prepare"))
    used = model[0].weight_fake_quantizer(model[0].weight)
    zeros[name] = float((used == 0).double().mean())
    values = max(len(group.unique()) for group in used.view(-1, 128))
    print(f"{name}: {values} values in a group, {zeros[name]:.3f} zeros")
assert zeros["int4"] < 0.1 and zeros["int1"] == 1 and zeros["int1 asymmetric"] > 0.98
PY
