"""Which codes a quantised matrix may have, and the scales by which they come closest to its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import is_number
from ..storage.codes import code_range


BLOCK = 128
WIDTHS = (8, 7, 6, 5, 4, 3, 2, 1.58)
_RATIOS = 24  # scales that are tried, for each sign
_MOST_DIGITS = 8  # of a scale, at most: those of bfloat16, by which a compressed file stores it
_FEWEST = 0.2  # of the scale at which nothing is clipped, the least that is tried


@dataclass(frozen=True)
class Grid:
    """Which codes and scales a quantised matrix may have.

    Args:
        bits: Width of the codes: 8 to 2, or 1.58 for -1, 0 and 1.
        block: Consecutive inputs that share a scale; the last block of a row may be shorter.
        scales: A dtype in which every scale is a number; None for that of the weights.
        by_largest: Whether the largest weight of a block has the last code and keeps it, so that the largest magnitude
            of the result over that code is the scale. Codes are as far below zero as above it then.

    Raises:
        ValueError: If ``bits`` or ``block`` is invalid.
    """

    bits: float = 4
    block: int = BLOCK
    scales: torch.dtype | None = None
    by_largest: bool = False

    def __post_init__(self) -> None:
        if not is_number(self.bits) or self.bits not in WIDTHS:
            raise ValueError(f"Invalid bits: bits={self.bits!r}; it must be one of {', '.join(map(str, WIDTHS))}.")
        if type(self.block) is not int or self.block < 8:
            raise ValueError(
                f"Invalid block: block={self.block!r}; it must be a whole number of at least 8, such as 128."
            )

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        low, high = code_range(self.bits)
        return -high if self.by_largest else low, high


def find_scales(blocks: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None = None) -> Tensor:
    """Return the scale of each block by which rounding to nearest has the least squared error, of those tried.

    A scale may be negative: with it the lowest code, which has no counterpart, is the largest number. It has so few
    significant bits that its product with any code is exact in ``dtype``.

    Args:
        blocks: Weights in float32 or float64 of shape (..., block).
        grid: The codes.
        dtype: That of the quantised weights.
        importance: What the squared error of each weight is multiplied by, in a shape that fits; None for 1.

    Returns:
        Scales of shape (...); 1 for a block of zeros only.
    """
    low, high = grid.codes
    largest = blocks.abs().amax(-1)
    best, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for ratio in (high / -low, *torch.linspace(1, max(1 - high**-0.5, _FEWEST), _RATIOS).tolist()):
        size = _representable(largest * (ratio / high), grid, dtype)
        for scale in (size, -size) if low != -high else (size,):
            codes = (blocks / scale[..., None]).round_().clamp_(low, high)
            errors = codes.mul_(scale[..., None]).sub_(blocks).square_()
            error = (errors if importance is None else errors.mul_(importance)).sum(-1)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best.masked_fill_(largest == 0, 1)


def _representable(scales: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Round positive scales so that their products with all codes are numbers of a dtype, and none is infinite."""
    own = dtype if grid.scales is None else grid.scales
    info, (low, high) = torch.finfo(own), grid.codes
    digits = min(_digits(dtype) - high.bit_length(), _digits(own), _MOST_DIGITS)
    mantissa, exponent = torch.frexp(scales)
    rounded = torch.ldexp((mantissa * 2**digits).round_() / 2**digits, exponent)
    rounded = rounded.clamp_(max=2.0 ** (torch.tensor(info.max).log2().floor().item() - (-low).bit_length()))
    stored = rounded.to(own).to(scales.dtype)  # those below the normal numbers have fewer digits
    return stored.masked_fill_(stored == 0, info.smallest_normal * info.eps)


def _digits(dtype: torch.dtype) -> int:
    """Number of binary digits of the numbers of a dtype."""
    return round(1 - torch.tensor(torch.finfo(dtype).eps).log2().item())
