"""What a run has left beside a model, once it is a smaller one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..sparsity.counting import SparsityReport
from .report import ShrinkReport


SPARSITY = "sparsity.json"
_CARD, _HEADING = "README.md", "## Sparsity\n\n"


def note_in_card(folder: Path, report: ShrinkReport, what: str, loading: str = "") -> None:
    """Say in a card of ours that its counts are those of the model before; its header has those of the smaller one.

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
    text = _with_own_sparsity(card.read_text(encoding="utf-8"), folder)
    note = (
        f"`hf-pdecay shrink` has cut dead {what}: {left:,} of {before:,} parameters are left.{loading}\n"
        "What follows counts the model before; `sparsity.json` counts this one."
    )
    card.write_text(text.replace(_HEADING, f"{_HEADING}{note}\n\n", 1), encoding="utf-8")


def _with_own_sparsity(card: str, folder: Path) -> str:
    """Return a card whose model-index has the sparsity that the folder's report counts, or none without a report."""
    import yaml

    header = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    own = SparsityReport.load(folder / SPARSITY).sparsity if (folder / SPARSITY).is_file() else None
    changed = False
    try:
        metadata: Any = yaml.safe_load(header[1]) if header else None
        for model in metadata["model-index"]:
            for result in model["results"]:
                for metric in [each for each in result["metrics"] if each["type"] == "sparsity"]:
                    changed = True
                    if own is None:
                        result["metrics"].remove(metric)
                    else:
                        metric["value"] = own
            model["results"] = [each for each in model["results"] if each["metrics"]]
    except (yaml.YAMLError, LookupError, TypeError):
        return card  # without a header that has a model-index as the Hub knows it
    if header is None or not changed:
        return card
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{card[header.end() :]}"
