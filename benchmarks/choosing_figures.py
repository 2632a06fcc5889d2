"""The tables and the pictures of choosing.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quality.runs import Run, find


Line = dict[str, Any]
Grids = Mapping[str, Sequence[Run]]


def _cells(results: Sequence[Line], runs: Sequence[Run]) -> dict[tuple[float, float], Line]:
    """The results of a grid's decayed runs, by p and λ_p."""
    lines = {tuple(run.knob): find(list(results), run) for run in runs if run.knob is not None}
    return {knob: line for knob, line in lines.items() if line is not None}


def _dense(results: Sequence[Line], runs: Sequence[Run]) -> Line | None:
    return find(list(results), runs[0])


def _score(line: Line) -> str:
    return f"{line['test_accuracy']:.2%}" if "test_accuracy" in line else f"{line['test_loss']:.3f}"


def write(results: Sequence[Line], grids: Grids, path: Path) -> str:
    """Write the tables as Markdown and return them.

    Args:
        results: Lines of the results file.
        grids: Task → its runs, the dense one first.
        path: File to write.
    """
    parts = [
        "# What p and λ_p do",
        "`python benchmarks/choosing.py --data FOLDER`. A cell is the fraction of exact zeros in the decayed weights "
        "and the score on the test split, of one run with one seed. Learning rates are the same in all runs and tuned "
        "for none.",
    ]
    for task, runs in grids.items():
        cells, dense = _cells(results, runs), _dense(results, runs)
        if not cells or dense is None:
            continue
        metric = "test accuracy" if "test_accuracy" in dense else "test loss"
        parts.append(
            f"## {task}, {runs[0].steps} steps, learning rate {runs[0].learning_rate:g}: zeros, {metric}\n\n"
            f"Dense AdamW: {_score(dense)}."
        )
        lambdas = sorted({knob[1] for knob in cells})
        rows = ["| p | " + " | ".join(f"λ_p = {lam:g}" for lam in lambdas) + " |", "|---|" + "---:|" * len(lambdas)]
        for p_norm in sorted({knob[0] for knob in cells}):
            row = [f"{p_norm:g}"]
            for lam in lambdas:
                line = cells.get((p_norm, lam))
                row.append("not run yet" if line is None else f"{line['sparsity']:.1%}, {_score(line)}")
            rows.append("| " + " | ".join(row) + " |")
        parts.append("\n".join(rows))
    if results:
        versions = sorted({", ".join(f"{k} {v}" for k, v in line["versions"].items()) for line in results})
        hours = sum(line["seconds"] for line in results) / 3600
        parts.append(f"{len(results)} runs, {hours:.1f} hours on one CPU core each. {'; '.join(versions)}.")
    text = "\n\n".join(parts) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return text


def draw(results: Sequence[Line], grids: Grids, folder: Path) -> None:
    """Draw a heat map for each task, and for the first the spread of the weights and where the zeros are."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for task, runs in grids.items():
        cells, dense = _cells(results, runs), _dense(results, runs)
        if cells and dense is not None:
            _heat_map(cells, dense, task, folder / f"choosing_{task}.png")
    cells = _cells(results, next(iter(grids.values())))
    if cells:
        _histograms(cells, folder / "choosing_weights.png")
        _layers(cells, folder / "choosing_layers.png")


def _heat_map(cells: Mapping[tuple[float, float], Line], dense: Line, task: str, path: Path) -> None:
    from matplotlib import pyplot

    accurate = "test_accuracy" in dense
    p_norms, lambdas = sorted({knob[0] for knob in cells}), sorted({knob[1] for knob in cells})

    def values(value: Any) -> list[list[float]]:
        return [[value(cells[p, lam]) if (p, lam) in cells else math.nan for lam in lambdas] for p in p_norms]

    zeros = values(lambda line: 100 * line["sparsity"])
    key = "test_accuracy" if accurate else "test_loss"
    scores = values(lambda line: (line[key] - dense[key]) * (100 if accurate else 1))
    span = (-5.0, 0.5) if accurate else (-0.1, 0.5)
    panels = [
        ("exact zeros, %", zeros, "viridis", (0.0, 100.0), "{:.0f}"),
        (
            f"{key.replace('_', ' ')}, difference to dense",
            scores,
            "RdYlGn" if accurate else "RdYlGn_r",
            span,
            "{:+.2f}",
        ),
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6))
    for axis, (title, panel, colors, limits, form) in zip(axes, panels, strict=True):
        image = axis.imshow(panel, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto", origin="lower")
        axis.set_xticks(range(len(lambdas)), [f"{lam:g}" for lam in lambdas])
        axis.set_yticks(range(len(p_norms)), [f"{p:g}" for p in p_norms])
        axis.set_xlabel("λ_p")
        axis.set_ylabel("p")
        axis.set_title(f"{task}: {title}", fontsize=10)
        for row, line in enumerate(panel):
            for column, value in enumerate(line):
                red, green, blue, _ = image.cmap(image.norm(value))
                ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
                axis.text(column, row, form.format(value), ha="center", va="center", fontsize=8, color=ink)
        figure.colorbar(image, ax=axis)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _nearest(cells: Mapping[tuple[float, float], Line], p_norm: float, sparsity: float) -> tuple[float, Line]:
    """The λ_p whose run with this p came nearest to a sparsity, and the result of that run."""
    lines = {knob[1]: line for knob, line in cells.items() if knob[0] == p_norm}
    best = min(lines, key=lambda lam: abs(lines[lam]["sparsity"] - sparsity))
    return best, lines[best]


def _histograms(cells: Mapping[tuple[float, float], Line], path: Path) -> None:
    """Weights by magnitude, for each p at the λ_p that comes nearest to half zeros, or at 0.03 if p gives no zeros."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.4))
    for number, p_norm in enumerate(p for p in (0.4, 0.8, 1.0, 1.2, 1.5, 2.0) if any(knob[0] == p for knob in cells)):
        lam, line = _nearest(cells, p_norm, 0.5) if p_norm < 1.2 else (0.03, cells[p_norm, 0.03])
        counts = line["weights"]["counts"]
        edges = line["weights"]["edges"]
        total = sum(counts) + line["weights"]["zeros"]
        axis.stairs(
            [100 * count / total for count in counts],
            edges,
            label=f"p = {p_norm:g}, λ_p = {lam:g}: {line['weights']['zeros'] / total:.0%} zeros",
            color=f"C{number}",
            linewidth=1.6,
        )
    axis.set_xlabel("log10 of the magnitude of the weights that are not zero (the first bin holds all smaller ones)")
    axis.set_ylabel("% of the decayed weights")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _layers(cells: Mapping[tuple[float, float], Line], path: Path) -> None:
    """Zero weights, rows and columns of each matrix, at p = 0.8 and about 80% zeros."""
    from matplotlib import pyplot

    lam, line = _nearest(cells, 0.8, 0.8)
    names = list(line["layers"])
    figure, axis = pyplot.subplots(figsize=(9, 4.8))
    width = 0.27
    for offset, (key, label) in enumerate(
        {"sparsity": "weights", "rows": "whole rows", "columns": "whole columns"}.items()
    ):
        positions = [index + (offset - 1) * width for index in range(len(names))]
        axis.bar(positions, [100 * line["layers"][name][key] for name in names], width, label=label)
    axis.set_xticks(range(len(names)), [_short(name) for name in names], rotation=60, ha="right", fontsize=8)
    axis.set_ylabel("zero, %")
    axis.set_title(f"p = 0.8, λ_p = {lam:g}: {line['sparsity']:.0%} zeros", fontsize=10)
    axis.set_ylim(0, 115)
    axis.legend(fontsize=8, loc="upper left", ncols=3)
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _short(name: str) -> str:
    return name.removeprefix("transformer.").removesuffix(".weight")
