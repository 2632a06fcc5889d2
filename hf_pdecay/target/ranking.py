"""Which weights are the least salient: exact order statistics over many tensors, without sorting or gathering them all.

A sample of the scores brackets the one that is asked for; one look at all of them counts what lies below the bracket
and takes out the few that lie in it; among those it is found bit by bit. Where the tensors are shards of larger ones,
each process looks at its own, and what they add up are the sample and the counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..optim.distributed import Groups, total
from ..optim.shards import Ranked


# Weights looked at at a time, which bounds the temporaries; on a CPU they stay in the cache between operations.
CPU_CHUNK = 1 << 16
DEVICE_CHUNK = 1 << 22
SAMPLE = 1 << 15
# Bits by which scores are told apart at a time.
DIGIT = 11

# Second moment of weights that never had a gradient: by it they rank below all others, and yet by their magnitudes.
_LEAST = 1e-30
# A power of 2 that makes the root of it more than 1, so that no weight but 0 has the score 0.
_SCALE = 2.0**26


@dataclass(frozen=True)
class Threshold:
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
        self._starts, self.numel = _starts(self._tensors, [each.weight.numel() for each in self._tensors])
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

    def below(self, score: float) -> float:
        """Return the fraction of the sample of :meth:`quantile` that is less than a score."""
        return int(torch.searchsorted(self._sample, score)) / len(self._sample)

    def least(self, count: int) -> Threshold:
        """Find the ``count`` least scores, exactly.

        Args:
            count: In [1, number of weights].
        """
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
            if first <= 0 and last >= size:  # NaN is in no bracket
                count = below + within
                break
            margin *= 4
        if count == below:
            return Threshold(low, ties=below, equal=below)
        return self._kth(inside, count - below)

    def _kth(self, inside: Mapping[Groups, Tensor], count: int) -> Threshold:
        """The ``count``-th least of the scores that processes hold, by their bits from the first to the last."""
        # Numbers that are not negative have the order of their bits.
        whole = torch.int64 if self._dtype == torch.float64 else torch.int32
        bits = {groups: each.view(whole) for groups, each in inside.items()}
        shift, prefix = torch.iinfo(whole).bits - 1, 0
        while shift > 0:
            width = min(DIGIT, shift)
            shift -= width
            digits = {groups: (each >> shift) & ((1 << width) - 1) for groups, each in bits.items()}
            counts = {groups: torch.bincount(each, minlength=1 << width) for groups, each in digits.items()}
            found = total(counts).cpu().cumsum(0)
            digit = int(torch.searchsorted(found, count))
            before = int(found[digit - 1]) if digit else 0
            count, equal = count - before, int(found[digit]) - before
            prefix = prefix << width | digit
            bits = {groups: each[digits[groups] == digit] for groups, each in bits.items()}
        return Threshold(float(torch.tensor(prefix, dtype=whole).view(self._dtype)), ties=count, equal=equal)

    def _take_sample(self) -> Tensor:
        """Scores at even distances through all tensors, sorted."""
        stride = sample_stride(self.numel)
        device = self._tensors[0].weight.device
        size = -(-self.numel // stride)
        parts = {each.groups: torch.zeros(size, dtype=self._dtype, device=device) for each in self._tensors}
        for tensor, place in zip(self._tensors, self._starts, strict=True):
            first = -place % stride
            if first >= tensor.weight.numel():
                continue
            second = tensor.exp_avg_sq
            some = Ranked(tensor.weight[first::stride], None if second is None else second[first::stride])
            taken = scores(some, self._dtype)
            start = (place + first) // stride
            parts[tensor.groups][start : start + len(taken)] = taken.to(device)
        return total(parts).sort().values.cpu()

    def _between(self, low: float, high: float) -> tuple[int, int, dict[Groups, Tensor]]:
        """How many scores do not exceed ``low``; how many do but not ``high``, and those of them that lie here."""
        device = self._tensors[0].weight.device
        below = {each.groups: torch.zeros((), dtype=torch.int64, device=device) for each in self._tensors}
        inside: dict[Groups, list[Tensor]] = {groups: [] for groups in below}
        for tensor in self._tensors:
            for piece in _pieces(tensor):
                score = scores(piece, self._dtype)
                under = score <= low
                below[tensor.groups] += under.sum().to(device)
                inside[tensor.groups].append(score[under ^ (score <= high)].to(device))
        none = torch.empty(0, dtype=self._dtype, device=device)
        found = {groups: torch.cat([none, *some]) for groups, some in inside.items()}
        counts = {
            groups: torch.stack([below[groups], torch.full_like(below[groups], len(found[groups]))]) for groups in found
        }
        totals = total(counts).tolist()
        return totals[0], totals[1], found


def sample_stride(numel: int) -> int:
    """Return the distance from one weight of the sample to the next, given how many weights there are."""
    stride = max(1, numel // SAMPLE)
    return stride + (stride > 1 and stride % 2 == 0)  # no column of a matrix of even width comes up time and again


def bracket_margin(at: float, size: int) -> float:
    """Return how wide the bracket around place ``at`` of a sorted sample of ``size`` is to each side, in places."""
    return 6 * (at * (1 - at / size)) ** 0.5 + 6


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
def prune_least(tensors: Sequence[Ranked], cut: Threshold) -> None:
    """Set the weights of a cut to 0, in place.

    Of those that are equal in score, many in low precision, it takes as many as belong to the cut, evenly spread.

    Args:
        tensors: The tensors that the cut was found in, unchanged since.
        cut: What :meth:`Ranking.least` returned.
    """
    if cut.score == 0:
        return
    dtype = _score_dtype(tensors)
    flat = [_flat(each) for each in tensors]
    amid_equals = cut.ties != cut.equal
    equals = [_zero_below(each, cut.score, dtype, keep_equals=amid_equals) for each in flat]
    if amid_equals:
        starts, _ = _starts(flat, [sum(each) for each in equals])
        for own, counts, seen in zip(flat, equals, starts, strict=True):
            for piece, count in zip(_pieces(own), counts, strict=True):
                if count:
                    _zero_share(piece, scores(piece, dtype), cut, seen)
                seen += count
    for tensor, own in zip(tensors, flat, strict=True):
        if own.weight.data_ptr() != tensor.weight.data_ptr():
            tensor.weight.copy_(own.weight.view(tensor.weight.shape))


def _zero_below(flat: Ranked, limit: float, dtype: torch.dtype, keep_equals: bool) -> list[int]:
    """Zero scores up to a limit; those equal to it may stay, and then return how many of them each piece has."""
    equals = []
    for piece in _pieces(flat):
        score = scores(piece, dtype)
        piece.weight.masked_fill_(score < limit if keep_equals else score <= limit, 0)
        if keep_equals:
            equals.append((score == limit).count_nonzero())
    return torch.stack(equals).tolist() if equals else []


def _zero_share(piece: Ranked, score: Tensor, cut: Threshold, seen: int) -> None:
    """Zero the cut's share of the weights whose scores are equal to its, given how many came before these."""
    places = (score == cut.score).nonzero().view(-1)
    number = torch.arange(seen, seen + len(places), device=places.device)
    # The n-th of them is taken where the share of n goes over the next whole number.
    taken = (number + 1) * cut.ties // cut.equal > number * cut.ties // cut.equal
    piece.weight.index_fill_(0, places[taken], 0)


def _starts(tensors: Sequence[Ranked], counts: Sequence[int]) -> tuple[list[int], int]:
    """How many things come before each of these tensors, given how many each has, and how many there are in all.

    They are ordered tensor by tensor, those of a tensor shard by shard.
    """
    device = tensors[0].weight.device
    slots = max(math.prod(torch.distributed.get_world_size(group) for group in each.groups) for each in tensors)
    tables = {each.groups: torch.zeros(len(tensors), slots, dtype=torch.int64) for each in tensors}
    for row, (tensor, count) in enumerate(zip(tensors, counts, strict=True)):
        tables[tensor.groups][row, tensor.slot] = count
    table = total({groups: each.to(device) if groups else each for groups, each in tables.items()}).cpu()
    ends = table.view(-1).cumsum(0).view(table.shape)
    return [int(ends[row, each.slot] - table[row, each.slot]) for row, each in enumerate(tensors)], int(ends[-1, -1])


def _score_dtype(tensors: Sequence[Ranked]) -> torch.dtype:
    """The dtype in which all of some weights are compared: float64 where there is any of it, else float32."""
    doubles = any(each.weight.dtype == torch.float64 for each in tensors)
    return torch.float64 if doubles else torch.float32


def _flat(tensor: Ranked) -> Ranked:
    second = tensor.exp_avg_sq
    weight = tensor.weight.detach().reshape(-1)
    return tensor._replace(weight=weight, exp_avg_sq=None if second is None else second.detach().reshape(-1))


def _pieces(flat: Ranked) -> Iterator[Ranked]:
    size = CPU_CHUNK if flat.weight.is_cpu else DEVICE_CHUNK
    for start in range(0, flat.weight.numel(), size):
        piece, second = slice(start, start + size), flat.exp_avg_sq
        yield flat._replace(weight=flat.weight[piece], exp_avg_sq=None if second is None else second[piece])
