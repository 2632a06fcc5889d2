"""Which codes a quantised matrix may have, and the scales by which they come closest to its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import is_number
from ..storage.codes import code_range


BLOCK = 128
WIDTHS = (8, 7, 6, 5, 4, 3, 2, 1.58)
_RATIOS = 24  # scales that are tried, for each sign
_FEWEST = 0.2  # of the scale at which nothing is clipped, the least that is tried


def check_bits(bits: float) -> float:
    """Return a valid width of codes; raise ValueError for another."""
    if not is_number(bits) or bits not in WIDTHS:
        raise ValueError(f"Invalid bits: bits={bits!r}; it must be one of {', '.join(map(str, WIDTHS))}.")
    return bits


def check_block(block: object) -> int:
    """Return a valid number of inputs that share a scale; raise ValueError for another."""
    if type(block) is not int or block < 8:
        raise ValueError(f"Invalid block: block={block!r}; it must be a whole number of at least 8, such as 128.")
    return block


def find_scales(blocks: Tensor, bits: float, dtype: torch.dtype, importance: Tensor | None = None) -> Tensor:
    """Return the scale of each block by which rounding to nearest has the least squared error, of those tried.

    A scale may be negative: with it the lowest code, which has no counterpart, is the largest number. It has so few
    significant bits that its product with any code is exact in ``dtype``.

    Args:
        blocks: Weights in float32 or float64 of shape (..., block).
        bits: Width of the codes.
        dtype: That of the quantised weights.
        importance: What the squared error of each weight is multiplied by, in a shape that fits; None for 1.

    Returns:
        Scales of shape (...); 1 for a block of zeros only.
    """
    low, high = code_range(bits)
    largest = blocks.abs().amax(-1)
    best, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for ratio in (high / -low, *torch.linspace(1, max(1 - high**-0.5, _FEWEST), _RATIOS).tolist()):
        size = _representable(largest * (ratio / high), bits, dtype)
        for scale in (size, -size) if low != -high else (size,):
            codes = (blocks / scale[..., None]).round_().clamp_(low, high)
            errors = codes.mul_(scale[..., None]).sub_(blocks).square_()
            error = (errors if importance is None else errors.mul_(importance)).sum(-1)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best.masked_fill_(largest == 0, 1)


def _representable(scales: Tensor, bits: float, dtype: torch.dtype) -> Tensor:
    """Round positive scales so that their products with all codes are numbers of a dtype, and none is infinite."""
    info, (low, high) = torch.finfo(dtype), code_range(bits)
    digits = min(round(1 - torch.tensor(info.eps).log2().item()), 16) - high.bit_length()
    mantissa, exponent = torch.frexp(scales)
    rounded = torch.ldexp((mantissa * 2**digits).round_() / 2**digits, exponent)
    rounded = rounded.clamp_(max=2.0 ** (torch.tensor(info.max).log2().floor().item() - (-low).bit_length()))
    stored = rounded.to(dtype).to(scales.dtype)  # those below the normal numbers have fewer digits
    return stored.masked_fill_(stored == 0, info.smallest_normal * info.eps)
