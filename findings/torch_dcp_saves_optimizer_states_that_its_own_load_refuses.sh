#!/usr/bin/env bash
# torch 2.13.0: `get_state_dict` and `dcp.save`, the documented way to write a checkpoint, save no optimizer state for a
# trainable parameter that has had no gradient, such as an unused pooler or an expert to which no token was routed. In a
# fresh process the same calls make a state for all trainable parameters, and `dcp.load` refuses the checkpoint because
# the file has no such key. The run saved without a word, and is found not to resume when it must.
# `DefaultLoadPlanner(allow_partial_load=True)` loads it. What is raised is a BaseException, which `except Exception`, as
# around a try to resume, lets pass.
#
# Seen: saved states: used.bias, used.weight; asked for: unused.bias, unused.weight, used.bias, used.weight
#       RuntimeError: Missing key in checkpoint state_dict: optim.state.unused.weight.step.; an Exception: False; with
#       allow_partial_load: loaded
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - "$work" 2>"$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, rows):
        return self.used(rows)


def fresh():
    model = Model()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


folder = Path(sys.argv[1]) / "checkpoint"
model, optimizer = fresh()
model(torch.ones(2, 4)).sum().backward()
optimizer.step()
weights, states = get_state_dict(model, optimizer)
saved = sorted(states["state"])
dcp.save({"model": weights, "optim": states}, checkpoint_id=folder)

weights, states = get_state_dict(*fresh())
asked = sorted(states["state"])
try:
    dcp.load({"model": weights, "optim": states}, checkpoint_id=folder)
    refused = "loaded"
except CheckpointException as error:
    refused = next(line for line in str(error).splitlines() if line.startswith("RuntimeError"))
    caught = isinstance(error, Exception)
dcp.load(
    {"model": weights, "optim": states}, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True)
)
print(f"saved states: {', '.join(saved)}; asked for: {', '.join(asked)}")
print(f"{refused}; an Exception: {caught}; with allow_partial_load: loaded")
assert saved == ["used.bias", "used.weight"] and len(asked) == 4 and "Missing key" in refused and not caught
PY
