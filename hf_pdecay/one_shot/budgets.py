"""How many zeros each matrix gets of those that several share: where a zero costs least."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .selection import spread


# Non-negative float32 numbers have the order of their bits: the first 16 tell them apart to 0.8%.
_BITS = 16
_BINS = 1 << (32 - _BITS - 1)
_MOST = 0.98  # of a matrix, or of it what is asked for: one without weights would pass nothing on


def histogram(costs: Tensor) -> Tensor:
    """Return how many of some non-negative numbers lie in each bin, from the least to the greatest."""
    bits = costs.float().reshape(-1).view(torch.int32) >> _BITS
    return torch.bincount(bits, minlength=_BINS).int().cpu()  # 128 kB for each of what may be thousands of experts


def divide(total: int, histograms: Sequence[Tensor]) -> list[int]:
    """Divide zeros over matrices: in all of them the weights of least cost go, but at most 98% of a matrix.

    Args:
        total: Number of zeros.
        histograms: Of the costs of each matrix's weights, by :func:`histogram`.

    Returns:
        The number of zeros of each; they add up to the total.
    """
    sizes = [int(counts.sum()) for counts in histograms]
    share = max(_MOST, total / max(sum(sizes), 1))
    # What costs nothing has its place: it may be zero already.
    limits = [max(math.ceil(share * size), int(counts[0])) for size, counts in zip(sizes, histograms, strict=True)]
    parts, free, left = [0] * len(sizes), list(range(len(sizes))), total
    while free:
        wanted = _cheapest(left, [histograms[part] for part in free])
        for part, count in zip(free, wanted, strict=True):
            parts[part] = min(count, limits[part])
        full = [part for part, count in zip(free, wanted, strict=True) if count > limits[part]]
        if not full:
            break
        left -= sum(limits[part] for part in full)
        free = [part for part in free if part not in full]
    return parts


def _cheapest(total: int, histograms: Sequence[Tensor]) -> list[int]:
    """How many of the cheapest weights of all lie in each matrix; those in the last bin go in proportion."""
    every = torch.zeros(_BINS, dtype=torch.int64)
    for counts in histograms:
        every += counts
    last = int(torch.searchsorted(every.cumsum(0), total))
    if last >= _BINS:
        return [int(counts.sum()) for counts in histograms]
    inside = [int(counts[last]) for counts in histograms]
    before = [int(counts[:last].sum()) for counts in histograms]
    return [one + more for one, more in zip(before, spread(total - sum(before), inside), strict=True)]
