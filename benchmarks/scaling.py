"""Measure how the time of pruning, of setting λ_p and of a log event grows with the weights.

    python benchmarks/scaling.py

Steps `AdamWLp` on one thread with a target on 1, 10 and 50 M decayed weights, and times in each round the optimizer's
step, pruning, λ_p and a count of zeros. Ratios are to the step of the same round, so that a busy machine affects both.
Takes half a minute.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from clocks import spread
from hf_pdecay import AdamWLp, SparsityControl, build_param_groups, measure_sparsity
from memory import extra_bytes
from tables import command, conditions, describe, table, write
from timing import no_garbage_collection


ROOT = Path(__file__).resolve().parent
COMPONENTS = {"step": "optimizer.step()", "cut": "pruning", "lambda_p": "λ_p after it", "log": "a count of zeros"}
SIZES = {"1 M": (4, 512), "10 M": (10, 1024), "50 M": (50, 1024)}
STEPS = 1000


def measure(tensors: int, width: int, rounds: int) -> dict[str, Any]:
    """Time the components on square matrices; each round is at another pruning step of a run, evenly spread."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(tensors)))
    optimizer = AdamWLp(build_param_groups(model, p_norm=0.8, lambda_p=0.0), lr=1e-4)
    control = SparsityControl(optimizer, STEPS, target_sparsity=0.9)
    for param in model.parameters():
        param.grad = torch.randn_like(param).mul_(1e-3)
    # λ_p is set after each pruning step, except for the last zeros.
    prunings = [
        step for step in range(1, STEPS) if control.schedule.prunes(step) and control.schedule.progress(step) < 0.95
    ]
    chosen = [prunings[number * len(prunings) // rounds] for number in range(rounds)]
    control.before_step(control.schedule.begin + 1)
    for _ in range(2):  # compiles, and makes the moments
        optimizer.step()
    measure_sparsity(model)
    seconds: dict[str, list[float]] = {part: [] for part in COMPONENTS}
    extra: dict[str, int] = {}
    with no_garbage_collection():
        for step in chosen:
            parts: dict[str, Callable[[], Any]] = {
                "step": optimizer.step,
                "cut": partial(control.after_step, step),
                "lambda_p": partial(control.before_step, step + 1),
                "log": lambda: measure_sparsity(model),
            }
            for name, part in parts.items():
                begin = time.perf_counter()
                part()
                seconds[name].append(time.perf_counter() - begin)
    last = prunings[-1] + control.schedule.interval
    extra["cut"] = extra_bytes(lambda: control.after_step(last), "cpu")
    extra["log"] = extra_bytes(lambda: measure_sparsity(model), "cpu")
    weights = tensors * width * width
    ratios = {
        part: spread([one / step for one, step in zip(times, seconds["step"], strict=True)])
        for part, times in seconds.items()
    }
    one_pruning = ratios["cut"]["median"] + ratios["lambda_p"]["median"]
    return {
        "weights": weights,
        "tensors": tensors,
        "rounds": rounds,
        "ms_per_million": {part: 1e3 * median(times) / (weights / 1e6) for part, times in seconds.items()},
        "ratio_to_step": ratios,
        "control_per_step": one_pruning / control.schedule.interval,
        "interval": control.schedule.interval,
        "temporary_bytes": extra,
    }


def text(record: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    headings = ["weights", *(f"{label}, ms per M" for label in COMPONENTS.values())]
    headings += [f"{COMPONENTS[part]} / step" for part in COMPONENTS if part != "step"]
    headings += ["target, share of a step", "pruning, MB", "count, MB"]
    rows = []
    for name, size in record["sizes"].items():
        row = [f"{name} in {size['tensors']} tensors", *(f"{size['ms_per_million'][part]:.2f}" for part in COMPONENTS)]
        for part in COMPONENTS:
            if part != "step":
                ratio = size["ratio_to_step"][part]
                row.append(f"{ratio['median']:.2f} ({ratio['q10']:.2f}-{ratio['q90']:.2f})")
        row += [f"{size['control_per_step']:.1%}"]
        row += [f"{size['temporary_bytes'][part] / 1e6:.1f}" for part in ("cut", "log")]
        rows.append(row)
    notes = [
        "Medians of the rounds, and in brackets their 10-90% range. A step here is the optimizer's alone; forward and "
        "backward take many times as long, so that the shares of a whole step are smaller.",
        f"Share of a step: pruning and λ_p, over the steps between two pruning steps: {record['interval']} in a run of "
        f"{STEPS:,}, 8 in shorter and up to 50 in longer ones. Only between sparsity_begin and sparsity_end.",
        "Pruning takes longer if only a fraction of several equal scores is zeroed: it then reads all weights "
        "twice more. Among 50 M float32 weights that is usual.",
        "MB: peak of the tensors made during it, at the last pruning step.",
    ]
    parts = ["# How control and logging grow with the weights", describe(record), table(headings, rows)]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; return the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each size (9)")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the results")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    sizes = {name: measure(*size, options.rounds) for name, size in SIZES.items()}
    record = {"command": command("scaling.py", words), "sizes": sizes, **conditions("cpu", ("torch",))}
    record["interval"] = sizes["1 M"]["interval"]
    print(text(record))
    write(record, text(record), options.output, "scaling")
    return 0


if __name__ == "__main__":
    sys.exit(main())
