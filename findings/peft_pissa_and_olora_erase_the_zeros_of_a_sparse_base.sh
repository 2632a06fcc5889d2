#!/usr/bin/env bash
# PEFT 0.21.2: an adapter that begins with a part of the base's weights (init_lora_weights="pissa" or "olora") subtracts
# that dense part from the base when it is made. A base with 90% exact zeros has none (PiSSA) or about a third (OLoRA)
# afterwards, before any training. A plain LoRA leaves the base as it is.
#
# Seen: pissa 0.900 -> 0.000; olora 0.900 -> 0.369; plain 0.900 -> 0.900
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy==2.4.6
"$work/venv/bin/python" - 2>"$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

after = {}
for name, start in (("pissa", "pissa"), ("olora", "olora"), ("plain", True)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    with torch.no_grad():
        model[0].weight.masked_fill_(torch.rand(256, 256) < 0.9, 0)
    before = float((model[0].weight == 0).double().mean())
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["0"], init_lora_weights=start))
    after[name] = float((adapted.base_model.model[0].base_layer.weight == 0).double().mean())
    print(f"{name} {before:.3f} -> {after[name]:.3f}")
assert after["pissa"] < 0.01 and 0.2 < after["olora"] < 0.5 and after["plain"] > 0.89
PY
