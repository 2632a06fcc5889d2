"""The card of a shrunk model."""

from __future__ import annotations

from pathlib import Path

from ..sparsity.card import add_note, set_sparsity
from ..sparsity.counting import SparsityReport
from ..sparsity.file_names import CARD_FILE, REPORT_FILE
from .report import ShrinkReport


def note_in_card(folder: Path, report: ShrinkReport, removed: str, loading: str = "") -> None:
    """Say in a card that its counts are those of the larger model; its header gets the sparsity of the smaller one.

    Args:
        folder: The folder of the smaller model.
        report: What was removed, and the number of parameters.
        removed: What was dead, and from what it was removed.
        loading: A sentence on how to load the model, if it needs more than ``from_pretrained``.
    """
    card = folder / CARD_FILE
    if not card.is_file():
        return
    before, left = report.parameters
    sparsity = SparsityReport.load(folder / REPORT_FILE).sparsity if (folder / REPORT_FILE).is_file() else None
    note = (
        f"`hf-pdecay shrink` has removed dead {removed}: {left:,} of {before:,} parameters are left.{loading}\n"
        f"The counts below are those of the larger model; `{REPORT_FILE}` counts this one."
    )
    text = set_sparsity(card.read_text(encoding="utf-8"), sparsity)
    card.write_text(add_note(text, note), encoding="utf-8")
