"""The figure of the times of a step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contenders import USUAL_P


# Longer bars, in multiples of the baseline, are truncated, so that bars near the baseline stay distinguishable.
_LIMIT = 10.0
_COLORS = {"AdamWLp": "#1f4e9c", "torch": "#8a8a8a", "rival": "#c8702a"}


def kind_of(row: Mapping[str, Any]) -> str:
    """Return the origin of a row's optimizer."""
    if row["name"].startswith(("AdamWLp", "LpDecay")):
        return "AdamWLp"
    return "torch" if row["name"].startswith("torch AdamW") else "rival"


def rows_to_plot(size: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row of each kind: every p of `auto`, one p of the backends that it did not take."""
    taken = {row["took"] for row in size["rows"] if row["took"]}
    return [
        row
        for row in size["rows"]
        if row["backend"] in (None, "auto") or (row["p_norm"] == USUAL_P and row["backend"] not in taken)
    ]


def plot_speed(record: Mapping[str, Any], path: Path, size_name: str = "25M") -> None:
    """Draw the ratio to fused AdamW of each row as a bar, with the spread between rounds.

    Args:
        record: What `step_speed.py` wrote as JSON.
        path: Where the PNG goes.
        size_name: Which size; the first of the record if it does not have that.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    sizes = {size["name"]: size for size in record["sizes"]}
    size = sizes.get(size_name) or next(iter(sizes.values()))
    rows = rows_to_plot(size)
    limit = min(_LIMIT, 1.1 * max(row["ratio"]["median"] for row in rows))
    figure = Figure(figsize=(8.2, 1.3 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        ratio = row["ratio"]
        middle, low, high = (min(ratio[key], limit) for key in ("median", "q10", "q90"))
        axes.barh(place, middle, height=0.68, color=_COLORS[kind_of(row)])
        text = f"{ratio['median']:.2f}" if ratio["median"] < 10 else f"{ratio['median']:.0f}"
        if ratio["median"] > limit:
            axes.text(limit * 0.985, place, f"{text} »", va="center", ha="right", fontsize=8, color="white")
        else:
            axes.plot([low, high], [place, place], color="#111111", linewidth=1)
            axes.text(max(middle, high) + limit * 0.01, place, text, va="center", fontsize=8)
    axes.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, limit * 1.06)  # the last label needs room
    axes.set_xlabel("time of a step over that of torch's fused AdamW (less is better)", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    machine = record["machine"]
    cores = f", {machine['cores']} cores" if machine["device"] == "cpu" else ""
    axes.set_title(
        f"{size['weights'] / 1e6:.0f} M {size['dtype']} weights on {machine['name']}{cores}", fontsize=10, loc="left"
    )
    names = {"AdamWLp": "hf_pdecay", "torch": "torch", "rival": "others"}
    handles = [Patch(color=_COLORS[kind], label=label) for kind, label in names.items()]
    # Beside the rows of `auto`, which are short.
    axes.legend(handles=handles, loc="upper right", bbox_to_anchor=(1.0, 0.85), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
