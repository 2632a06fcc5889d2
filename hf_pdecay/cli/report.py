"""``hf-pdecay report``: the zeros of a saved model, or the Pareto front of a hyperparameter search."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from .command import add_json, show


if TYPE_CHECKING:
    from ..deltas.report import DeltaReport
    from .folder_report import FolderReport
    from .search_report import SearchReport


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Exact zeros of a model or an adapter, counted from its files one tensor at a time; in a folder "
        "with search.jsonl the trials that no other beats in loss and sparsity, drawn as pareto.png; in a folder of "
        "a delta the weights that it changes, drawn as delta.png."
    )
    parser.add_argument("folder", metavar="MODEL_OR_RUN", help="a folder, or an optuna storage such as sqlite:///x.db")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the report of a folder."""
    return show(report(options.folder), options)


def report(source: str | os.PathLike[str]) -> FolderReport | SearchReport | DeltaReport:
    """Return the report of a folder; draws ``pareto.png`` into that of a search, ``delta.png`` into that of a delta.

    Args:
        source: A folder of a model or an adapter in safetensors, of a run (its newest whole checkpoint if it has no
            model), of a delta, or of a search; or an optuna storage such as ``sqlite:///search.db``, whose picture is
            drawn into the current folder.

    Raises:
        ValueError: If the source holds neither a model nor a delta nor a search.
    """
    from ..deltas.report import is_delta, plot_delta, report_delta
    from .folder_report import report_folder
    from .search_report import is_search, report_search

    if is_delta(source):
        changes = report_delta(source)
        plot_delta(changes, os.path.join(source, "delta.png"))
        return changes
    return report_search(source) if is_search(source) else report_folder(source)
