#!/usr/bin/env bash
# compressed-tensors up to 0.14 saves sparse models as `sparse-bitmask` and `sparse-24-bitmask`. Later releases have
# neither format. transformers 5.24.0 refuses compressed-tensors below 0.15; with 0.20.1 `from_pretrained` accepts such a
# folder, leaves every sparse layer at its random initialisation, and only prints a table: nothing is raised.
#
# Seen: sparse-bitmask: 14 of 21 tensors differ from those saved, missing keys 14
#       sparse-24-bitmask: 14 of 21 tensors differ from those saved, missing keys 14
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 compressed-tensors==0.20.1
"$work/venv/bin/pip" install -q --no-deps --target "$work/old" compressed-tensors==0.12.2
cat >"$work/save.py" <<'PY'
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

for name in ("sparse-bitmask", "sparse-24-bitmask"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=128))
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            blocks = module.weight.data.view(-1, 4)
            blocks.scatter_(1, blocks.abs().topk(2, 1, largest=False).indices, 0.0)
    folder = Path(sys.argv[1]) / name
    model.save_pretrained(folder / "plain")
    kind, structure = (BitmaskConfig, "unstructured") if name == "sparse-bitmask" else (Sparse24BitMaskConfig, "2:4")
    config = kind(sparsity_structure=structure, global_sparsity=0.5, targets=["Linear"], ignore=["lm_head"])
    compressor = ModelCompressor(sparsity_config=config)
    tensors = {key: tensor.contiguous() for key, tensor in compressor.compress(model).items()}
    model.config.save_pretrained(folder / "small")
    save_file(tensors, folder / "small" / "model.safetensors", metadata={"format": "pt"})
    compressor.update_config(str(folder / "small"))
PY
PYTHONPATH="$work/old" "$work/venv/bin/python" "$work/save.py" "$work" >/dev/null 2>&1
"$work/venv/bin/python" - "$work" 2>/dev/null <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM

for name in ("sparse-bitmask", "sparse-24-bitmask"):
    plain = dict(AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}/plain").named_parameters())
    model, info = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}/small", output_loading_info=True)
    wrong = sum(not torch.equal(param, plain[key]) for key, param in model.named_parameters())
    missing = len(info["missing_keys"])
    print(f"{name}: {wrong} of {len(plain)} tensors differ from those saved, missing keys {missing}")
    assert wrong == missing == 14
PY
