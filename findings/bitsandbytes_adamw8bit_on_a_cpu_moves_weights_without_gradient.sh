#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU: AdamW8bit without weight decay moves weights whose gradient has always been 0. Its table
# of 256 codes has a 0, but quantize_blockwise on a CPU rounds exact zeros to the code beside it, so moments of 0 do not
# stay 0. Zeros that training should keep are lost the same way.
#
# Seen: weights without gradient that moved 1.000; zeros kept by quantize_blockwise 0.000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
"$work/venv/bin/python" - 2>"$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import bitsandbytes
import torch
from bitsandbytes import functional

torch.manual_seed(0)
param = torch.nn.Parameter(torch.randn(16384))
before = param.detach().clone()
still = torch.arange(param.numel()) % 10 != 0
optimizer = bitsandbytes.optim.AdamW8bit([param], lr=1e-2, weight_decay=0.0)
for _ in range(20):
    param.grad = torch.randn_like(param).masked_fill_(still, 0)
    optimizer.step()
moved = float((param.detach() != before)[still].double().mean())
values = torch.randn(4096).masked_fill_(torch.rand(4096) < 0.9, 0)
back = functional.dequantize_blockwise(*functional.quantize_blockwise(values))
kept = float((back[values == 0] == 0).double().mean())
print(f"weights without gradient that moved {moved:.3f}; zeros kept by quantize_blockwise {kept:.3f}")
assert moved > 0.9 and kept < 0.1
PY
