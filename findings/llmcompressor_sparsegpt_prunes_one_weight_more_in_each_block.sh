#!/usr/bin/env bash
# llmcompressor 0.14.0: SparseGPTModifier prunes, in each block of 128 columns, all weights up to and including the one at
# the index of the share that was asked for: one weight more. In a layer of 32 x 512 that is 4 more of 8192; asked for
# sparsities are exceeded a little everywhere, and counts by other tools differ.
#
# Seen: asked for 8192 zeros in each q_proj, found 8196, 8196
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 llmcompressor==0.14.0 transformers==5.17.0 compressed-tensors==0.19.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/log" <<'PY' | grep found || { cat "$work/log" >&2; exit 1; }
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
words = Tokenizer(models.WordLevel({str(place): place for place in range(256)}, unk_token="0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")
sizes = {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256, max_position_embeddings=64)).save_pretrained("model")
tokenizer.save_pretrained("model")
model = LlamaForCausalLM.from_pretrained("model")
rows = torch.randint(0, 256, (16, 64)).tolist()
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 64] * 16})
recipe = [SparseGPTModifier(sparsity=0.5, targets=["re:.*q_proj"], mask_structure="0:0", block_size=128)]
oneshot(model=model, dataset=data, recipe=recipe, processor=tokenizer, max_seq_length=64, num_calibration_samples=16)
weights = [layer.self_attn.q_proj.weight for layer in model.model.layers]
asked = weights[0].numel() // 2
found = [int((weight == 0).sum()) for weight in weights]
print(f"asked for {asked} zeros in each q_proj, found {', '.join(map(str, found))}")
assert found == [asked + weights[0].shape[1] // 128] * 2
PY
