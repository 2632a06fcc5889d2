"""The codes that a width offers, and how the scale of a block of weights is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checks import is_number


BLOCK = 128
"""Weights along the inputs of a matrix that share a scale."""

WIDTHS = (8, 4, 2, 1.58, 1)
"""The widths that are offered; 1.58, the binary logarithm of 3, is for the codes -1, 0 and 1."""


@dataclass(frozen=True)
class Grid:
    """The codes of a width: whole numbers from ``low`` to ``high``.

    Args:
        low: The least code.
        high: The largest code.
        affine: Whether blocks have an offset beside a scale. Without one, code 0 stands for 0, and a weight of 0 has
            it.
        step: Distance of two codes, in root mean squares of a block's non-zero weights (standard deviations with an
            offset). None for a distance at which the block's largest weight has the last code.
        odd: Whether the codes are the odd numbers alone, with 0 for weights of exactly 0.
        nonzero: Whether only weights of exactly 0 have code 0; others next to it have -1 or 1.
    """

    low: int
    high: int
    affine: bool = False
    step: float | None = None
    odd: bool = False
    nonzero: bool = False

    @property
    def middle(self) -> float:
        """The middle of the codes."""
        return (self.low + self.high) / 2


def grid_of(width: float, *, sparse: bool = False, exact: bool = False) -> Grid:
    """Return the codes of a width.

    Args:
        width: One of :data:`WIDTHS`.
        sparse: Whether weights are made zero and must stay so. Without that, 4, 2 and 1 bits have an offset.
        exact: Whether at 8 and 4 bits no other weight may have the code of a zero.
    """
    if width == 1.58:
        return Grid(-1, 1, step=0.8)
    levels = 2 ** int(width)
    if sparse and width in (1, 2):
        return Grid(1 - levels, levels - 1, step={1: 1.0, 2: 0.498}[int(width)], odd=True)
    if sparse or width == 8:
        return Grid(1 - levels // 2, levels // 2 - 1, nonzero=sparse and exact)
    return Grid(0, levels - 1, affine=True, step={1: 1.596, 2: 0.9957}.get(int(width)))


def check_width(width: Any, name: str) -> float:
    """Return a width as a number; ValueError, with the name of the setting, if it is not offered."""
    if not is_number(width) or width not in WIDTHS:
        offered = ", ".join(map(str, WIDTHS))
        raise ValueError(f"Invalid {name}: {name}={width!r}; it must be one of {offered}.")
    return float(width)
