"""Timing a call, and the median and spread of timings; needs torch alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


def clock(step: Callable[[], Any], steps: int, device: str) -> float:
    """Return the seconds of a step, measured over several."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / steps
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - begin) / steps


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quantiles of 10% and 90%."""
    low, middle, high = np.quantile(np.asarray(values, dtype=float), [0.1, 0.5, 0.9])
    return {"median": float(middle), "q10": float(low), "q90": float(high)}
