"""When a run prunes, and how its sparsity grows from begin to end."""

from __future__ import annotations

import math
from dataclasses import dataclass


SHAPES = ("cubic", "linear", "cosine")

# The least and the largest interval between pruning steps: pruning costs a fifth of a training step on a CPU; in a long
# interval the decay would get ahead of the schedule.
_INTERVALS = (8, 50)
_PRUNING_STEPS = 40  # from begin to end


@dataclass(frozen=True)
class Schedule:
    """When the sparsity, and p, change from their first to their last value.

    Args:
        begin: Number of steps before the change begins.
        end: Number of steps after which it ends.
        shape: ``"cubic"`` is steep at first, 1 - (1 - t)³ (Zhu and Gupta, arXiv 1710.01878, equation 1); ``"linear"``
            and ``"cosine"`` as the names say.
    """

    begin: int
    end: int
    shape: str = "cubic"

    @property
    def interval(self) -> int:
        """Steps from one pruning step to the next."""
        return min(max((self.end - self.begin) // _PRUNING_STEPS, _INTERVALS[0]), _INTERVALS[1])

    def progress(self, step: int) -> float:
        """Return the share of the change that is made after a number of steps, in [0, 1]."""
        t = min(max((step - self.begin) / max(self.end - self.begin, 1), 0.0), 1.0)
        if self.shape == "linear":
            return t
        return 1 - (1 - t) ** 3 if self.shape == "cubic" else (1 - math.cos(math.pi * t)) / 2

    def prunes(self, step: int) -> bool:
        """Whether weights are pruned after a step; the first step of a run is number 1."""
        return self.begin < step <= self.end and (self.end - step) % self.interval == 0

    def done(self, step: int) -> float:
        """Return the share of the change that prunings before a step have made, in [0, 1]."""
        last = min(step - 1, self.end)
        last -= (last - self.end) % self.interval
        return self.progress(last) if last > self.begin else 0.0

    @property
    def pruning_steps(self) -> list[int]:
        """All steps after which weights are pruned."""
        return [step for step in range(self.begin + 1, self.end + 1) if self.prunes(step)]

    def next_pruning(self, step: int) -> int:
        """Return the first step from this one on after which weights are pruned."""
        return min(step + (self.end - step) % self.interval, self.end)
