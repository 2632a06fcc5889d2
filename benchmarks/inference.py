"""Time whole models with sparse layers against the same models dense, and against other engines that are installed.

    python benchmarks/inference.py --quick                               # one row, 50, 80 and 95%: under 5 minutes
    python benchmarks/inference.py                                       # all workloads
    python benchmarks/inference.py --only "one token" --sparsity 0.5     # one of them

Two layers of the size of Llama 7B's (405 M weights), and models of the sizes of GPT-2 small and BERT base, with random
weights; some of each linear layer in the blocks, drawn at random, are zero. (The speed does not depend on what a model
has learned.) All engines do each workload in turn, in every round, twice, and the second call counts; ratios are to the
dense float32 model in the same round. Engines whose time does not depend on zeros run at the first sparsity alone.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import transformers as tf
from torch import Tensor, nn

from clocks import spread
from engines import others
from hf_pdecay import build_param_groups, to_sparse_inference
from hf_pdecay.inference import sparse_linear
from hf_pdecay.inference.base import InferenceLinear
from hf_pdecay.inference.memory import in_large_pages
from tables import command, conditions, describe, table, write


ROOT = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "torchao", "openvino", "nncf", "onnxruntime")
DENSE, DENSE16, CSR = "torch, float32", "torch, bfloat16", "torch's CSR"
LARGE = "torch, float32, large pages"
OURS, OURS16, IN16, OURS8 = "ours", "ours, bfloat16 values", "ours in a bfloat16 model", "ours, int8 values"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Workload:
    """The input of a model.

    Attributes:
        name: What it is called in the table.
        model: Which model does it.
        batch: Sequences.
        tokens: Tokens of each sequence that a call computes.
        past: Tokens of each sequence that a cache holds before the call.
    """

    name: str
    model: str
    batch: int
    tokens: int
    past: int = 0


WORKLOADS = (
    Workload("one token", "2 layers of Llama 7B", 1, 1),
    Workload("4 tokens", "2 layers of Llama 7B", 1, 4),
    Workload("prompt of 128 tokens", "2 layers of Llama 7B", 1, 128),
    Workload("decode, batch 1", "GPT-2 small", 1, 1, 64),
    Workload("decode, batch 16", "GPT-2 small", 16, 1, 64),
    Workload("prompt of 64 tokens, batch 16", "GPT-2 small", 16, 64),
    Workload("128 tokens, batch 1", "BERT base", 1, 128),
    Workload("128 tokens, batch 8", "BERT base", 8, 128),
)


@torch.no_grad()
def build(name: str, sparsity: float) -> nn.Module:
    """Return a model whose decayed weights have this fraction of zeros."""
    torch.manual_seed(0)
    model: nn.Module
    if name == "GPT-2 small":
        model = tf.GPT2LMHeadModel(tf.GPT2Config())
    elif name == "BERT base":
        model = tf.BertForSequenceClassification(tf.BertConfig())
    else:
        sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2}
        model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=2000, **sizes))
    for group in build_param_groups(model, p_norm=0.8, lambda_p=0.01):
        for param in group["params"] if group["lambda_p"] else ():
            param.mul_(torch.rand_like(param) >= sparsity)
    return model.eval()


class WithPast(nn.Module):
    """A causal LM that decodes a token on top of a cache, whose contents do not change the time."""

    def __init__(self, model: nn.Module, work: Workload) -> None:
        super().__init__()
        self.model, self.work = model, work
        self.cache: Any = None

    def forward(self, ids: Tensor) -> Any:
        """Return the logits."""
        if self.work.past:
            if self.cache is None:
                past = torch.zeros(self.work.batch, self.work.past, dtype=torch.long)
                output = self.model(past, use_cache=True)
                self.cache_name = "cache" if "cache" in output else "past_key_values"  # before transformers 5.24
                self.cache = output[self.cache_name]
            logits = self.model(ids, **{self.cache_name: self.cache}, use_cache=True).logits
            self.cache.crop(-self.work.tokens)
            return logits
        if isinstance(self.model, tf.GPT2LMHeadModel):
            return self.model(ids, use_cache=False, logits_to_keep=1).logits
        return self.model(ids).logits


def engines(dense: nn.Module, work: Workload, left_out: dict[str, str], every: bool) -> dict[str, tuple[Call, int]]:
    """Return a call of the workload for each engine, and the bytes of its weights, and check its result.

    ``every``: also the engines whose time does not depend on zeros.
    """
    ids = torch.randint(0, 1000, (work.batch, work.tokens), generator=torch.Generator().manual_seed(0))
    rows = work.batch * work.tokens
    head = "int8" if hasattr(dense, "lm_head") else None
    models: dict[str, nn.Module] = {DENSE: dense}
    for name, dtype, options in (
        (OURS, None, {}),
        (OURS16, None, {"values": "bfloat16"}),
        (IN16, torch.bfloat16, {}),
        (OURS8, None, {"values": "int8", "head": head}),
    ):
        models[name] = copy.deepcopy(dense).to(dtype)
        to_sparse_inference(models[name], rows=rows, **options)
    calls: dict[str, tuple[Call, int]] = {
        name: (partial(WithPast(model, work), ids), weight_bytes(model)) for name, model in models.items()
    }
    large = copy.deepcopy(dense)
    for param in large.parameters():
        param.data = in_large_pages(param.data)
    calls[LARGE] = partial(WithPast(large, work), ids), weight_bytes(large)
    half = copy.deepcopy(dense).to(torch.bfloat16)
    calls[DENSE16] = partial(WithPast(half, work), ids), weight_bytes(half)
    if "Llama" not in work.model:
        columns = copy.deepcopy(dense)
        to_sparse_inference(columns, min_sparsity=0.5, rows=1 << 20)  # so many rows that all are CSR
        calls[CSR] = partial(_with_torchs_product, WithPast(columns, work), ids), weight_bytes(columns)
    if every and not work.past:  # other engines have other caches
        calls |= others(WithPast(dense, work), ids, left_out)
    expected = calls[DENSE][0]()
    for name, (call, _) in calls.items():
        off = float((torch.as_tensor(call()).float() - expected).norm() / expected.norm())
        if off > (0.1 if re.search("int8|bfloat16", name) else 1e-3):
            raise RuntimeError(f"{name} gives something else on {work.name}: {off:.1e} off")
    return calls


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that a call reads: all but an embedding's that no head shares."""
    sparse = [module for module in model.modules() if isinstance(module, InferenceLinear)]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    heads = {id(module.weight) for module in model.modules() if type(module) is nn.Linear}
    params = {id(param): param.nbytes for param in model.parameters() if id(param) not in tables - heads}
    return sum(params.values()) + sum(layer.stored_bytes for layer in sparse)  # type: ignore[misc]


def _with_torchs_product(model: nn.Module, ids: Tensor) -> Any:
    """The product that SparseLinear uses without a compiler."""
    with patch.object(sparse_linear, "library", lambda: None):
        return model(ids)


def bandwidth() -> float:
    """Return the greatest number of bytes per second that torch reads with its threads."""
    numbers = torch.zeros(1 << 28)
    least = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        numbers.sum()
        least = min(least, time.perf_counter() - began)
    return numbers.nbytes / least


def measure(
    work: Workload, sparsity: float, rounds: int, left_out: dict[str, str], every: bool
) -> list[dict[str, Any]]:
    """Time a workload on each engine, in a new random order in every round."""
    calls = engines(build(work.model, sparsity), work, left_out, every)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            time.sleep(0.02)  # until no thread of the engine before it waits for work any more
            calls[name][0]()  # one call follows another, as in decoding
            began = time.perf_counter()
            calls[name][0]()
            seconds[name].append(time.perf_counter() - began)
    rows: list[dict[str, Any]] = []
    for name, values in seconds.items():
        ratio = spread([dense / sparse for dense, sparse in zip(seconds[DENSE], values, strict=True)])
        to_half = median(dense / sparse for dense, sparse in zip(seconds[DENSE16], values, strict=True))
        row = {"workload": work.name, "model": work.model, "sparsity": sparsity, "engine": name, "speedup": ratio}
        row |= {"times_bfloat16": to_half, "median_ms": median(values) * 1e3, "rounds": rounds}
        row |= {"bytes": calls[name][1], "tokens_per_s": work.batch * work.tokens / median(values)}
        rows.append(row)
    return rows


def text(record: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    parts = ["# Inference with the zeros of a model, on a CPU", describe(record)]
    for name in dict.fromkeys(row["model"] for row in record["rows"]):
        headings = ["workload", "zeros", "engine", "ms", "tokens/s", "times float32", "10-90%", "times bfloat16"]
        headings += ["MB", "of the bandwidth"]
        rows = [
            [row["workload"], f"{row['sparsity']:.0%}", row["engine"], _short(row["median_ms"])]
            + [_short(row["tokens_per_s"]), f"{row['speedup']['median']:.2f}"]
            + [f"{row['speedup']['q10']:.2f}-{row['speedup']['q90']:.2f}", f"{row['times_bfloat16']:.2f}"]
            + [_short(row["bytes"] / 1e6) if row["bytes"] else "", _share(row, record["bandwidth"])]
            for row in record["rows"]
            if row["model"] == name
        ]
        parts += [f"## A model of the size of {name}", table(headings, rows)]
    parts += [f"Left out: {name} ({why})." for name, why in record["left_out"].items()]
    parts.append(
        "Times float32 and bfloat16 are medians over the rounds of the dense model's time, in that dtype, over the "
        f"engine's. MB are the weights that a call reads, and their share is of {record['bandwidth'] / 1e9:.1f} GB/s, "
        "which a sum over 1 GB read in this run; it means little where a call has many rows. GPT-2's head of 50,257 "
        "tokens is tied to the embeddings and does not decay, nor does the Llama's of 2,000: they are dense, and with "
        "int8 values they have int8 too, as in the other int8 engines."
    )
    return "\n\n".join(parts) + "\n"


def _share(row: dict[str, Any], most: float) -> str:
    return f"{row['bytes'] / (row['median_ms'] / 1e3) / most:.0%}" if row["bytes"] else ""


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one token of the Llama, at 50, 80 and 95%%")
    parser.add_argument("--sparsity", type=float, nargs="+", help="fractions of zeros")
    parser.add_argument("--only", default="", help="a regular expression for the workloads and their models")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each workload")
    parser.add_argument("--name", default="inference", help="name of the results")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    tf.utils.logging.set_verbosity_error()
    record = conditions("cpu", PACKAGES)
    record["command"] = command("inference.py", sys.argv[1:] if argv is None else argv)
    record |= {"rows": [], "left_out": {}, "bandwidth": bandwidth()}
    works = (
        WORKLOADS[:1]
        if args.quick
        else [each for each in WORKLOADS if re.search(args.only, f"{each.model} {each.name}")]
    )
    with torch.no_grad():
        for work in works:
            most = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95) if work is WORKLOADS[0] else (0.5, 0.9, 0.95)
            sparsities = args.sparsity or ((0.5, 0.8, 0.95) if args.quick else most)
            for sparsity in sparsities:
                every = sparsity == sparsities[0]
                record["rows"] += measure(work, sparsity, args.rounds, record["left_out"], every)
                found = {
                    row["engine"]: row["speedup"]["median"]
                    for row in record["rows"][-20:]
                    if row["sparsity"] == sparsity
                }
                said = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
                print(f"{work.model}, {work.name}, {sparsity:.0%}: {said}", file=sys.stderr, flush=True)
    report = text(record)
    print(report)
    write(record, report, args.output, "inference_quick" if args.quick else args.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
