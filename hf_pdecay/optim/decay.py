"""The mathematics of weight decay for any p norm: pure functions, no state.

The update is the one of Outmezguine and Levi, "Decoupled Weight Decay for Any p Norm"
(https://huggingface.co/papers/2404.10824). It minimises the penalty (λ_p / p) ‖w‖_p^p by a proximal step: the p norm
is written as a minimum over auxiliary variables s of a form that is quadratic in w, so the step has no gradient that
diverges at zero for p < 1.

The paper's own code multiplies by p once more: its λ equals λ_p / p here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_lambda_p, check_p_norm


def abs_pow(weight: Tensor, exponent: float) -> Tensor:
    """Return ``|weight| ** exponent`` as a new tensor.

    Exponents other than 1, 0.5, 1.5 and 2 take ``exp2(exponent * log2|w|)``: ``pow`` takes several times as long.

    Args:
        weight: A floating-point tensor of any shape.
        exponent: Any finite number above 0.
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
    """Return the shrink factor of each weight in one step of p-norm decay.

    With s = |w|^(2-p) it is s / (s + α λ_p) for p < 2, and the same written as 1 / (1 + α λ_p |w|^(p-2)) for p >= 2,
    which is finite at w = 0 (arXiv 2404.10824, algorithm 1).

    Args:
        weight: The weights *before* the step, of any shape; the factor is computed in their dtype.
        p_norm: p, any number above 0.
        alpha_lambda: α λ_p, the scheduled learning rate times λ_p; a float or a 0-dim tensor on the weights' device.
            Where it is 0 the factor is exactly 1, also for a weight of 0.

    Returns:
        A new tensor of the shape of ``weight`` with values in [0, 1]; never NaN for a finite weight.
    """
    # An α λ_p that the dtype cannot hold is 0 in it, and a weight of 0 would then make 0 / 0.
    tiny = torch.finfo(weight.dtype).tiny
    if not isinstance(alpha_lambda, Tensor):
        return _factor(weight, p_norm, alpha_lambda) if alpha_lambda >= tiny else torch.ones_like(weight)
    alpha_lambda = alpha_lambda.to(weight.dtype)
    factor = _factor(weight, p_norm, alpha_lambda)
    # The value is on the device, so there is no branch on it.
    return torch.where(alpha_lambda < tiny, torch.ones_like(factor), factor)


def _factor(weight: Tensor, p_norm: float, alpha_lambda: float | Tensor) -> Tensor:
    if p_norm < 2:
        s = abs_pow(weight, 2 - p_norm)
        # A weight so large that s overflows is not decayed at all: inf / inf would be NaN.
        s.clamp_(max=torch.finfo(s.dtype).max)
        return s.div_(s + alpha_lambda)
    if p_norm == 2:
        return torch.ones_like(weight).div_(alpha_lambda + 1)
    return abs_pow(weight, p_norm - 2).mul_(alpha_lambda).add_(1).reciprocal_()


def forecast_threshold(p_norm: float, lambda_p: float, lr_sum: float) -> float:
    """Return the magnitude below which a weight would be dead by the end of training, were there no gradient.

    Without a gradient |w|^(2-p) falls by (2-p) α λ_p a step, so the weights that start below
    ((2-p) λ_p Σα)^(1/(2-p)) reach 0. Gradients hold some of them up: this is an upper forecast.

    Args:
        p_norm: p, above 0 and below 2.
        lambda_p: λ_p, at least 0.
        lr_sum: Σα, the sum of the learning rates of all steps still to come.

    Raises:
        ValueError: If ``p_norm`` is not in (0, 2).
    """
    exponent = _exponent(p_norm)
    return (exponent * check_lambda_p(lambda_p) * lr_sum) ** (1 / exponent)


def lambda_for_threshold(p_norm: float, threshold: float, lr_sum: float) -> float:
    """Return the λ_p for which :func:`forecast_threshold` gives ``threshold``.

    Args:
        p_norm: p, above 0 and below 2.
        threshold: A weight magnitude, at least 0.
        lr_sum: Σα, the sum of the learning rates of all steps still to come, above 0.

    Raises:
        ValueError: If ``p_norm`` is not in (0, 2) or ``lr_sum`` is not above 0.
    """
    exponent = _exponent(p_norm)
    if not lr_sum > 0:
        raise ValueError(f"Invalid lr_sum: lr_sum={lr_sum!r}; it must be above 0, the sum of the learning rates.")
    return threshold**exponent / (exponent * lr_sum)


def _exponent(p_norm: float) -> float:
    if check_p_norm(p_norm) >= 2:
        raise ValueError(f"Invalid p_norm: p_norm={p_norm!r}; it must be below 2: for p >= 2 no weight decays to 0.")
    return 2 - p_norm
