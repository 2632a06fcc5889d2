#!/usr/bin/env bash
# torchao 0.18.0 (Float8WeightOnlyConfig, one scale a row by default) and optimum-quanto 0.2.7 (qfloat8): a row of a
# weight that is wholly zero, such as a dead neuron, has the scale 0. The row becomes 0 / 0, so the layer's output is NaN
# there, and in a model every logit is.
#
# Seen: torchao NaN outputs [3]; quanto NaN outputs [3]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 torchao==0.18.0 optimum-quanto==0.2.7 numpy==2.4.6
"$work/venv/bin/python" - 2>"$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import torch
from optimum.quanto import freeze, qfloat8, quantize
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, quantize_

torch.manual_seed(0)
for name in ("torchao", "quanto"):
    model = nn.Sequential(nn.Linear(256, 64, bias=False))
    with torch.no_grad():
        model[0].weight[3] = 0
    if name == "torchao":
        quantize_(model, Float8WeightOnlyConfig())
    else:
        quantize(model, weights=qfloat8)
        freeze(model)
    outputs = model(torch.randn(2, 256)).isnan().any(0).nonzero().view(-1).tolist()
    print(f"{name} NaN outputs {outputs}")
    assert outputs == [3]
PY
