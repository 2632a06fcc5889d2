#!/usr/bin/env bash
# torchao 0.18.0 (torchao.prototype.pat): its lasso multiplies a weight by 1 - threshold / |w|. In the first step of a
# warm-up the learning rate and so the threshold are 0, and for a weight that is 0, as in a model that is sparse already,
# that is 0 / 0: the weight is NaN in the next forward pass.
#
# Seen: NaN after the first step of a warm-up 32 of 32 zeros; without warm-up 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 torchao==0.18.0 numpy==2.4.6
"$work/venv/bin/python" - 2>"$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import torch
from torchao.prototype.pat.optim import PruneOptimizer


def nans(first_rate: float) -> int:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(32, 32))
    with torch.no_grad():
        param[0] = 0
    settings = {"group_type": "ElemGrouper", "prox_type": "ProxLasso", "reg_lambda": 1e-3}
    optimizer = PruneOptimizer(torch.optim.AdamW([{"params": [param], **settings}], lr=first_rate, weight_decay=0.0))
    param.grad = torch.randn_like(param)
    optimizer.step()
    return int(param.isnan().sum())


found = nans(0.0), nans(1e-3)
print(f"NaN after the first step of a warm-up {found[0]} of 32 zeros; without warm-up {found[1]}")
assert found == (32, 0)
PY
