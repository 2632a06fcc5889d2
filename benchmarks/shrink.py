"""How fast a model is without its dead neurons and heads: the dense model against the same model shrunk.

Half of the neurons of each layer, and half of the heads of keys and values with their queries, are set to zero, and
`hf_pdecay.shrink` removes them. Both are then ordinary dense models. Their outputs are compared in
float32; they are timed in `--dtype`, in turns, in a new random order in every round.

    python benchmarks/shrink.py --quick              # small models, a minute
    python benchmarks/shrink.py                      # CPU, float32
    python benchmarks/shrink.py --device cuda        # a model of Llama 3.2 1B's size too, bfloat16
    python benchmarks/shrink.py --device cuda --graph  # the same, replayed as CUDA graphs: without the time of Python

Needs torch and transformers only.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from clocks import clock, spread
from hf_pdecay import shrink
from hf_pdecay.layers.finding import find_layers
from tables import command, conditions, describe, table, write


ROOT = Path(__file__).resolve().parent
DENSE = "dense"
NEURONS = "half of the neurons"
BOTH = "half of the neurons and heads"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Workload:
    """The input of a model.

    Attributes:
        name: What it is called in the table.
        batch: Sequences.
        tokens: Tokens of each sequence that a call computes.
        past: Tokens of each sequence that a cache holds before the call.
    """

    name: str
    batch: int
    tokens: int
    past: int = 0


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
    | {"num_attention_heads": 8, "num_key_value_heads": 4},
    "Llama-like, 0.2 B": {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    | {"num_attention_heads": 16, "num_key_value_heads": 8},
    "Llama 3.2 1B": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
}


def models(device: str, quick: bool) -> list[str]:
    """Return the names of the models that are timed."""
    if quick:
        return ["tiny Llama-like", "tiny GPT-2"]
    return [*(["Llama 3.2 1B"] if device == "cuda" else []), "Llama-like, 0.2 B", "GPT-2 small"]


def workloads(device: str, quick: bool) -> list[Workload]:
    """Return the inputs of the models."""
    if quick:
        return [Workload("decode, batch 1", 1, 1, 16), Workload("prompt of 64 tokens, batch 2", 2, 64)]
    if device == "cuda":
        return [
            Workload("decode, batch 1", 1, 1, 512),
            Workload("decode, batch 32", 32, 1, 512),
            Workload("prompt of 512 tokens, batch 1", 1, 512),
            Workload("prompt of 512 tokens, batch 16", 16, 512),
        ]
    return [
        Workload("decode, batch 1", 1, 1, 64),
        Workload("decode, batch 16", 16, 1, 64),
        Workload("prompt of 64 tokens, batch 1", 1, 64),
        Workload("prompt of 64 tokens, batch 8", 8, 64),
    ]


def build(name: str) -> Any:
    """Return a model with random weights, in float32."""
    torch.manual_seed(0)
    if "GPT-2" in name:
        tiny: dict[str, Any] = {"n_layer": 2, "n_embd": 128, "n_head": 4, "vocab_size": 1000} if "tiny" in name else {}
        return tf.GPT2LMHeadModel(tf.GPT2Config(**tiny)).eval()
    size = SIZES["tiny" if "tiny" in name else name]
    return tf.LlamaForCausalLM(tf.LlamaConfig(**size, max_position_embeddings=2048)).eval()


@torch.no_grad()
def kill(model: nn.Module, kind: str) -> None:
    """Set the outgoing weights of every second unit of a kind to zero."""
    for layer in find_layers(model, kind):
        for member, place in zip(layer.units.members, layer.sites, strict=True):
            if place.part in ("down", "output"):
                for group in range(1, layer.units.count, 2):
                    start = member.offset + group * member.size
                    model.get_parameter(member.param).narrow(member.dim, start, member.size).zero_()


def variants(name: str, device: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the dense model and the shrunk ones, and the config with which these load.

    Raises:
        RuntimeError: If a shrunk model gives something else than the dense one with the same weights at zero.
    """
    dense = build(name).to(device)
    models = {DENSE: dense}
    # GPT-2's config cannot express fewer heads.
    layouts = {NEURONS: "uniform", BOTH: "ragged" if "GPT-2" in name else "uniform"}
    ids = torch.randint(0, 1000, (2, 16), generator=torch.Generator().manual_seed(1)).to(device)
    for variant, kind in ((NEURONS, "neuron"), (BOTH, "head")):
        kill(dense, kind)
        models[variant] = shrink(copy.deepcopy(dense), layers=layouts[variant])
        expected = dense(ids).logits
        off = float((models[variant](ids).logits - expected).abs().max() / expected.abs().max())
        if not off < 1e-4:
            raise RuntimeError(f"{variant}: the shrunk model gives something else, {off:.1e} off")
    return models, layouts


class Step(nn.Module):
    """A call of a model: a prompt, or a token of each sequence on top of a cache, whose contents do not matter."""

    def __init__(self, model: Any, work: Workload, device: str, vocabulary: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.model, self.work = model, work
        self.ids = torch.randint(0, vocabulary, (work.batch, work.tokens), generator=generator).to(device)
        self.past = torch.randint(0, vocabulary, (work.batch, work.past), generator=generator).to(device)
        self.cache: Any = None
        if work.past:
            output = model(self.past, use_cache=True, logits_to_keep=1)
            self.cache_name = "cache" if "cache" in output else "past_key_values"  # before transformers 5.24
            self.cache = output[self.cache_name]

    def forward(self) -> Tensor:
        """Return the logits of the last tokens."""
        if self.cache is None:
            logits: Tensor = self.model(self.ids, use_cache=False, logits_to_keep=1).logits
            return logits
        logits = self.model(self.ids, **{self.cache_name: self.cache}, use_cache=True).logits
        self.cache.crop(-self.work.tokens)
        return logits


def graphed(step: Step) -> Call:
    """Return a call that replays a step on the GPU, without Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measure(name: str, args: argparse.Namespace, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Time the variants of a model on each workload."""
    models, layouts = variants(name, args.device)
    dtype = getattr(torch, args.dtype)
    counts = {variant: sum(param.numel() for param in model.parameters()) for variant, model in models.items()}
    for model in models.values():
        model.to(dtype)
    rows, left_out = [], {}
    for work in workloads(args.device, args.quick):
        calls: dict[str, Call] = {}
        try:
            for variant, model in models.items():
                step = Step(model, work, args.device, model.config.vocab_size)
                calls[variant] = graphed(step) if args.graph else step
        except RuntimeError as error:  # out of memory, or not capturable as a graph
            left_out[f"{name}, {work.name}"] = str(error).splitlines()[0]
            continue
        for row in race(calls, args.device, rounds):
            variant = row["variant"]
            row |= {"model": name, "workload": work.name, "layers": layouts.get(variant, "")}
            row |= {"parameters": counts[variant], "dtype": args.dtype}
            rows.append(row | {"tokens_per_s": work.batch * work.tokens / row["median_ms"] * 1e3})
        del calls
        gc.collect()
    return rows, left_out


def race(calls: dict[str, Call], device: str, rounds: int) -> list[dict[str, Any]]:
    """Time calls in rounds, in a new random order in each; a turn takes at least 20 milliseconds."""
    for call in calls.values():
        clock(call, 2, device)
    repeats = {name: max(1, round(0.02 / max(clock(call, 1, device), 1e-6))) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            seconds[name].append(clock(calls[name], repeats[name], device))
    return [
        {
            "variant": name,
            "median_ms": median(values) * 1e3,
            "speedup": spread([dense / variant for dense, variant in zip(seconds[DENSE], values, strict=True)]),
            "rounds": rounds,
        }
        for name, values in seconds.items()
    ]


def text(record: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    parts = ["# Inference without dead neurons and heads", describe(record)]
    for name in dict.fromkeys(row["model"] for row in record["rows"]):
        headings = ["workload", "model", "parameters", "ms", "tokens/s", "times dense", "10-90%", "layers"]
        rows = [
            [row["workload"], row["variant"], f"{row['parameters'] / 1e6:,.1f} M", _short(row["median_ms"])]
            + [_short(row["tokens_per_s"]), f"{row['speedup']['median']:.2f}"]
            + [f"{row['speedup']['q10']:.2f}-{row['speedup']['q90']:.2f}", row["layers"]]
            for row in record["rows"]
            if row["model"] == name
        ]
        dtype = next(row["dtype"] for row in record["rows"] if row["model"] == name)
        parts += [f"## {name}, {dtype}", table(headings, rows)]
    parts += [f"Left out: {name} ({why})." for name, why in record["left_out"].items()]
    parts.append(
        "Times dense is the median over the rounds of the dense model's time over the shrunk one's, and its 10-90% "
        "range. Embeddings and head are as large as before. "
        + ("Calls are replayed as CUDA graphs." if record["graph"] else "Calls come from Python, one after another.")
    )
    return "\n\n".join(parts) + "\n"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, few rounds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (cpu)")
    parser.add_argument("--dtype", help="of the weights when they are timed: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs")
    parser.add_argument("--rounds", type=int, default=None, help="rounds of each workload")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; take --device cpu")
    if args.graph and args.device != "cuda":
        parser.error("--graph goes with --device cuda")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    warnings.filterwarnings("ignore")
    tf.utils.logging.set_verbosity_error()
    rounds = args.rounds or (5 if args.quick else 15)
    record = conditions(args.device, ("torch", "transformers"))
    record["command"] = command("shrink.py", sys.argv[1:] if argv is None else argv)
    record |= {"graph": args.graph, "rows": [], "left_out": {}}
    with torch.no_grad():
        for name in models(args.device, args.quick):
            rows, left_out = measure(name, args, rounds)
            record["rows"] += rows
            record["left_out"] |= left_out
            for row in rows:
                print(f"{name}, {row['workload']}, {row['variant']}: {row['speedup']['median']:.2f}", file=sys.stderr)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    report = text(record)
    print(report)
    name = f"shrink_{args.device}" + ("_graph" if args.graph else "") + ("_quick" if args.quick else "")
    write(record, report, args.output, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
