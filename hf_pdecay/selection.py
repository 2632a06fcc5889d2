"""Which weights are the least salient: exact order statistics over many tensors, without sorting them all.

A sample of the scores brackets the one that is asked for; one look at all of them counts what lies below the bracket
and gathers the few that lie in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


# Weights looked at at a time, which bounds the temporaries; on a CPU they stay in the cache between operations.
_CPU_CHUNK = 1 << 16
_DEVICE_CHUNK = 1 << 22
_SAMPLE = 1 << 15

# Second moment of weights that never had a gradient: by it they rank below all others, and yet by their magnitudes.
_LEAST = 1e-30
# A power of 2 that makes the root of it more than 1, so that no weight but 0 has the score 0.
_SCALE = 2.0**26


class Ranked(NamedTuple):
    """A tensor of weights, ranked by |w| v^(1/4), or by |w| alone.

    Attributes:
        weight: Weights of any shape and floating dtype.
        exp_avg_sq: Adam's second moment v of the same shape, or None.
    """

    weight: Tensor
    exp_avg_sq: Tensor | None = None


@dataclass(frozen=True)
class Cut:
    """The k least scores among some weights.

    Args:
        score: The largest of them.
        ties: How many of the scores equal to it belong to the k.
        equal: How many are equal to it in all.
    """

    score: float
    ties: int
    equal: int


class Ranking:
    """The scores of some weights.

    Args:
        tensors: The weights, at least one in all, and unchanged as long as this is used.
    """

    def __init__(self, tensors: Sequence[Ranked]) -> None:
        self._tensors = [_flat(each) for each in tensors]
        self._dtype = _score_dtype(tensors)
        self.numel = sum(each.weight.numel() for each in tensors)
        self._sample = self._take_sample().nan_to_num(nan=math.inf)

    def rank(self, fraction: float) -> int:
        """Return how many weights this fraction of them is."""
        return min(max(round(fraction * self.numel), 0), self.numel)

    def quantile(self, fraction: float) -> float:
        """Return a score that about this fraction of a sample of some 32,768 weights does not exceed.

        Args:
            fraction: In [0, 1].
        """
        return float(self._sample[min(int(fraction * len(self._sample)), len(self._sample) - 1)])

    def least(self, count: int) -> Cut:
        """Find the ``count`` least scores, exactly.

        Args:
            count: In [1, number of weights].
        """
        size = len(self._sample)
        at = count / self.numel * size
        margin = 6 * (at * (1 - at / size)) ** 0.5 + 6
        while True:
            first, last = int(at - margin), int(at + margin)
            low = float(self._sample[first]) if first > 0 else 0.0
            high = float(self._sample[last]) if last < size else math.inf
            below, inside = self._between(low, high)
            if low == 0 and count <= below:
                return Cut(0.0, ties=count, equal=below)
            if below < count <= below + len(inside):
                break
            if first <= 0 and last >= size:  # NaN is in no bracket
                count = below + len(inside)
                break
            margin *= 4
        if count == below:
            return Cut(low, ties=below, equal=below)
        score = inside.kthvalue(count - below).values
        smaller, equal = int((inside < score).sum()), int((inside == score).sum())
        return Cut(float(score), ties=count - below - smaller, equal=equal)

    def _take_sample(self) -> Tensor:
        """Scores at even distances through all tensors, sorted."""
        stride = max(1, self.numel // _SAMPLE)
        stride += stride > 1 and stride % 2 == 0  # no column of a matrix of even width comes up time and again
        taken, place = [], 0
        for weight, exp_avg_sq in self._tensors:
            first = -place % stride
            some = None if exp_avg_sq is None else exp_avg_sq[first::stride]
            taken.append(scores(Ranked(weight[first::stride], some), self._dtype))
            place += weight.numel()
        return torch.cat([each.to(taken[0].device) for each in taken]).sort().values.cpu()

    def _between(self, low: float, high: float) -> tuple[int, Tensor]:
        """How many scores do not exceed ``low``, and those that do but do not exceed ``high``."""
        counts: list[Tensor] = []
        inside: list[Tensor] = []
        for tensor in self._tensors:
            for piece in _pieces(tensor):
                score = scores(piece, self._dtype)
                below = score <= low
                counts.append(below.sum())
                inside.append(score[below ^ (score <= high)])
        device = counts[0].device
        below = torch.stack([each.to(device) for each in counts]).sum()
        return int(below), torch.cat([each.to(device) for each in inside])


def scores(tensor: Ranked, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what is in proportion to |w| v^(1/4), or |w| where there is no v; 0 for weights of 0 and no others.

    Args:
        tensor: The weights.
        dtype: What the scores are computed in: float32, in which numbers of lower precision are what they are, or
            float64.
    """
    magnitude = tensor.weight.to(dtype).abs()
    if tensor.exp_avg_sq is None:
        return magnitude
    return (tensor.exp_avg_sq.to(dtype) + _LEAST).sqrt_().sqrt_().mul_(_SCALE).mul_(magnitude)


@torch.no_grad()
def zero_least(tensors: Sequence[Ranked], cut: Cut) -> None:
    """Set the weights of a cut to 0, in place.

    Of those that are equal in score, many in low precision, it takes as many as belong to the cut, evenly spread.

    Args:
        tensors: The tensors that the cut was found in, unchanged since.
        cut: What :meth:`Ranking.least` returned.
    """
    if cut.score == 0:
        return
    seen, dtype = 0, _score_dtype(tensors)
    for tensor in tensors:
        flat = _flat(tensor)
        for piece in _pieces(flat):
            score = scores(piece, dtype)
            if cut.ties == cut.equal:
                piece.weight.masked_fill_(score <= cut.score, 0)
                continue
            equal = score == cut.score
            number = equal.cumsum(0) + seen
            seen += int(equal.sum())
            # The n-th of them is taken where the share of n goes over the next whole number.
            taken = equal & (number * cut.ties // cut.equal > (number - 1) * cut.ties // cut.equal)
            piece.weight.masked_fill_(taken | (score < cut.score), 0)
        if flat.weight.data_ptr() != tensor.weight.data_ptr():
            tensor.weight.copy_(flat.weight.view(tensor.weight.shape))


def _score_dtype(tensors: Sequence[Ranked]) -> torch.dtype:
    """The dtype in which all of some weights are compared: float64 where there is any of it, else float32."""
    doubles = any(each.weight.dtype == torch.float64 for each in tensors)
    return torch.float64 if doubles else torch.float32


def _flat(tensor: Ranked) -> Ranked:
    return Ranked(*(None if each is None else each.detach().reshape(-1) for each in tensor))  # type: ignore[arg-type]


def _pieces(flat: Ranked) -> Iterator[Ranked]:
    size = _CPU_CHUNK if flat.weight.is_cpu else _DEVICE_CHUNK
    for start in range(0, flat.weight.numel(), size):
        yield Ranked(*(None if each is None else each[start : start + size] for each in flat))  # type: ignore[arg-type]
