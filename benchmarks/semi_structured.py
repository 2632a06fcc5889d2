"""Time a Llama-like model of 2:4 weights on a GPU, by its sparse matrix units and dense.

    python benchmarks/semi_structured.py
    python benchmarks/semi_structured.py --layers 2 --rounds 5

Random layers of Llama 7B's size in bfloat16, with the smaller two of each four weights set to 0: the speed of a pattern
does not depend on what a model has learned. Both models do each workload in turn, in every round.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn

from clocks import clock, spread
from hf_pdecay import Choice, to_sparse_inference
from tables import command, conditions, describe, table, write


ROOT = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers")
# Name, sequences, tokens of each: prompts, and steps of decoding.
WORKLOADS = (("prompts", 8, 1024), ("prompts", 1, 512), ("decoding without a cache's past", 64, 1))


def build(layers: int) -> nn.Module:
    """Return a random model whose linear layers are 2:4."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    shape |= {"num_hidden_layers": layers, "vocab_size": 32000}
    with torch.device("cuda"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**shape)).bfloat16().eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            blocks = module.weight.data.unflatten(-1, (-1, 4))
            blocks.scatter_(-1, blocks.abs().topk(2, -1, largest=False).indices, 0.0)
    return model


@torch.no_grad()
def measure(
    name: str, batch: int, tokens: int, dense: nn.Module, sparse: nn.Module, single: nn.Module, rounds: int
) -> dict[str, Any]:
    """Time one workload and return the figures.

    Args:
        name: What it is called.
        batch: Sequences.
        tokens: Tokens of each.
        dense: The model.
        sparse: The same with all layers that can be by the sparse units.
        single: A model of one layer, with which to_sparse_inference shows its choice.
        rounds: How often both do it.
    """
    choices = to_sparse_inference(copy.deepcopy(single), rows=batch * tokens)
    ids = torch.randint(0, 32000, (batch, tokens), device="cuda")
    expected, result = (model(ids, use_cache=False, logits_to_keep=1).logits.float() for model in (dense, sparse))
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(rounds):
        for kind, model in (("dense", dense), ("sparse", sparse)):
            seconds[kind].append(clock(partial(model, ids, use_cache=False, logits_to_keep=1), 5, "cuda"))
    pairs = zip(seconds["dense"], seconds["sparse"], strict=True)
    return {
        "workload": f"{name}, {batch} × {tokens} tokens",
        "milliseconds": {kind: 1e3 * spread(times)["median"] for kind, times in seconds.items()},
        "speedup": spread([one / other for one, other in pairs]),
        "layers": layer_speedups(choices),
        "relative_difference": float((result - expected).norm() / expected.norm()),
    }


def layer_speedups(choices: Sequence[Choice]) -> dict[str, float]:
    """Return the measured speedup of each shape of a layer."""
    return {
        f"{choice.shape[0]} × {choice.shape[1]}": choice.speedup for choice in choices if choice.speedup is not None
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (4)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each workload (10)")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the tables (results here)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU, and no other device has sparse matrix units")
    begin = time.perf_counter()
    record: dict[str, Any] = {"benchmark": "semi_structured", "command": command("semi_structured.py", argv)}
    record |= conditions("cuda", PACKAGES)
    dense, single = build(options.layers), build(1)
    sparse = copy.deepcopy(dense)
    to_sparse_inference(sparse, min_sparsity=0.0)
    record["workloads"] = [measure(*workload, dense, sparse, single, options.rounds) for workload in WORKLOADS]
    record["seconds"] = time.perf_counter() - begin
    rows = [
        [
            row["workload"],
            f"{row['milliseconds']['dense']:.2f}",
            f"{row['milliseconds']['sparse']:.2f}",
            f"{row['speedup']['median']:.2f} ({row['speedup']['q10']:.2f}-{row['speedup']['q90']:.2f})",
            ", ".join(f"{shape}: {speedup:.2f}" for shape, speedup in row["layers"].items()),
            f"{row['relative_difference']:.1e}",
        ]
        for row in record["workloads"]
    ]
    headings = ["workload", "dense, ms", "2:4, ms", "times dense", "layer by layer", "difference of the logits"]
    text = "\n\n".join(["# 2:4 on a GPU", describe(record), table(headings, rows)]) + "\n"
    write(record, text, options.output, "semi_structured")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
