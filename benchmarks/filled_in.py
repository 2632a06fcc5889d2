"""What `hf-pdecay check` says of a model whose zeros a quantiser has filled in: a small Llama by llm-compressor's GPTQ.

    pip install compressed-tensors==0.20.1      # by which transformers reads the quantised model
    python benchmarks/filled_in.py OUT

makes a Llama with 50% zeros in OUT/before, whose embeddings have a few strong directions, as trained models have; has
llm-compressor quantise it to OUT/after, in an environment that this script makes; and runs `hf-pdecay check` on the
two, whose exit code, 1, it returns.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from environments import python_with
from quantize import PACKAGES


_MADE = """
import sys
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
before, after = sys.argv[1:]
torch.manual_seed(0)
words = Tokenizer(models.WordLevel({str(place): place for place in range(256)}, unk_token="0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")
sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256, max_position_embeddings=64))
for module in model.model.modules():
    if isinstance(module, torch.nn.Linear):
        module.weight.data[torch.rand(module.weight.shape) < 0.5] = 0
model.model.embed_tokens.weight.data = torch.randn(256, 8) @ torch.randn(8, 128) + 0.1 * torch.randn(256, 128)
model.save_pretrained(before)
tokenizer.save_pretrained(before)
rows = torch.randint(0, 256, (32, 64)).tolist()
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 64] * 32})
model = LlamaForCausalLM.from_pretrained(before)
recipe = [GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])]
settings = {"max_seq_length": 64, "num_calibration_samples": 32, "pipeline": "basic"}
oneshot(model=model, dataset=data, recipe=recipe, processor=tokenizer, **settings)
model.save_pretrained(after, save_compressed=True)
"""


def main() -> int:
    """Make, quantise and compare; return the exit code of the comparison."""
    before, after = (str(Path(sys.argv[1]) / name) for name in ("before", "after"))
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    words = [str(python_with(PACKAGES)), "-c", _MADE, before, after]
    subprocess.run(words, check=True, capture_output=True, env=environment)
    return subprocess.run([sys.executable, "-m", "hf_pdecay", "check", before, after]).returncode


if __name__ == "__main__":
    sys.exit(main())
