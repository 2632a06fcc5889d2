"""The picture of a run: sparsity by step and by layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..files import written_aside


# More rows than this cannot be labelled legibly, so only every n-th is.
_LABELLED_ROWS = 40


def plot_sparsity(history: Sequence[dict[str, Any]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw sparsity over the steps: the total as a line, and each tensor as a row of a heat map.

    Args:
        history: Lines of ``sparsity.jsonl``, with ``step``, ``sparsity``, ``model_sparsity`` and ``layers``, a mapping
            of tensor name → sparsity. Those of a run with a base have ``delta``: then the heat map is of unchanged
            weights, and a line of zeros is there if any weights decay to zero.
        path: Where the PNG goes.
        title: Heading of the picture.

    Raises:
        ValueError: If the history is empty.
    """
    if not history:
        raise ValueError("plot_sparsity: history is empty; it takes at least one line of sparsity.jsonl.")
    import numpy
    from matplotlib.figure import Figure

    steps = [line["step"] for line in history]
    to_base = "delta" in history[-1]
    drawn = [line.get("delta", {"layers": {}}) if to_base else line for line in history]
    what = "unchanged weights" if to_base else "exact zeros"
    names = list(drawn[-1]["layers"])
    rows = max(len(names), 1)
    heat_height = min(0.22 * rows + 0.8, 14)
    figure = Figure(figsize=(9, 2.6 + heat_height), layout="constrained")
    line_axes, heat_axes = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, heat_height])

    marker = "o" if len(steps) < 3 else None
    keys = ("unchanged", "model_unchanged") if to_base else ("sparsity", "model_sparsity")
    lines: list[tuple[Sequence[dict[str, Any]], str, str, str, str]]
    lines = [(drawn, keys[0], "decayed", "-", "#1f4e9c"), (drawn, keys[1], "whole model", "--", "#8a8a8a")]
    if to_base and history[-1]["layers"]:
        lines.append((history, "sparsity", "exact zeros of others", ":", "#b5542a"))
    for source, key, label, style, color in lines:
        percent = [100 * line.get(key, numpy.nan) for line in source]
        line_axes.plot(steps, percent, color=color, linestyle=style, marker=marker, label=label)
    line_axes.set_ylim(-2, 102)
    line_axes.set_ylabel(f"{what} (%)")
    line_axes.grid(alpha=0.3)
    line_axes.legend(loc="best", frameon=False)
    line_axes.set_title(title or f"{what.capitalize()} by step and by layer")

    # A cell reaches from the log event before it to its own.
    before = min(2 * steps[0] - steps[1], steps[0] - 1) if len(steps) > 1 else steps[0] - 1
    edges = numpy.array([before, *steps], dtype=float)
    values = numpy.array([[100 * line["layers"].get(name, numpy.nan) for line in drawn] for name in names])
    cells = values.reshape(len(names), len(steps))
    mesh = heat_axes.pcolormesh(edges, numpy.arange(len(names) + 1), cells, cmap="viridis", vmin=0, vmax=100)
    stride = -(-rows // _LABELLED_ROWS)
    heat_axes.set_yticks([row + 0.5 for row in range(0, len(names), stride)], names[::stride], fontsize=7)
    heat_axes.invert_yaxis()
    heat_axes.set_xlabel("step")
    figure.colorbar(mesh, ax=heat_axes, label=f"{what} (%)")
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
