"""The runs of the quality benchmark: which there are, which of them have results, and which come next."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Run:
    """The values that identify one run."""

    task: str
    method: str
    steps: int
    target: float | None
    learning_rate: float
    knob: Any
    seed: int
    begin: float
    end: float


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def find(results: list[dict[str, Any]], run: Run) -> dict[str, Any] | None:
    """Return the result of a run, or None."""
    wanted = asdict(run)
    return next((line for line in results if all(line[key] == value for key, value in wanted.items())), None)


def best(results: list[dict[str, Any]], runs: list[Run]) -> Run | None:
    """Return the run with the best dev score (accuracy if it has one), or None while a result is missing."""
    lines = [find(results, run) for run in runs]
    if not runs or any(line is None for line in lines):
        return None
    scores = [line.get("dev_accuracy", -line["dev_loss"]) for line in lines if line is not None]
    return runs[scores.index(max(scores))]


def _choice(results: list[dict[str, Any]], trials: list[Run]) -> Run | None:
    """The best trial; a single trial is chosen without a result."""
    return trials[0] if len(trials) == 1 else best(results, trials)


def planned(config: dict[str, Any], results: list[dict[str, Any]], name: str) -> tuple[list[Run], list[Run]]:
    """Return the runs of a task that can be made now: the runs to choose by, and the runs to report.

    Args:
        config: Content of ``runs.yaml``.
        results: Lines of the results file.
        name: Name of the task.
    """
    task = config["tasks"][name]
    common = {"task": name, "steps": task["steps"], "begin": config["begin"], "end": task.get("end", config["end"])}
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
    # A method without values of its own is only for the tasks that give it some.
    everywhere = [method for method, how in config["methods"].items() if "values" in how]
    for method in task.get("methods", ["dense", *everywhere]):
        if method == "dense":
            continue
        how = config["methods"][method]
        values = task.get("values", {}).get(method) or how["values"]
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
