"""The trials of a hyperparameter search, and their Pareto front of loss and sparsity."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import written_aside


SEARCH_FILE = "search.jsonl"
PARETO_FILE = "pareto.png"

# The file of a storage; databases in memory and those that SQLite finds by their address have none.
_SQLITE_FILE = re.compile(r"sqlite(?:\+\w+)?:///(?!:memory:|file:)([^?]+)")


@dataclass(frozen=True)
class Trial:
    """One trial of a search: ``name`` is that of its folder, ``sparsity`` that of its decayed weights, in [0, 1]."""

    name: str
    loss: float
    sparsity: float
    params: dict[str, Any] = field(default_factory=dict)


def read_trials(source: str | os.PathLike[str]) -> list[Trial]:
    """Return the trials of a search, with the last evaluation of each.

    Args:
        source: A folder with ``search.jsonl``, such a file, or an optuna storage such as ``sqlite:///search.db``, whose
            study has two objectives, one minimised (the loss) and one maximised (the sparsity).

    Raises:
        ValueError: If the search is missing, or a study has other objectives.
    """
    if "://" in str(source):
        return _of_study(str(source))
    path = Path(source) / SEARCH_FILE if Path(source).is_dir() else Path(source)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a line without an end was not finished
        entries = [json.loads(line) for line in lines]
        trials = {
            entry["trial"]: Trial(entry["trial"], float(entry["loss"]), float(entry["sparsity"]), dict(entry["params"]))
            for entry in entries
            if entry["loss"] is not None
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is not a search that hyperparameter_search wrote ({error!r}).") from error
    return list(trials.values())


def _of_study(storage: str) -> list[Trial]:
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise ValueError("Reading an optuna storage takes optuna: pip install 'hf-pdecay[search]'.") from error
    file = _SQLITE_FILE.match(storage)
    if file is not None and not Path(file[1]).is_file():  # SQLite would make it
        raise ValueError(f"The file {file[1]!r} of {storage!r} is missing; name one that a search has written.")
    try:
        names = optuna.get_all_study_names(storage)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{storage!r} is not a readable storage of optuna ({reason}).") from error
    if not names:
        raise ValueError(f"The storage {storage!r} has no study; name one that a search has written.")
    if len(names) != 1:
        raise ValueError(f"The storage {storage!r} has the studies {', '.join(names)}; it must have one.")
    study = optuna.load_study(study_name=names[0], storage=storage)
    directions = [direction.name for direction in study.directions]
    if sorted(directions) != ["MAXIMIZE", "MINIMIZE"]:
        raise ValueError(
            f"The study {study.study_name!r} has the directions {', '.join(directions).lower()}; a front of loss and "
            "sparsity takes one objective that is minimised and one that is maximised."
        )
    loss, sparsity = directions.index("MINIMIZE"), directions.index("MAXIMIZE")
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return [Trial(f"run-{trial.number}", trial.values[loss], trial.values[sparsity], trial.params) for trial in done]


def pareto_front(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials that no other beats: none is at least as good in loss and sparsity and better in one of them.

    Args:
        trials: Trials in any order; those whose loss or sparsity is NaN are left out.

    Returns:
        The front, by rising sparsity, with the first of trials that are equal in both.
    """
    front: list[Trial] = []
    finite = [trial for trial in trials if trial.loss == trial.loss and trial.sparsity == trial.sparsity]
    for trial in sorted(finite, key=lambda trial: (-trial.sparsity, trial.loss)):
        if not front or trial.loss < front[-1].loss:
            front.append(trial)
    return front[::-1]


def plot_pareto(trials: Sequence[Trial], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the trials of a search, loss over sparsity, and their front as a line.

    Args:
        trials: The trials of the search.
        path: The PNG file to write.
        title: Heading of the picture; by default the number of trials.

    Raises:
        ValueError: If ``trials`` is empty.
    """
    front = pareto_front(trials)
    if not front:
        raise ValueError("plot_pareto: trials is empty; it takes at least one with a loss and a sparsity.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    others = [trial for trial in trials if trial not in front]
    axes.scatter(*_points(others), color="#b0b0b0", label="trials")
    axes.plot(*_points(front), color="#1f4e9c", marker="o", drawstyle="steps-pre", label="Pareto front")
    for trial in front if len(front) <= 12 else ():
        point = 100 * trial.sparsity, trial.loss
        axes.annotate(trial.name, point, xytext=(-4, 5), textcoords="offset points", fontsize=8, ha="right")
    axes.set_xlabel("exact zeros in decayed weights (%)")
    axes.set_ylabel("loss")
    axes.margins(x=0.12, y=0.1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(title or f"{len(trials)} trials, {len(front)} of them on the front")
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=120, format="png")


def _points(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    return [100 * trial.sparsity for trial in trials], [trial.loss for trial in trials]
