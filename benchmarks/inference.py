"""Time whole models with sparse layers against the same models dense, and against other engines that are installed.

    python benchmarks/inference.py --quick
    python benchmarks/inference.py --sparsity 0.8 0.9 0.95 0.99

Models of the sizes of GPT-2 small and BERT base, with random weights; the smallest weights of each linear layer in the
blocks are zero. (The speed does not depend on what a model has learned.) All engines do each workload in turn, in every
round; ratios are to the dense model in the same round.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
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
from hf_pdecay import build_param_groups, to_sparse_inference
from hf_pdecay.inference import sparse_linear
from tables import command, conditions, describe, table, write


ROOT = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "openvino", "onnxruntime")
DENSE, OURS, CSR, OPENVINO, ONNX = "dense torch", "to_sparse_inference", "torch's CSR", "OpenVINO", "ONNX Runtime"
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
    else:
        model = tf.BertForSequenceClassification(tf.BertConfig())
    for group in build_param_groups(model, p_norm=0.8, lambda_p=0.01):
        for param in group["params"] if group["lambda_p"] else ():
            count = round(sparsity * param.numel())
            if count:
                param.mul_(param.abs() > param.abs().flatten().kthvalue(count).values)
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


def engines(dense: nn.Module, work: Workload, left_out: dict[str, str]) -> dict[str, Call]:
    """Return a call of the workload for each engine, and check that its result is that of the dense model."""
    ids = torch.randint(0, 1000, (work.batch, work.tokens), generator=torch.Generator().manual_seed(0))
    sparse = copy.deepcopy(dense)
    to_sparse_inference(sparse, rows=work.batch * work.tokens)
    every = copy.deepcopy(dense)
    to_sparse_inference(every, min_sparsity=0.5)
    calls: dict[str, Call] = {
        DENSE: partial(WithPast(dense, work), ids),
        OURS: partial(WithPast(sparse, work), ids),
        CSR: partial(_with_torchs_product, WithPast(every, work), ids),
    }
    if not work.past:  # other engines have other caches
        calls |= _others(WithPast(dense, work), ids, left_out)
    expected = calls[DENSE]()
    for name, call in calls.items():
        off = float((torch.as_tensor(call()) - expected).abs().max() / expected.abs().max())
        if off > 1e-3:
            raise RuntimeError(f"{name} gives something else on {work.name}: {off:.1e} off")
    return calls


def _with_torchs_product(model: nn.Module, ids: Tensor) -> Any:
    """The product that SparseLinear uses without a compiler."""
    with patch.object(sparse_linear, "_library", lambda: None):
        return model(ids)


def _others(model: nn.Module, ids: Tensor, left_out: dict[str, str]) -> dict[str, Call]:
    """Return the other engines that are installed; both read what torch exports."""
    calls: dict[str, Call] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        try:
            import onnxscript  # noqa: F401  which torch.onnx.export needs
        except ImportError as missing:
            left_out |= dict.fromkeys((OPENVINO, ONNX), str(missing))
            return calls
        torch.onnx.export(model, (ids,), path, dynamo=True, verbose=False)
        for name, load in ((OPENVINO, _openvino), (ONNX, _onnx)):
            try:
                calls[name] = load(path, ids)
            except ImportError as missing:
                left_out[name] = str(missing)
    return calls


def _openvino(path: str, ids: Tensor) -> Call:
    import openvino as ov

    # The rate is for sparse weights. It works on 8-bit weights and processors with AMX, and is ignored elsewhere.
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.8,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.compile_model(ov.convert_model(path), "CPU", options)
    return lambda: compiled(ids.numpy())[0]


def _onnx(path: str, ids: Tensor) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: ids.numpy()})[0]


def measure(work: Workload, sparsity: float, rounds: int, left_out: dict[str, str]) -> list[dict[str, Any]]:
    """Time a workload on each engine, in a new random order in every round."""
    calls = engines(build(work.model, sparsity), work, left_out)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            began = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, values in seconds.items():
        ratio = spread([dense / sparse for dense, sparse in zip(seconds[DENSE], values, strict=True)])
        least = min(seconds[DENSE]) / min(values)
        row = {"workload": work.name, "model": work.model, "sparsity": sparsity, "engine": name, "speedup": ratio}
        row |= {"speedup_of_least": least, "median_ms": median(values) * 1e3, "rounds": rounds}
        rows.append(row | {"tokens_per_s": work.batch * work.tokens / median(values)})
    return rows


def text(record: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    parts = ["# Inference with the zeros of a model, on a CPU", describe(record)]
    for name in dict.fromkeys(row["model"] for row in record["rows"]):
        headings = ["workload", "zeros", "engine", "ms", "tokens/s", "times dense", "10-90%", "of the least"]
        rows = [
            [row["workload"], f"{row['sparsity']:.0%}", row["engine"], _short(row["median_ms"])]
            + [_short(row["tokens_per_s"]), f"{row['speedup']['median']:.2f}"]
            + [f"{row['speedup']['q10']:.2f}-{row['speedup']['q90']:.2f}", f"{row['speedup_of_least']:.2f}"]
            for row in record["rows"]
            if row["model"] == name
        ]
        parts += [f"## A model of {name}'s size", table(headings, rows)]
    parts += [f"Left out: {name} ({why})." for name, why in record["left_out"].items()]
    parts.append(
        "Times dense is the median over the rounds of the dense model's time over the engine's; of the least, that of "
        "the least times of all rounds. GPT-2's head of 50,257 tokens is tied to the embeddings, does not decay and "
        "stays dense: at one token a sequence it takes a third of the dense model's time."
    )
    return "\n\n".join(parts) + "\n"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="95%% zeros only, few rounds")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.99], help="fractions of zeros")
    parser.add_argument("--rounds", type=int, default=None, help="rounds of each workload")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    tf.utils.logging.set_verbosity_error()
    rounds = args.rounds or (9 if args.quick else 15)
    record = conditions("cpu", PACKAGES)
    record["command"] = command("inference.py", sys.argv[1:] if argv is None else argv)
    record |= {"rows": [], "left_out": {}}
    with torch.no_grad():
        for work in WORKLOADS:
            for sparsity in [0.95] if args.quick else args.sparsity:
                record["rows"] += measure(work, sparsity, rounds, record["left_out"])
                ours = next(row for row in reversed(record["rows"]) if row["engine"] == OURS)
                print(f"{work.model}, {work.name}, {sparsity:.0%}: {ours['speedup']['median']:.2f}", file=sys.stderr)
    report = text(record)
    print(report)
    write(record, report, args.output, "inference_quick" if args.quick else "inference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
