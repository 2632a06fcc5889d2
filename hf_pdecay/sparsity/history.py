"""The file ``sparsity.jsonl``: one line of JSON for each log event of a run, what it holds and how it is read."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .file_names import HISTORY_FILE
from .report import SparsityReport


def history_line(report: SparsityReport, step: int, epoch: float | None, skipped_steps: int) -> dict[str, Any]:
    """Return the line of a step; ``layers`` has the sparsity of each decayed tensor, ``units`` of each kind of unit.

    In a run with a base, ``delta`` has the same of the unchanged weights.
    """
    delta = report.delta
    return {
        "step": step,
        "epoch": epoch,
        "sparsity": report.sparsity,
        "model_sparsity": report.model_sparsity,
        "near_zeros": report.decayed.near_zeros,
        "skipped_steps": skipped_steps,
        **_parts(report),
        **(
            {}
            if delta is None
            else {"delta": {"unchanged": delta.sparsity, "model_unchanged": delta.model_sparsity, **_parts(delta)}}
        ),
    }


def _parts(report: SparsityReport) -> dict[str, Any]:
    return {
        **({"units": {units.label: units.sparsity for units in report.units}} if report.units else {}),
        "layers": {tensor.name: tensor.sparsity for tensor in report.tensors if tensor.decayed},
    }


def read_history(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of ``sparsity.jsonl`` in a folder, without an incomplete last line, which a crash may leave."""
    path = Path(output_dir) / HISTORY_FILE
    if not path.is_file():
        return []
    # After the last newline there is nothing, or an incomplete line.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def set_history_aside(output_dir: str | os.PathLike[str]) -> Path | None:
    """Rename ``sparsity.jsonl`` to the first free ``sparsity.N.jsonl``; return the new path, or None without lines."""
    path = Path(output_dir) / HISTORY_FILE
    if not read_history(output_dir):
        return None
    names = (path.with_suffix(f".{number}{path.suffix}") for number in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


def is_history_of(lines: Sequence[dict[str, Any]], log_history: Sequence[dict[str, Any]]) -> bool:
    """Whether lines of ``sparsity.jsonl`` are of the run with a log history, as far as that tells."""
    keys = "sparsity/overall", "delta/overall"
    logged = {entry["step"]: [entry.get(key) for key in keys] for entry in log_history if entry.keys() & {*keys}}
    return not logged or all(
        line["step"] in logged
        and all(
            value in (None, own)
            for value, own in zip(
                logged[line["step"]], (line["sparsity"], line.get("delta", {}).get("unchanged")), strict=True
            )
        )
        for line in lines
    )
