"""Loss against sparsity: adamw_lp beside the other ways to a sparse model, on real tasks with real seeds.

    python benchmarks/quality.py --data FOLDER                # runs what the results file lacks, then draws
    python benchmarks/quality.py --data FOLDER --quick        # one task, one seed, one target: under ten minutes
    python benchmarks/quality.py --data FOLDER --only shakespeare --jobs 2 --minutes 60

Which runs there are says `quality.yaml`. Each appends a line to `results/quality.jsonl` and is skipped from then on, so
the table grows over several sittings and machines. `--data` holds `tinyshakespeare/input.txt`,
`sst2/{train,dev,test}.tsv` and `fashion-mnist/*.gz`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml


HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Run:
    """What one run is told apart by."""

    task: str
    method: str
    steps: int
    target: float | None
    learning_rate: float
    knob: Any
    seed: int
    begin: float
    end: float


def execute(run: Run, data: str) -> dict[str, Any]:
    """Train and evaluate; returns the line of the results file."""
    import torch
    from transformers.utils import logging as hf_logging

    from quality_methods import METHODS, Setting
    from quality_tasks import TASKS
    from quality_zeros import fraction, spread

    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    task = TASKS[run.task](Path(data), run.seed, run.steps)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
        stdout, sys.stdout = sys.stdout, nothing  # the Trainer prints its logs
        try:
            arguments = {
                **task.arguments,
                "output_dir": folder,
                "learning_rate": run.learning_rate,
                "lr_scheduler_type": "cosine",
                "seed": run.seed,
                "report_to": "none",
                "save_strategy": "no",
                "logging_steps": run.steps,
                "disable_tqdm": True,
                "dataloader_pin_memory": False,
            }
            setting = Setting(run.target, run.knob, run.begin, run.end, arguments)
            trainer = METHODS[run.method](task, setting)
            if task.accuracy:
                trainer.compute_metrics = _accuracy
            begin = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - begin
            zeros = fraction(task.model)
            picture = spread(task.model) if isinstance(run.knob, (list, tuple)) else {}
            parts = {name: trainer.evaluate(getattr(task, name)) for name in ("dev", "test")}
        finally:
            sys.stdout = stdout
    scores = {
        f"{name}_{key}": figures[f"eval_{key}"]
        for name, figures in parts.items()
        for key in ("loss", "accuracy")
        if f"eval_{key}" in figures
    }
    return {
        **asdict(run),
        **scores,
        "sparsity": zeros,
        **picture,
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("hf-pdecay", "torch", "transformers", "torchao")},
        },
    }


def _start_worker() -> None:
    import torch

    torch.set_flush_denormal(True)  # factors of a dying weight are numbers that a CPU is slow to multiply


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def find(results: list[dict[str, Any]], run: Run) -> dict[str, Any] | None:
    """Return the result of a run, or None."""
    wanted = asdict(run)
    return next((line for line in results if all(line[key] == value for key, value in wanted.items())), None)


def best(results: list[dict[str, Any]], runs: list[Run]) -> Run | None:
    """Return the run with the best dev score (accuracy, where there is one), or None while any is missing."""
    lines = [find(results, run) for run in runs]
    if not runs or any(line is None for line in lines):
        return None
    scores = [line.get("dev_accuracy", -line["dev_loss"]) for line in lines if line is not None]
    return runs[scores.index(max(scores))]


def _choice(results: list[dict[str, Any]], trials: list[Run]) -> Run | None:
    """The best of some trials; where there is but one it need not be made."""
    return trials[0] if len(trials) == 1 else best(results, trials)


def planned(config: dict[str, Any], results: list[dict[str, Any]], name: str) -> tuple[list[Run], list[Run]]:
    """Return the runs of a task that can be made now: those to choose by and those to report, in the order of use."""
    task = config["tasks"][name]
    common = {"task": name, "steps": task["steps"], "begin": config["begin"], "end": config["end"]}
    tune = task["tune"]
    choosing = [
        Run(**common, method="dense", target=None, learning_rate=rate, knob=None, seed=tune["seed"])
        for rate in task["learning_rates"]
    ]
    chosen = _choice(results, choosing)
    if chosen is None:
        return choosing, []
    if len(choosing) == 1:
        choosing = []
    common["learning_rate"] = chosen.learning_rate
    reported = [Run(**common, method="dense", target=None, knob=None, seed=seed) for seed in task["seeds"]]
    for method in task.get("methods", ["dense", *config["methods"]]):
        if method == "dense":
            continue
        how = config["methods"][method]
        values = task.get("values", {}).get(method, how["values"])
        if how.get("free"):
            reported += [
                Run(**common, method=method, target=None, knob=value, seed=seed)
                for value in values
                for seed in task["seeds"]
            ]
            continue
        rates = task.get("sparse_learning_rates", [chosen.learning_rate])
        for target in task["targets"]:
            at = target if tune["target"] == "each" else tune["target"]
            trials = [
                Run(**common | {"learning_rate": rate}, method=method, target=at, knob=value, seed=tune["seed"])
                for rate in rates
                for value in values
            ]
            if len(trials) > 1:
                choosing += [trial for trial in trials if trial not in choosing]
            winner = _choice(results, trials)
            if winner is not None:
                reported += [replace(winner, target=target, seed=seed) for seed in task["seeds"]]
    # Every row gets its first seed before any gets its second.
    return choosing, sorted(reported, key=lambda run: run.seed)


def quick_runs(config: dict[str, Any]) -> list[Run]:
    """Return the runs of ``--quick``."""
    quick = config["quick"]
    return [
        Run(
            task=quick["task"],
            method=method,
            steps=quick["steps"],
            target=None if method == "dense" else quick["target"],
            learning_rate=quick["learning_rate"],
            knob=knob,
            seed=quick["seed"],
            begin=config["begin"],
            end=config["end"],
        )
        for method, knob in quick["methods"].items()
    ]


def perform(plan: Any, path: Path, data: str, jobs: int, until: float) -> None:
    """Make the runs that ``plan`` names for the results so far, several at a time, until all are made or time is up."""
    running: dict[Future[dict[str, Any]], Run] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        while True:
            results = read(path)
            todo = [run for run in plan(results) if find(results, run) is None and run not in running.values()]
            while todo and len(running) < jobs and time.time() < until:
                run = todo.pop(0)
                running[pool.submit(execute, run, data)] = run
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run, line = running.pop(future), future.result()
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                score = (
                    f"accuracy {line['test_accuracy']:.4f}" if "test_accuracy" in line else f"{line['test_loss']:.4f}"
                )
                print(f"{run.task} {run.method} {run.target} {run.knob} seed {run.seed}: {score}", flush=True)


def main() -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--quick", action="store_true", help="one task, one seed, one target")
    parser.add_argument("--only", action="append", help="a task, instead of all; may be given more than once")
    parser.add_argument("--methods", nargs="*", help="methods, instead of all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of a thread each")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after so many minutes")
    parser.add_argument("--table", action="store_true", help="run nothing, only write the table and the picture")
    options = parser.parse_args()

    import quality_table

    config = yaml.safe_load((HERE / "quality.yaml").read_text(encoding="utf-8"))
    names = options.only or list(config["tasks"])
    path = RESULTS / ("quality_quick.jsonl" if options.quick else "quality.jsonl")
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.quick:
        path.unlink(missing_ok=True)

    def plan(results: list[dict[str, Any]]) -> list[Run]:
        if options.quick:
            return quick_runs(config)
        parts = [planned(config, results, name) for name in names]
        runs = [run for choosing, _ in parts for run in choosing] + [run for _, reported in parts for run in reported]
        return [run for run in runs if options.methods is None or run.method in options.methods]

    if not options.table:
        perform(plan, path, options.data, options.jobs, time.time() + 60 * options.minutes)
    if options.quick:
        print(quality_table.write(read(path), quick_runs(config), RESULTS / "quality_quick.md"))
        return 0
    results = read(path)
    reported = [run for name in config["tasks"] for run in planned(config, results, name)[1]]
    print(quality_table.write(results, reported, RESULTS / "quality.md"))
    quality_table.draw(results, reported, HERE.parent / "docs" / "images" / "quality.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
