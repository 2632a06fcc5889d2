"""The report of a hyperparameter search: its Pareto front, drawn and as a table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tables import NameTable
from ..trainer.pareto import PARETO_FILE, SEARCH_FILE, Trial, pareto_front, plot_pareto, read_trials


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class SearchReport:
    """A hyperparameter search; prints as a table of its front.

    Args:
        trials: All trials.
        picture: The file with the drawing of the front.
    """

    trials: list[Trial]
    picture: Path

    @property
    def front(self) -> list[Trial]:
        """The trials that no other beats, by rising sparsity."""
        return pareto_front(self.trials)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        front = {trial.name for trial in self.front}
        return {
            "picture": str(self.picture),
            "trials": [{**vars(trial), "front": trial.name in front} for trial in self.trials],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table."""
        front = self.front
        names = list(dict.fromkeys(name for trial in front for name in trial.params))
        title = f"Pareto front: {len(front)} of {len(self.trials)} trials"
        table = NameTable(title, ("trial", "loss", "sparsity", *names))
        for trial in front:
            params = (trial.params.get(name, "") for name in names)
            cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in params)
            table.add_row(trial.name, f"{trial.loss:.4f}", f"{trial.sparsity:.2%}", *cells)
        yield table
        yield f"Drawn as {self.picture}"


def is_search(source: str | os.PathLike[str]) -> bool:
    """Whether a source is an optuna storage or a folder with ``search.jsonl``."""
    return _is_storage(source) or (Path(source) / SEARCH_FILE).is_file()


def report_search(source: str | os.PathLike[str]) -> SearchReport:
    """Return the report of a search and draw its ``pareto.png``; raise ValueError if no trial was evaluated.

    The picture of an optuna storage is drawn in the current folder.
    """
    trials = read_trials(source)
    if not pareto_front(trials):
        raise ValueError(f"The search in {str(source)!r} has no trial that was evaluated.")
    picture = Path(PARETO_FILE) if _is_storage(source) else Path(source) / PARETO_FILE
    plot_pareto(trials, picture)
    return SearchReport(trials, picture)


def _is_storage(source: str | os.PathLike[str]) -> bool:
    return "://" in str(source)
