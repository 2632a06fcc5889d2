"""Editing a card, ``README.md``: its YAML header, and the sections and notes that this package adds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


# Comments around the section that is added to a card of another library.
_BEGIN, _END = "<!-- hf_pdecay -->", "<!-- /hf_pdecay -->"
_SECTION = re.compile(f"{_BEGIN}.*?{_END}\n?", flags=re.DOTALL)
_HEADER = re.compile(r"---\n(.*?)\n---\n", flags=re.DOTALL)
_HEADING = "## Sparsity\n\n"


def split_card(card: str) -> tuple[Any, str]:
    """Return the metadata in a card's YAML header (else None) and the Markdown after it; may raise yaml.YAMLError."""
    import yaml

    header = _HEADER.match(card)
    return (yaml.safe_load(header[1]), card[header.end() :]) if header else (None, card)


def join_card(metadata: Any, body: str) -> str:
    """Return a card with a YAML header."""
    import yaml

    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{body}"


def add_section(card: str, section: str) -> str:
    """Return a card of another library with a section at its end; it replaces one that was added before."""
    return f"{_SECTION.sub('', card).rstrip()}\n\n{_BEGIN}\n{section}\n{_END}\n"


def add_tags(card: str, tags: Iterable[str]) -> str:
    """Return a card with tags added to its own."""
    metadata, body = split_card(card)
    metadata = metadata or {}
    before = metadata.get("tags") or []
    metadata["tags"] = list(dict.fromkeys([*([before] if isinstance(before, str) else before), *tags]))
    if "base_model" in metadata and not metadata["base_model"]:
        del metadata["base_model"]  # PEFT writes an empty name if there is none
    return join_card(metadata, body)


def add_note(card: str, note: str) -> str:
    """Return a card with a note at the beginning of its section on sparsity."""
    return card.replace(_HEADING, f"{_HEADING}{note}\n\n", 1)


def set_sparsity(card: str, sparsity: float | None) -> str:
    """Return a card with another sparsity, or none, in its model-index; unchanged if it has no valid model-index."""
    import yaml

    changed = False
    try:
        metadata, body = split_card(card)
        for model in metadata["model-index"]:
            for result in model["results"]:
                for metric in [metric for metric in result["metrics"] if metric["type"] == "sparsity"]:
                    changed = True
                    if sparsity is None:
                        result["metrics"].remove(metric)
                    else:
                        metric["value"] = sparsity
            model["results"] = [result for result in model["results"] if result["metrics"]]
    except (yaml.YAMLError, LookupError, TypeError):
        return card
    return join_card(metadata, body) if changed else card
