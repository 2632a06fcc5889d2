"""The kinds of unit that the key ``group`` of rules and param groups may name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


ELEMENT = "element"

UNIT_KINDS = ("row", "column", "neuron", "head", "rank")

KINDS = f"{ELEMENT}, {', '.join(UNIT_KINDS)}, or N:M such as 2:4"

_N_OF_M = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")


def kind_of(group: Mapping[str, Any]) -> str:
    """Return the kind of unit of a param group: ``"element"``, a kind of :data:`UNIT_KINDS`, or N:M."""
    kind: str = group.get("group", ELEMENT)
    return kind


def n_of_m(kind: str) -> tuple[int, int] | None:
    """Return N and M of ``"N:M"``, or None for another kind. Raises a ValueError for an unknown or invalid kind."""
    match = _N_OF_M.fullmatch(kind) if isinstance(kind, str) else None
    if match is None:
        if kind != ELEMENT and kind not in UNIT_KINDS:
            raise ValueError(f"Invalid group: group={kind!r}; it must be one of {KINDS}.")
        return None
    n, m = int(match[1]), int(match[2])
    if n >= m:
        raise ValueError(f"Invalid group: group={kind!r}; of N:M, N weights of M stay, so N must be below M: 2:4.")
    return n, m
