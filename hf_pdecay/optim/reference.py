"""The update rule on one page: start here.

Step n of AdamW with p-norm weight decay, for a weight w with gradient g and moments m and v:

    m  = β1 m + (1 - β1) g,    m̂ = m / (1 - β1^n)
    v  = β2 v + (1 - β2) g²,   v̂ = v / (1 - β2^n)
    u  = m̂ / (√v̂ + ε)                               Adam's update
    w' = (1 - α λ₂) w - α u                         AdamW with its own decay λ₂
    s  = |w|^(2-p)                                  from the weight before the step
    w ← w' · s / (s + α λ_p)                        for p < 2: small weights become exactly 0, and 0 stays 0
    w ← w' / (1 + α λ_p |w|^(p-2))                  for p >= 2: the same, finite at 0

With ``decay_to="base"`` the change from the base decays in place of the weight: ``bases.py`` has that rule.

This is algorithm 1 of https://huggingface.co/papers/2404.10824, which minimises the penalty (λ_p / p) ‖w‖_p^p; here on
whole tensors in float64, for comparison. The fast versions compute the same: ``foreach.py`` in plain torch operations,
``cpu/`` in C++, ``gpu/`` in Triton. ``adamw_lp.py`` is the optimizer around them, ``unit_decay.py`` the rule for
weights that decay as one, and ``decay_after_step.py`` the last three lines after any other optimizer's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .bases import change, decayed
from .moments import dequantize, is_quantized
from .rounding import LOW_PRECISION, noise_bits, stochastic_round
from .tensor_step import Hyperparameters, TensorStep, apply_factor_, flat_views


def adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor, n: int, hyper: Hyperparameters) -> tuple[Tensor, Tensor, Tensor]:
    """Return w', m and v after step n; all are float64."""
    alpha = float(hyper.lr)
    if hyper.maximize:
        g = -g
    m = hyper.beta1 * m + (1 - hyper.beta1) * g
    v = hyper.beta2 * v + (1 - hyper.beta2) * g**2
    m_hat, v_hat = m / (1 - hyper.beta1**n), v / (1 - hyper.beta2**n)
    u = m_hat / (v_hat.sqrt() + hyper.eps)
    return (1 - alpha * hyper.weight_decay) * w - alpha * u, m, v


def shrink_factor(w: Tensor, hyper: Hyperparameters) -> Tensor:
    """Return the factors by which weights or changes w from before a step shrink in it."""
    p, strength = hyper.p_norm, float(hyper.lr) * hyper.lambda_p
    if p < 2:
        s = w.abs() ** (2 - p)
        return s / (s + strength)
    return 1 / (1 + strength * w.abs() ** (p - 2))


def step(steps: Sequence[TensorStep], finite: bool | Tensor = True) -> None:
    """Do one step on each tensor, in place; see :func:`hf_pdecay.optim.foreach.step`. Waits for the device."""
    for tensor in steps if finite else ():
        tensor.step.add_(1)
        count, low = int(tensor.step), torch.float64 if tensor.param.dtype == torch.float64 else torch.float32
        hyper, decays = tensor.hyper, float(tensor.hyper.lr) * tensor.hyper.lambda_p > 0 and bool(tensor.awake)
        stored: tuple[Tensor, ...] = (tensor.param, tensor.exp_avg, tensor.exp_avg_sq, tensor.grad)
        stored += () if tensor.base is None else (tensor.base,)
        if not is_quantized(tensor.exp_avg):
            stored = flat_views(stored) or stored
        w, m, v, g = (dequantize(values, torch.float64) for values in stored[:4])
        base = stored[4] if decays and tensor.base is not None else None
        zeros = w == 0 if hyper.keep_zeros else None
        stepped, *moments = adamw(w, g, m, v, count, hyper)
        noise = noise_bits(count, tensor.place, 0, w.numel(), w.device)
        if decays and base is None:
            apply_factor_(stepped, shrink_factor(w, hyper), low)
        elif base is not None:
            before = change(w, base)
            rounded = partial(_rounded, like=base, bits=noise)
            stepped = decayed(stepped, before, shrink_factor(before, hyper), base, rounded, low, zeros)
        if zeros is not None and base is None:
            stepped = stepped.masked_fill(zeros, 0)
        # Each rounding gets bits of its own: the low half, both halves together, and the high half.
        results, bits = (stepped, *moments), (noise, noise ^ (noise >> 16), noise >> 16)
        for old, new, own in zip(stored[:3], results, bits, strict=True):
            old.copy_(new if new.dtype == old.dtype or is_quantized(old) else _rounded(new, old, own))


def _rounded(values: Tensor, like: Tensor, bits: Tensor) -> Tensor:
    if like.dtype in LOW_PRECISION:
        return stochastic_round(values.to(torch.float32), like.dtype, bits)
    return values.to(like.dtype)
