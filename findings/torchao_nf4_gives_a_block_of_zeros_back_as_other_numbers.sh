#!/usr/bin/env bash
# torchao 0.18.0: NF4 has a code that is exactly 0, and zeros among other weights stay zeros. A block of 64 that is
# wholly zero comes back without a single zero: its scale, which is quantised itself, is not 0, and its codes are not
# the code of 0.
#
# Seen: zeros kept in wholly zero blocks 0.000 (largest 8.9e-05), elsewhere 1.000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 torchao==0.18.0 numpy==2.4.6
"$work/venv/bin/python" - 2>"$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import torch
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

torch.manual_seed(0)
weight = torch.randn(64, 256) * 0.02
weight[torch.rand_like(weight) < 0.5] = 0
weight[:, :64] = 0
back = to_nf4(weight, 64, 256).get_original_weight()
dead, others = back[:, :64], back[:, 64:][weight[:, 64:] == 0]
kept = [float((part == 0).double().mean()) for part in (dead, others)]
print(f"zeros kept in wholly zero blocks {kept[0]:.3f} (largest {float(dead.abs().max()):.1e}), elsewhere {kept[1]:.3f}")
assert kept == [0.0, 1.0]
PY
