"""Rounding to few bits, block by block in float64, written from arXiv 2409.09245; autograd makes the gradient."""

from __future__ import annotations

import torch
from torch import Tensor


RIDGE = 0.01


def codes_of(x: Tensor, low: int, high: int, step: float, offset: float, odd: bool, nonzero: bool) -> Tensor:
    """Codes of a block; their gradient is that of (x - offset) / step."""
    position = (x - offset) / step
    values = position.detach()
    if odd:
        levels = torch.arange(1, high + 1, 2, dtype=x.dtype)
        nearest = levels[(values.abs().unsqueeze(1) - levels).abs().argmin(1)]
        chosen = torch.where(values == 0, 0.0, nearest * values.sign())
    else:
        chosen = values.round().clamp(low, high)
    if nonzero:
        chosen = torch.where(chosen == 0, values.sign(), chosen)
    return position + (chosen - position).detach()


def round_block(
    x: Tensor, low: int, high: int, step: float, offset: float, *, affine: bool, odd: bool, nonzero: bool
) -> Tensor:
    """What the codes of a block stand for."""
    q = codes_of(x, low, high, step, offset, odd, nonzero)
    if not affine:
        scale = (q * x).mean() / ((q * q).mean() + RIDGE)
        return _with_value(scale * q, brain(scale) * q)
    covariance = ((x - x.mean()) * (q - q.mean())).mean()
    scale = covariance / (((q - q.mean()) ** 2).mean() + RIDGE)
    base = brain(x.mean() + brain(scale) * (q.min() - q.mean()))
    return _with_value(scale * (q - q.mean()) + x.mean(), brain(scale) * (q - q.min()) + base)


def brain(value: Tensor) -> Tensor:
    """A number in bfloat16."""
    return value.to(torch.bfloat16).to(value.dtype)


def _with_value(formula: Tensor, value: Tensor) -> Tensor:
    """A value with the gradient of a formula."""
    return formula + (value - formula).detach()
