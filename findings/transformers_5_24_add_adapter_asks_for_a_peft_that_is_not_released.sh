#!/usr/bin/env bash
# transformers 5.24.0: `model.add_adapter`, `load_adapter` and the other methods of its PEFT integration want peft 0.22.0 or
# later, and the newest on PyPI was 0.21.2 on 2026-11-30, so they raise with every PEFT that pip installs. The message asks
# for a release that does not exist. `peft.inject_adapter_in_model` and `get_peft_model` work with the same two packages.
#
# Seen: add_adapter: The version of PEFT you are using is not compatible, please use a version >= 0.22.0
#       inject_adapter_in_model: 4 layers
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
"$work/venv/bin/python" - 2>"$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
try:
    LlamaForCausalLM(LlamaConfig(**sizes)).add_adapter(config)
    message = "no error"
except ValueError as error:
    message = str(error)
print(f"add_adapter: {message}")
model = inject_adapter_in_model(config, LlamaForCausalLM(LlamaConfig(**sizes)))
layers = sum("lora_A" in name for name, _ in model.named_parameters())
print(f"inject_adapter_in_model: {layers} layers")
assert "0.22.0" in message and layers == 4
PY
