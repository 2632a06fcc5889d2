"""What a pruning step costs: all-reduces, and temporary memory, as ``ranking`` is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .ranking import DEVICE_CHUNK, DIGIT, SAMPLE, bracket_margin, sample_stride


_COUNT = 8  # bytes of an int64
_SCORE, _SCORE_BITS = 4, 31  # bytes of a float32, the dtype of scores unless weights are float64; bits but for the sign
# Most bytes of temporaries for each weight of a ranked chunk, int64 counts of equal scores included; or of the bracket.
_RANKED, _BRACKETED = 40, 20


@dataclass(frozen=True)
class Traffic:
    """All-reduces of one process, and the bytes of the tensors in them."""

    all_reduces: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.all_reduces + other.all_reduces, self.bytes + other.bytes)


@dataclass(frozen=True)
class PruningCost:
    """What pruning single weights costs each process.

    Args:
        pruning: Communication of a pruning step, without ``ties``.
        ties: What a pruning step adds if it zeroes only part of the equal scores: usual in bfloat16, and from some ten
            million float32 weights on.
        lambda_p: Communication each time that λ_p is set, after most pruning steps.
        temporaries: Most bytes of temporaries of a pruning step on a GPU, unless most weights are equal.
    """

    pruning: Traffic
    ties: Traffic
    lambda_p: Traffic
    temporaries: int


def pruning_cost(numel: int, held: Sequence[int], shards: int) -> PruningCost:
    """Return what pruning the weights of a model costs.

    Args:
        numel: Number of weights that share a target.
        held: Number of them that a process holds, tensor by tensor.
        shards: Number of shards of each tensor; 0 for whole tensors.
    """
    pruning = ties = lambda_p = Traffic()
    if held and shards:
        # The table of how many weights, or equal scores, of a tensor each process has; and the sample.
        ties = Traffic(1, len(held) * shards * _COUNT)
        # Before each of the two: which tensors have had a gradient.
        lambda_p = ties + Traffic(1, -(-numel // sample_stride(numel)) * _SCORE) + Traffic(1, len(held) * _COUNT)
        # How many are below the bracket and in it, and the digits of the score.
        pruning = lambda_p + Traffic(1, 2 * _COUNT)
        for bits in range(_SCORE_BITS, 0, -DIGIT):
            pruning += Traffic(1, (1 << min(DIGIT, bits)) * _COUNT)
    # The bracket is widest around the median.
    bracket = min(2 * bracket_margin(SAMPLE / 2, SAMPLE) / SAMPLE, 1)
    largest = min(max(held, default=0), DEVICE_CHUNK)
    return PruningCost(pruning, ties, lambda_p, _RANKED * largest + round(_BRACKETED * bracket * sum(held)))
