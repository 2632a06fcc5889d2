"""What a run has left beside a model, once it is a smaller one."""

from __future__ import annotations

from pathlib import Path

from .report import ShrinkReport


SPARSITY = "sparsity.json"
_CARD, _HEADING = "README.md", "## Sparsity\n\n"


def note_in_card(folder: Path, report: ShrinkReport, what: str, loading: str = "") -> None:
    """Say in a card of ours that its counts are those of the model before.

    Args:
        folder: Of the smaller model.
        report: What was cut, with the parameters that are left.
        what: What is dead, and out of what it was cut.
        loading: A sentence on how the model loads, if not as any other.
    """
    card = folder / _CARD
    if not card.is_file():
        return
    before, left = report.parameters
    text = card.read_text(encoding="utf-8")
    note = (
        f"`hf-pdecay shrink` has cut dead {what}: {left:,} of {before:,} parameters are left.{loading}\n"
        "What follows counts the model before; `sparsity.json` counts this one."
    )
    card.write_text(text.replace(_HEADING, f"{_HEADING}{note}\n\n", 1), encoding="utf-8")
