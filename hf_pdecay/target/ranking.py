"""Which weights are the least salient: exact order statistics, without sorting or gathering all tensors.

What is ranked is |w|, or |w - base| of weights that decay to a base; those that go become 0, or their base.

A sample of the scores brackets the k-th least; one pass over all scores counts those below the bracket and collects the
few in it; among these the k-th is found bit by bit. Processes add up the samples and the counts of their shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from ..optim.bases import change, end_
from ..optim.distributed import Groups, total
from ..optim.shards import Ranked


# Weights that are ranked at a time: bounds the temporaries; on a CPU they stay in the cache between operations.
CPU_CHUNK = 1 << 16
DEVICE_CHUNK = 1 << 22
SAMPLE = 1 << 15
# Bits of the scores that are compared at a time.
DIGIT = 11

# Added to second moments: weights that never had a gradient rank below all others, and by their magnitudes.
_LEAST = 1e-30
# A power of 2 that lifts the fourth root of _LEAST above 1, so that only weights or changes of 0 have the score 0.
_SCALE = 2.0**26


@dataclass(frozen=True)
class Threshold:
    """The largest of the k least scores, how many equal scores belong to the k, and how many there are in all."""

    score: float
    ties: int
    equal: int


class Ranking:
    """The scores of at least one weight. The tensors must not change while the ranking is in use."""

    def __init__(self, tensors: Sequence[Ranked]) -> None:
        self._tensors = [_flat(tensor) for tensor in tensors]
        self._dtype = _score_dtype(tensors)
        self._starts, self.numel = _starts(self._tensors, [tensor.weight.numel() for tensor in self._tensors])
        self._sample = self._take_sample().nan_to_num(nan=math.inf)

    def rank(self, fraction: float) -> int:
        """Return the number of weights in a fraction of them."""
        return min(max(round(fraction * self.numel), 0), self.numel)

    def quantile(self, fraction: float) -> float:
        """Return a score that about this fraction of the scores does not exceed, by a sample of some 32,768."""
        return float(self._sample[min(int(fraction * len(self._sample)), len(self._sample) - 1)])

    def below(self, score: float) -> float:
        """Return the fraction of the sample of :meth:`quantile` that is less than a score."""
        return int(torch.searchsorted(self._sample, score)) / len(self._sample)

    def least(self, count: int) -> Threshold:
        """Find the ``count`` least scores, at least 1, exactly."""
        size = len(self._sample)
        at = count / self.numel * size
        margin = bracket_margin(at, size)
        while True:
            first, last = int(at - margin), int(at + margin)
            low = float(self._sample[first]) if first > 0 else 0.0
            high = float(self._sample[last]) if last < size else math.inf
            below, within, inside = self._between(low, high)
            if low == 0 and count <= below:
                return Threshold(0.0, ties=count, equal=below)
            if below < count <= below + within:
                break
            if first <= 0 and last >= size:  # NaN lies outside every bracket
                count = below + within
                break
            margin *= 4
        if count == below:
            return Threshold(low, ties=below, equal=below)
        return self._kth(inside, count - below)

    def _kth(self, inside: Mapping[Groups, Tensor], count: int) -> Threshold:
        """Find the ``count``-th least of the scores that processes hold, by their bits from the first to the last."""
        # Non-negative floats have the order of their bits.
        whole = torch.int64 if self._dtype == torch.float64 else torch.int32
        bits = {groups: values.view(whole) for groups, values in inside.items()}
        shift, prefix = torch.iinfo(whole).bits - 1, 0
        while shift > 0:
            width = min(DIGIT, shift)
            shift -= width
            digits = {groups: (values >> shift) & ((1 << width) - 1) for groups, values in bits.items()}
            counts = {groups: torch.bincount(values, minlength=1 << width) for groups, values in digits.items()}
            sums = total(counts).cpu().cumsum(0)
            digit = int(torch.searchsorted(sums, count))
            before = int(sums[digit - 1]) if digit else 0
            count, equal = count - before, int(sums[digit]) - before
            prefix = prefix << width | digit
            bits = {groups: values[digits[groups] == digit] for groups, values in bits.items()}
        return Threshold(float(torch.tensor(prefix, dtype=whole).view(self._dtype)), ties=count, equal=equal)

    def _take_sample(self) -> Tensor:
        """Return scores at even distances through all tensors, sorted."""
        stride = sample_stride(self.numel)
        device = self._tensors[0].weight.device
        size = -(-self.numel // stride)
        samples = {x.groups: torch.zeros(size, dtype=self._dtype, device=device) for x in self._tensors}
        for tensor, offset in zip(self._tensors, self._starts, strict=True):
            first = -offset % stride
            if first >= tensor.weight.numel():
                continue
            sample = scores(tensor.viewed(itemgetter(slice(first, None, stride))), self._dtype)
            start = (offset + first) // stride
            samples[tensor.groups][start : start + len(sample)] = sample.to(device)
        return total(samples).sort().values.cpu()

    def _between(self, low: float, high: float) -> tuple[int, int, dict[Groups, Tensor]]:
        """Return how many scores do not exceed ``low``, how many of the others not ``high``, and those held here."""
        device = self._tensors[0].weight.device
        below = {x.groups: torch.zeros((), dtype=torch.int64, device=device) for x in self._tensors}
        inside: dict[Groups, list[Tensor]] = {groups: [] for groups in below}
        for tensor in self._tensors:
            for piece in _pieces(tensor):
                score = scores(piece, self._dtype)
                under = score <= low
                below[tensor.groups] += under.sum().to(device)
                inside[tensor.groups].append(score[under ^ (score <= high)].to(device))
        empty = torch.empty(0, dtype=self._dtype, device=device)
        held = {groups: torch.cat([empty, *pieces]) for groups, pieces in inside.items()}
        counts = {
            groups: torch.stack([below[groups], torch.full_like(below[groups], len(held[groups]))]) for groups in held
        }
        totals = total(counts).tolist()
        return totals[0], totals[1], held


def sample_stride(numel: int) -> int:
    """Return the distance from one weight of the sample to the next, for a number of weights."""
    stride = max(1, numel // SAMPLE)
    return stride + (stride > 1 and stride % 2 == 0)  # odd, or it would pick the same columns of matrices of even width


def bracket_margin(at: float, size: int) -> float:
    """Return how far the bracket around place ``at`` of a sorted sample of ``size`` reaches to each side, in places."""
    return 6 * (at * (1 - at / size)) ** 0.5 + 6


def scores(tensor: Ranked, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return scores in proportion to |w| v^(1/4), or |w| without v; only weights of 0 have the score 0.

    Where weights have a base, w is their distance from it.
    """
    magnitude = change(tensor.weight, tensor.base, dtype).abs()
    if tensor.exp_avg_sq is None:
        return magnitude
    return (tensor.exp_avg_sq.to(dtype) + _LEAST).sqrt_().sqrt_().mul_(_SCALE).mul_(magnitude)


@torch.no_grad()
def prune_least(tensors: Sequence[Ranked], threshold: Threshold) -> None:
    """Set the weights up to a threshold of :meth:`Ranking.least` to 0 or to their base, in place.

    The tensors must not have changed. Of the scores equal to the threshold, many in low precision, those that go are
    evenly spread. Weights that are equal to their base get its bits, as 0.0 and -0.0 are equal.
    """
    dtype = _score_dtype(tensors)
    if threshold.score == 0:
        tensors = [tensor for tensor in tensors if tensor.base is not None]
    flat = [_flat(tensor) for tensor in tensors]
    amid_equals = threshold.ties != threshold.equal and threshold.score > 0
    equals = [_end_below(tensor, threshold.score, dtype, keep_equals=amid_equals) for tensor in flat]
    if amid_equals:
        starts, _ = _starts(flat, [sum(counts) for counts in equals])
        for weights, counts, seen in zip(flat, equals, starts, strict=True):
            for piece, count in zip(_pieces(weights), counts, strict=True):
                if count:
                    _end_share(piece, scores(piece, dtype), threshold, seen)
                seen += count
    for tensor, copy in zip(tensors, flat, strict=True):
        if copy.weight.data_ptr() != tensor.weight.data_ptr():
            tensor.weight.copy_(copy.weight.view(tensor.weight.shape))


def _end_below(flat: Ranked, limit: float, dtype: torch.dtype, keep_equals: bool) -> list[int]:
    """End scores up to a limit; with ``keep_equals`` keep those equal to it, and return their number in each piece."""
    equals = []
    for piece in _pieces(flat):
        score = scores(piece, dtype)
        end_(piece.weight, score < limit if keep_equals else score <= limit, piece.base)
        if keep_equals:
            equals.append((score == limit).count_nonzero())
    return torch.stack(equals).tolist() if equals else []


def _end_share(piece: Ranked, score: Tensor, threshold: Threshold, seen: int) -> None:
    """End this piece's share of the weights with the threshold's score; ``seen`` such weights came before."""
    equals = (score == threshold.score).nonzero().view(-1)
    number = torch.arange(seen, seen + len(equals), device=equals.device)
    # The n-th of them goes if the share of n passes the next whole number.
    ties, equal = threshold.ties, threshold.equal
    goes = (number + 1) * ties // equal > number * ties // equal
    end_(piece.weight, torch.zeros_like(score, dtype=torch.bool).index_fill_(0, equals[goes], True), piece.base)


def _starts(tensors: Sequence[Ranked], counts: Sequence[int]) -> tuple[list[int], int]:
    """Return for each tensor the sum of the counts before it, shard by shard, and the sum of all counts."""
    device = tensors[0].weight.device
    slots = max(math.prod(torch.distributed.get_world_size(group) for group in tensor.groups) for tensor in tensors)
    tables = {tensor.groups: torch.zeros(len(tensors), slots, dtype=torch.int64) for tensor in tensors}
    for row, (tensor, count) in enumerate(zip(tensors, counts, strict=True)):
        tables[tensor.groups][row, tensor.slot] = count
    table = total({groups: counted.to(device) if groups else counted for groups, counted in tables.items()}).cpu()
    ends = table.view(-1).cumsum(0).view(table.shape)
    return [int(ends[row, x.slot] - table[row, x.slot]) for row, x in enumerate(tensors)], int(ends[-1, -1])


def _score_dtype(tensors: Sequence[Ranked]) -> torch.dtype:
    """The dtype in which weights are compared: float64 if any of them is, else float32."""
    doubles = any(tensor.weight.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if doubles else torch.float32


def _flat(tensor: Ranked) -> Ranked:
    return tensor.viewed(lambda part: part.reshape(-1))


def _pieces(flat: Ranked) -> Iterator[Ranked]:
    size = CPU_CHUNK if flat.weight.is_cpu else DEVICE_CHUNK
    for start in range(0, flat.weight.numel(), size):
        yield flat.viewed(itemgetter(slice(start, start + size)))
