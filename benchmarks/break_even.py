"""From which fraction of zeros a sparse layer is faster than the dense one, by the number of rows, and its picture.

    python benchmarks/break_even.py              # 3 minutes

One layer of 4096 x 4096, with other weights read in between, as in a large model. Each form takes its turn with the
dense layer; the figure is the fastest form's. The weights that are zero are drawn at random.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_pdecay.inference.bitmask_linear import BitmaskLinear
from hf_pdecay.inference.cpu_linear import CpuLinear
from hf_pdecay.inference.sparse_linear import SparseLinear
from hf_pdecay.inference.timing import speedups_of
from tables import command, conditions, describe, table, write


ROOT = Path(__file__).resolve().parent
SIZE = 4096
ROWS = (1, 4, 16, 64, 256, 1024)
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
# What each panel shows: the dtype of the dense layer, and that of the values.
PANELS: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "int8 values in float32 layers": (torch.float32, torch.int8),
}
_CACHE = 64 << 20


def measure() -> list[dict[str, Any]]:
    """Return a line for each dtype, sparsity and number of rows."""
    torch.manual_seed(0)
    others = torch.zeros(_CACHE // 4)
    drawn, full = torch.rand(SIZE, SIZE), torch.randn(SIZE, SIZE)
    lines = []
    for panel, (dtype, values) in PANELS.items():
        for sparsity in SPARSITIES:
            dense = nn.Linear(SIZE, SIZE, bias=False, dtype=dtype)
            dense.weight = nn.Parameter((full * (drawn >= sparsity)).to(dtype))
            forms: list[type[CpuLinear]] = [BitmaskLinear, SparseLinear]
            layers = [form(dense.weight, values=form.values_of(values)) for form in forms]
            for rows in ROWS:
                found = speedups_of(dense, layers, torch.randn(rows, SIZE).to(dtype), others)
                line = {"panel": panel, "sparsity": sparsity, "rows": rows}
                lines.append(line | {form.form: speedup for form, speedup in zip(forms, found, strict=True)})
            print(f"{panel}, {sparsity:.0%}: {_said(lines[-len(ROWS) :])}", file=sys.stderr, flush=True)
    return lines


def _said(lines: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{line['rows']} rows {_best(line):.2f}" for line in lines)


def _best(line: Mapping[str, Any]) -> float:
    return max(float(line["bitmask"]), float(line["csr"]))


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw the speed of the fastest form over the zeros, a line for each number of rows."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    every = figure.subplots(1, len(PANELS), sharey=True)
    shades = [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in _shades(len(ROWS))]
    for axes, panel in zip(every, PANELS, strict=True):
        for rows, shade in zip(ROWS, shades, strict=True):
            points = [
                (100 * line["sparsity"], _best(line))
                for line in record["lines"]
                if line["panel"] == panel and line["rows"] == rows
            ]
            axes.plot(*zip(*points, strict=True), color=shade, marker="o", markersize=3, label=f"{rows}")
        axes.axhline(1, color="#333333", linewidth=0.8, linestyle=":")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set_title(panel, fontsize=10, loc="left")
        axes.set_xlabel("zeros, %", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    every[0].set_ylabel("times as fast as the dense layer", fontsize=9)
    figure.legend(*every[0].get_legend_handles_labels(), title="rows", loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _shades(count: int) -> list[tuple[int, int, int]]:
    """Colours from blue to orange."""
    first, last = (0x1F, 0x4E, 0x9C), (0xE0, 0x80, 0x30)
    steps = [place / max(count - 1, 1) for place in range(count)]
    return [
        tuple(round(low + step * (high - low)) for low, high in zip(first, last, strict=True))  # type: ignore[misc]
        for step in steps
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the results")
    parser.add_argument("--figure", type=Path, default=ROOT.parent / "docs/images/break_even.png", help="its file")
    args = parser.parse_args(argv)
    record = conditions("cpu", ("torch",))
    record["command"] = command("break_even.py", sys.argv[1:] if argv is None else argv)
    with torch.no_grad():
        record["lines"] = measure()
    parts = ["# From which fraction of zeros a sparse layer is faster", describe(record)]
    for panel in PANELS:
        cells = {(line["sparsity"], line["rows"]): line for line in record["lines"] if line["panel"] == panel}
        lines = [[f"{sparsity:.0%}", *(_cell(cells[sparsity, rows]) for rows in ROWS)] for sparsity in SPARSITIES]
        parts += [f"## {panel}", table(["zeros", *(f"{rows} rows" for rows in ROWS)], lines)]
    parts.append(f"The dense layer's least time over the fastest form's, {SIZE} x {SIZE}; b: a bitmask, c: CSR.")
    report = "\n\n".join(parts)
    print(report)
    write(record, report + "\n", args.output, "break_even")
    plot(record, args.figure)
    return 0


def _cell(line: Mapping[str, Any]) -> str:
    return f"{_best(line):.2f} {'b' if line['bitmask'] >= line['csr'] else 'c'}"


if __name__ == "__main__":
    sys.exit(main())
