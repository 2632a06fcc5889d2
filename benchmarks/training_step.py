"""Time backward and the optimizer's step together, and what the check for NaN costs in them.

    python benchmarks/training_step.py

25 M float32 weights in 24 linear layers, on the CPU. In every round, in a new random order, each optimizer makes two
training steps with fresh gradients. After the first backward a large tensor is copied, so that no gradient is left in
the cache, and the step alone is timed. In the second, backward and step are timed together. One row checks the
gradients in hooks, each as soon as backward has written it; the others do so at the start of the step or not at all.
Takes a minute.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from clocks import spread
from contenders import LAMBDA_P, LR, USUAL_P
from hf_pdecay import AdamWLp
from hf_pdecay.optim.cpu import step as compiled
from hf_pdecay.optim.tensor_step import Hyperparameters, TensorStep
from tables import command, conditions, describe, table, write
from timing import no_garbage_collection


ROOT = Path(__file__).resolve().parent
LAYERS, WIDTH = 24, 1024
TOKENS = (32, 128)
ROUNDS, WARM_UP = 16, 2
BASELINE, CHECKED, UNCHECKED = "torch AdamW, fused", "AdamWLp", "AdamWLp, gradients not checked"
HOOKS = "AdamWLp, gradients checked by hooks in backward"
PARTS = {"step": "step alone, cold", "backward": "backward", "together": "backward and step"}
NOTES = (
    "Ratios are taken within rounds, between figures of the same kind; in brackets their 10-90% range.",
    "'Reading the gradients': the check alone, on gradients that are not in the cache. It reads 4 bytes a weight, and "
    "the step reads and writes 28.",
    "The least possible ratio is that of a step that reads the gradients first, at the measured bandwidth, and then "
    "takes as long as fused AdamW.",
)


def look_at(params: Sequence[Tensor]) -> compiled.Batch:
    """Return what checks the gradients of parameters, once pointed to them."""
    hyper = Hyperparameters(LR, 0.9, 0.999, 1e-8, 0.0, USUAL_P, LAMBDA_P, False, False)
    return compiled.Batch([TensorStep(param, param, param, param, torch.zeros(()), True, hyper, 0) for param in params])


def addresses(params: Sequence[Tensor]) -> list[int]:
    """Return where the gradients of parameters lie."""
    return [param.grad.data_ptr() for param in params if param.grad is not None]


def check_in_backward(param: Tensor, found: list[bool]) -> None:
    """Have the gradient of a parameter checked by the C++ function as soon as backward has written it."""
    look = look_at([param])

    def hook(param: Tensor) -> None:
        look.point(addresses([param]))
        found.append(look.all_finite())

    param.register_post_accumulate_grad_hook(hook)


def model_of(layers: int, width: int) -> nn.Module:
    """Return linear layers with ReLU between them."""
    torch.manual_seed(0)
    pairs = [(nn.Linear(width, width, bias=False), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*(module for pair in pairs for module in pair))


def contender(name: str, layers: int, width: int) -> tuple[nn.Module, torch.optim.Optimizer, list[bool]]:
    """Return a model with its optimizer, and the list to which hooks add what they find."""
    model = model_of(layers, width)
    found: list[bool] = []
    if name == BASELINE:
        return model, torch.optim.AdamW(model.parameters(), lr=LR, fused=True), found
    careful = name == CHECKED
    optimizer = AdamWLp(model.parameters(), lr=LR, p_norm=USUAL_P, lambda_p=LAMBDA_P, skip_nonfinite=careful)
    if name == HOOKS:
        for param in model.parameters():
            check_in_backward(param, found)
    return model, optimizer, found


def measure(tokens: int, rounds: int, layers: int = LAYERS, width: int = WIDTH, flush: int = 1 << 25) -> dict[str, Any]:
    """Return the figures of batches of so many tokens; ``flush`` float32 numbers are copied to empty the cache."""
    names = (BASELINE, CHECKED, UNCHECKED, HOOKS)
    trained = {name: contender(name, layers, width) for name in names}
    rows = torch.randn(tokens, width)
    source = torch.ones(flush)
    copied = torch.empty_like(source)
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in names}
    copying: list[float] = []
    reading: list[float] = []

    def timed(work: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    order = random.Random(0)
    with no_garbage_collection():
        for number in range(WARM_UP + rounds):
            for name in order.sample(names, len(names)):
                model, optimizer, found = trained[name]
                found.clear()
                optimizer.zero_grad()
                model(rows).pow(2).mean().backward()
                copy = timed(lambda: copied.copy_(source))
                step = timed(optimizer.step)
                optimizer.zero_grad()
                loss = model(rows).pow(2).mean()
                backward = timed(loss.backward)
                together = backward + timed(optimizer.step)
                if number < WARM_UP:
                    continue
                copying.append(copy)
                for part, value in {"step": step, "backward": backward, "together": together}.items():
                    seconds[name][part].append(value)
            params = list(trained[BASELINE][0].parameters())
            look = look_at(params)
            look.point(addresses(params))
            copied.copy_(source)
            reading.append(timed(look.all_finite))
    weights = layers * width * width
    base = seconds[BASELINE]
    least = {part: 1 + median(reading) / median(base[part]) for part in ("step", "together")}
    return {
        "tokens": tokens,
        "weights": weights,
        "rounds": rounds,
        "copy_gb_per_s": 2 * source.nbytes / median(copying) / 1e9,
        "reading_ms": 1e3 * median(reading),
        "reading_gb_per_s": 4 * weights / median(reading) / 1e9,
        "least_ratio": least,
        "rows": {
            name: {
                "ms": {part: 1e3 * median(values) for part, values in parts.items()},
                "ratio": {
                    part: spread([one / other for one, other in zip(values, base[part], strict=True)])
                    for part, values in parts.items()
                },
            }
            for name, parts in seconds.items()
        },
    }


def text(record: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    parts = ["# Backward and the optimizer's step", describe(record)]
    for batch in record["batches"]:
        rows = []
        for name, row in batch["rows"].items():
            cells = [f"{row['ms'][part]:.1f}" for part in PARTS]
            for part in PARTS:
                ratio = row["ratio"][part]
                cells.append(f"{ratio['median']:.3f} ({ratio['q10']:.2f}-{ratio['q90']:.2f})")
            rows.append([name, *cells])
        least = batch["least_ratio"]
        parts += [
            f"## {batch['weights']:,} weights, batches of {batch['tokens']} tokens",
            table(["optimizer", *(f"{name}, ms" for name in PARTS.values()), *PARTS.values()], rows),
            f"{batch['rounds']} rounds. Reading the gradients takes {batch['reading_ms']:.2f} ms "
            f"({batch['reading_gb_per_s']:.1f} GB/s; a copy moves {batch['copy_gb_per_s']:.1f} GB/s). The least "
            f"possible ratios with a check before the first write: {least['step']:.3f} of the step alone, "
            f"{least['together']:.3f} of backward and step.",
        ]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in NOTES)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; return the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="tokens of a batch (32 128)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds of each ({ROUNDS})")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the results")
    options = parser.parse_args(words)
    if min(options.rounds, *options.tokens) < 1:
        parser.error("--rounds and --tokens must be at least 1")
    record = {"command": command("training_step.py", words), **conditions("cpu", ("torch", "numpy"))}
    record["batches"] = [measure(tokens, options.rounds) for tokens in options.tokens]
    print(text(record))
    write(record, text(record), options.output, "training_step_cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
