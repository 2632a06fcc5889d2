"""The mathematics of weight decay for any p norm: pure functions, no state.

The update minimises the penalty (λ_p / p) ‖w‖_p^p by a proximal step: the p norm is written as a minimum over
auxiliary variables s of a form quadratic in w, so no gradient diverges at zero for p < 1 (Outmezguine and Levi,
https://huggingface.co/papers/2404.10824). The paper's own code multiplies by p once more: its λ is λ_p / p here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_lambda_p, check_p_norm


def abs_pow(weight: Tensor, exponent: float) -> Tensor:
    """Return ``|weight| ** exponent`` as a new tensor, for an exponent above 0.

    Exponents other than 1, 0.5, 1.5 and 2 take ``exp2(exponent * log2|w|)``: ``pow`` takes several times as long.
    """
    magnitude = weight.abs()
    if exponent == 1:
        return magnitude
    if exponent == 0.5:
        return magnitude.sqrt_()
    if exponent == 1.5:
        return magnitude.sqrt() * magnitude
    if exponent == 2:
        return magnitude.square_()
    # Zeros, which are most of a sparse model, go through the logarithm as ones: infinities are slow.
    zeros = 1 - magnitude.sign()
    return magnitude.add_(zeros).log2_().mul_(exponent).exp2_() - zeros


def shrink_factor(weight: Tensor, p_norm: float, alpha_lambda: float | Tensor) -> Tensor:
    """Return the shrink factor of each weight in one step of p-norm decay, in [0, 1], as a new tensor.

    With s = |w|^(2-p) it is s / (s + α λ_p) for p < 2, and the same written as 1 / (1 + α λ_p |w|^(p-2)) for p >= 2,
    which is finite at w = 0 (arXiv 2404.10824, algorithm 1). It is never NaN for a finite weight. ``weight`` has the
    values *before* the step. ``alpha_lambda`` is α λ_p, a float or a 0-dim tensor on the weights' device; where it is
    0 the factor is exactly 1, also for a weight of 0.
    """
    # An α λ_p that the dtype cannot hold is 0 in it, and a weight of 0 would then make 0 / 0.
    tiny = torch.finfo(weight.dtype).tiny
    if not isinstance(alpha_lambda, Tensor):
        return _factor(weight, p_norm, alpha_lambda) if alpha_lambda >= tiny else torch.ones_like(weight)
    alpha_lambda = alpha_lambda.to(weight.dtype)
    factor = _factor(weight, p_norm, alpha_lambda)
    # No branch on the value, which is on the device.
    return torch.where(alpha_lambda < tiny, torch.ones_like(factor), factor)


def _factor(weight: Tensor, p_norm: float, alpha_lambda: float | Tensor) -> Tensor:
    if p_norm < 2:
        s = abs_pow(weight, 2 - p_norm)
        # A weight whose s overflows does not decay: inf / inf would be NaN.
        s.clamp_(max=torch.finfo(s.dtype).max)
        return s.div_(s + alpha_lambda)
    if p_norm == 2:
        return torch.ones_like(weight).div_(alpha_lambda + 1)
    return abs_pow(weight, p_norm - 2).mul_(alpha_lambda).add_(1).reciprocal_()


def forecast_threshold(p_norm: float, lambda_p: float, lr_sum: float) -> float:
    """Return the magnitude below which a weight would be dead by the end of training if it had no gradient.

    Without a gradient |w|^(2-p) falls by (2-p) α λ_p a step, so the weights that start below
    ((2-p) λ_p Σα)^(1/(2-p)) reach 0. Gradients hold up part of them: this is an upper forecast. ``lr_sum`` is Σα, the
    sum of the learning rates of all steps still to come. Raises ValueError if p is not in (0, 2).
    """
    exponent = _exponent(p_norm)
    return (exponent * check_lambda_p(lambda_p) * lr_sum) ** (1 / exponent)


def lambda_for_threshold(p_norm: float, threshold: float, lr_sum: float) -> float:
    """Return the λ_p for which the forecast threshold is ``threshold``; ValueError unless p < 2 and ``lr_sum`` > 0."""
    exponent = _exponent(p_norm)
    if not lr_sum > 0:
        raise ValueError(f"Invalid lr_sum: lr_sum={lr_sum!r}; it must be above 0, the sum of the learning rates.")
    return threshold**exponent / (exponent * lr_sum)


def _exponent(p_norm: float) -> float:
    if check_p_norm(p_norm) >= 2:
        raise ValueError(f"Invalid p_norm: p_norm={p_norm!r}; it must be below 2: for p >= 2 no weight decays to 0.")
    return 2 - p_norm
