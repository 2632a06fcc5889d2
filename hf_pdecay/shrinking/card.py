"""Corrects a run's report and card once the model beside them is smaller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..sparsity.card_text import add_note, set_sparsity
from ..sparsity.file_names import CARD_FILE, REPORT_FILE
from ..sparsity.report import SparsityReport
from .report import ShrinkReport


def recount(
    folder: Path,
    report: ShrinkReport,
    removed: str,
    count: Callable[[SparsityReport], SparsityReport],
    loading: str = "",
) -> None:
    """Count the zeros of the smaller model, and say in its card that the counts there are those of the larger one.

    ``count`` counts the zeros, given the report of the larger model. ``removed`` says what was dead and from what it
    was removed, ``loading`` how to load the model if it needs more than ``from_pretrained``. Without a report and a
    card in the folder, nothing is written.
    """
    sparsity = None
    if (folder / REPORT_FILE).is_file():
        counted = count(SparsityReport.load(folder / REPORT_FILE))
        counted.save(folder / REPORT_FILE)
        sparsity = counted.sparsity
    card = folder / CARD_FILE
    if not card.is_file():
        return
    before, left = report.parameters
    note = (
        f"`hf-pdecay shrink` has removed dead {removed}: {left:,} of {before:,} parameters are left.{loading}\n"
        f"The counts below are those of the larger model; `{REPORT_FILE}` counts this one."
    )
    card.write_text(add_note(set_sparsity(card.read_text(encoding="utf-8"), sparsity), note), encoding="utf-8")
