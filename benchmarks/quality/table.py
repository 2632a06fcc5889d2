"""The table and the picture of the quality benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .runs import Run


NAMES = {
    "dense": "dense AdamW",
    "pdecay": "adamw_lp --target_sparsity",
    "gmp": "gradual magnitude pruning",
    "gmp_uniform": "gradual magnitude pruning, each tensor alike",
    "one_shot": "one-shot magnitude, healed",
    "one_shot_unhealed": "one-shot magnitude, not healed",
    "torchao_min_sparsity": "torchao MinSparsityConstraint",
    "factored": "w = θ|θ|, L2 on θ, pruned, healed",
    "pdecay_fixed": "adamw_lp, fixed λ_p",
    "torchao_lasso": "torchao ProxLasso",
    "pdecay_taught": "adamw_lp --target_sparsity --teacher self",
    "gmp_uniform_taught": "gradual magnitude pruning, each tensor alike, same teacher",
    "torchao_min_sparsity_taught": "torchao MinSparsityConstraint, same teacher",
}

OURS = ("pdecay", "pdecay_taught")

Line = dict[str, Any]


def write(results: Sequence[Line], runs: Sequence[Run], path: Path) -> str:
    """Write the tables as Markdown and return them.

    Args:
        results: Lines of the results file.
        runs: The runs to report; a run without a result is shown as not run yet.
        path: File to write.
    """
    parts = [
        "# Loss against sparsity",
        "`python benchmarks/quality --data FOLDER`; the runs are those of [runs.yaml](../quality/runs.yaml), and the "
        "data are named in [the script](../quality/__main__.py). Mean over the seeds that all methods of a column have "
        "run, and from the least to the largest; the best row of a column is bold. The sparsity is counted in the "
        "weights of linear layers and convolutions.",
    ]
    for task, reported in _begun(results, runs).items():
        parts += _task(results, reported, task)
    versions = sorted({", ".join(f"{name} {value}" for name, value in line["versions"].items()) for line in results})
    dates = sorted({line["date"] for line in results})
    if results:
        hours: dict[str, float] = {}
        for line in results:
            device = line.get("device", "CPU")
            hours[device] = hours.get(device, 0.0) + line["seconds"] / 3600
        spent = [
            f"{time:.1f} hours on "
            + ("one CPU core each" if device == "CPU" else f"an {device} shared by several runs")
            for device, time in hours.items()
        ]
        parts.append(
            f"{len(results)} runs so far, including those that chose knobs and learning rates, of "
            f"{' and '.join(spent)}, {dates[0]} to {dates[-1]}. {'; '.join(versions)}."
        )
    text = "\n\n".join(parts) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return text


def _task(results: Sequence[Line], runs: Sequence[Run], task: str) -> list[str]:
    accurate = any("test_accuracy" in line for line in results if line["task"] == task)
    metric = "test accuracy" if accurate else "test loss"
    targets = sorted({run.target for run in runs if run.target is not None})
    first = runs[0]
    parts = [f"## {task}, {first.steps} steps, learning rate {first.learning_rate:g}: {metric}"]

    # Only seeds that every method of a column has are compared.
    methods = list(dict.fromkeys(run.method for run in runs if run.target is not None))
    columns: dict[float, dict[str, list[Line]]] = {}
    for target in targets:
        at = {m: _lines(results, [run for run in runs if (run.method, run.target) == (m, target)]) for m in methods}
        seeds = [{line["seed"] for line in lines} for lines in at.values() if lines]
        shared = set.intersection(*seeds) if seeds else set()
        columns[target] = {m: [line for line in lines if line["seed"] in shared] for m, lines in at.items()}
    rows = ["| method | knob | " + " | ".join(f"{target:.0%} zeros" for target in targets) + " |"]
    rows.append("|---|---|" + "---:|" * len(targets))
    for method in methods:
        chosen = dict.fromkeys(_setting(run, first) for run in runs if run.method == method and run.target is not None)
        row = [NAMES[method], "; ".join(chosen)]
        for column in columns.values():
            if not column[method]:
                row.append("not run yet")
                continue
            means = {m: _mean(lines, accurate) for m, lines in column.items() if lines}
            top = means[method] == (max if accurate else min)(means.values())
            cell = _summary(column[method], accurate)
            row.append(f"**{cell}**" if top and len(means) > 1 else cell)
        rows.append("| " + " | ".join(row) + " |")
    dense = _lines(results, [run for run in runs if run.method == "dense"])
    if dense:
        parts.append(f"Dense AdamW: {_summary(dense, accurate)}.")
    parts.append("\n".join(rows))

    free = [run for run in runs if run.target is None and run.method != "dense"]
    if any(_lines(results, [run]) for run in free):
        rows = ["| method that cannot be asked | knob | zeros | " + metric + " |", "|---|---:|---:|---:|"]
        for method, knob in dict.fromkeys((run.method, run.knob) for run in free):
            lines = _lines(results, [run for run in free if (run.method, run.knob) == (method, knob)])
            if lines:
                zeros = statistics.mean(line["sparsity"] for line in lines)
                rows.append(f"| {NAMES[method]} | {knob:g} | {zeros:.1%} | {_summary(lines, accurate)} |")
        parts.append("\n".join(rows))
    return parts


def _setting(run: Run, first: Run) -> str:
    """The knob of a run, and its learning rate if that differs from the dense model's."""
    parts = [] if run.knob is None else [run.knob if isinstance(run.knob, str) else f"{run.knob:g}"]
    if run.learning_rate != first.learning_rate:
        parts.append(f"learning rate {run.learning_rate:g}")
    return ", ".join(parts)


def _begun(results: Sequence[Line], runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The tasks with at least one reported result, and all of their runs."""
    tasks = {task: [run for run in runs if run.task == task] for task in dict.fromkeys(run.task for run in runs)}
    return {task: reported for task, reported in tasks.items() if _lines(results, reported)}


def _lines(results: Sequence[Line], runs: Sequence[Run]) -> list[Line]:
    wanted = [asdict(run) for run in runs]
    return [line for line in results if any(all(line[k] == v for k, v in run.items()) for run in wanted)]


def _scores(lines: Sequence[Line], accurate: bool) -> list[float]:
    return [line["test_accuracy" if accurate else "test_loss"] for line in lines]


def _mean(lines: Sequence[Line], accurate: bool) -> float:
    return statistics.mean(_scores(lines, accurate))


def _summary(lines: Sequence[Line], accurate: bool) -> str:
    scores = _scores(lines, accurate)
    show = (lambda value: f"{value:.2%}") if accurate else (lambda value: f"{value:.4f}")
    seeds = f", {len(scores)} seeds: {show(min(scores))} to {show(max(scores))}" if len(scores) > 1 else ", 1 seed"
    return show(statistics.mean(scores)) + seeds


def draw(results: Sequence[Line], runs: Sequence[Run], path: Path) -> None:
    """Draw the score against the sparsity, a panel a task and a line a method, with the spread over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = _begun(results, runs)
    if not tasks:
        return
    # A task with one target has no line to show beside others that have several.
    several = {task: made for task, made in tasks.items() if len({run.target for run in made if run.target}) > 1}
    tasks = several or tasks
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(6.5 * len(tasks), 4.6), squeeze=False)
    for axis, (task, reported) in zip(axes[0], tasks.items(), strict=True):
        key = (
            "test_accuracy" if any("test_accuracy" in line for line in results if line["task"] == task) else "test_loss"
        )
        for number, method in enumerate(NAMES):
            points = []
            settings = dict.fromkeys(replace(run, seed=0) for run in reported if run.method == method)
            for setting in settings:
                same = [run for run in reported if replace(run, seed=0) == setting]
                lines = _lines(results, same)
                if lines:
                    scores = [line[key] for line in lines]
                    zeros = statistics.mean(line["sparsity"] for line in lines)
                    points.append((zeros, statistics.mean(scores), min(scores), max(scores)))
            points.sort()
            if not points:
                continue
            zeros_, mean, low, high = (list(values) for values in zip(*points, strict=True))
            color = f"C{number % 10}"
            if method == "dense":
                axis.axhline(mean[0], color="gray", linestyle=":", label=NAMES[method])
                continue
            spread = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
            axis.errorbar(
                [100 * value for value in zeros_],
                mean,
                yerr=spread,
                color=color,
                label=NAMES[method],
                marker="o" if method in OURS else ".",
                linewidth=2.4 if method in OURS else 1.2,
                linestyle="--" if method in ("pdecay_fixed", "torchao_lasso") else "-",
                capsize=2,
            )
        healed = [line[key] for run in reported if run.method != "one_shot_unhealed" for line in _lines(results, [run])]
        if key == "test_loss" and healed:
            margin = 0.05 * (max(healed) - min(healed))
            axis.set_ylim(min(healed) - margin, max(healed) + margin)  # runs without healing lie far above
        left, right = axis.get_xlim()
        if right - left < 1:  # one target
            axis.set_xlim(left - 1, right + 1)
        axis.set_xlabel("exact zeros in the pruned weights, %")
        axis.set_ylabel(key.replace("_", " "))
        axis.set_title(task)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
