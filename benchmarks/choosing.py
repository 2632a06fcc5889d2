"""What p and λ_p do: zeros and loss over a grid, how the weights are spread, and where the zeros are.

    python benchmarks/choosing.py --data FOLDER               # makes the runs without a result, then draws
    python benchmarks/choosing.py --data FOLDER --only fashion_mnist

The runs are short and use one seed, a fixed λ_p and the learning rate of `GRIDS`, which is not tuned for any run.
Each run appends a line to `results/choosing.jsonl` and is skipped from then on. Tables go to `results/choosing.md`,
pictures to `docs/images/choosing_*.png`. `--data` holds `tinyshakespeare/input.txt` and `fashion-mnist/*.gz`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import choosing_figures
from quality.runs import RESULTS, Run, read


IMAGES = Path(__file__).parents[1] / "docs" / "images"
P_NORMS = (0.4, 0.8, 1.0, 1.2, 1.5, 2.0)
LAMBDAS = (0.003, 0.01, 0.03, 0.1, 0.3)
# Task → steps and learning rate.
GRIDS: dict[str, tuple[int, float]] = {"shakespeare": (500, 0.004), "fashion_mnist": (422, 0.003)}


def grid(task: str) -> list[Run]:
    """Return the runs of a task: the dense run, and one run for each p and λ_p."""
    steps, rate = GRIDS[task]
    common: dict[str, Any] = {"task": task, "steps": steps, "target": None, "learning_rate": rate, "seed": 0}
    common |= {"begin": 0.0, "end": 1.0}
    dense = Run(**common, method="dense", knob=None)
    return [dense, *(Run(**common, method="pdecay_fixed", knob=[p, lam]) for p in P_NORMS for lam in LAMBDAS)]


def main() -> int:
    """Run the grids; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--only", action="append", choices=list(GRIDS), help="a task, instead of all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time; each uses one thread")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after this many minutes")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that train
    from quality.training import perform

    path = RESULTS / "choosing.jsonl"
    runs = [run for task in options.only or GRIDS for run in grid(task)]
    perform(lambda results: runs, path, options.data, options.jobs, time.time() + 60 * options.minutes)
    results = read(path)
    print(choosing_figures.write(results, {task: grid(task) for task in GRIDS}, RESULTS / "choosing.md"))
    choosing_figures.draw(results, {task: grid(task) for task in GRIDS}, IMAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
