"""The step as the formulas have it, in float64 and on whole tensors: for comparison, not for speed.

w_{n+1} = w' · s / (s + α λ_p) with s = |w_n|^(2-p) and w' the result of AdamW; https://huggingface.co/papers/2404.10824,
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .moments import dequantize, is_quantized
from .rounding import LOW_PRECISION, noise_bits, stochastic_round
from .tensor_step import TensorStep, apply_factor_, flat_views


def step(steps: Sequence[TensorStep], finite: bool | Tensor = True) -> None:
    """Do one step on each tensor, in place; see :func:`hf_pdecay.optim.foreach.step`. Waits for the device."""
    if not finite:
        return
    for each in steps:
        hyper, dtype = each.hyper, torch.float64
        each.step.add_(1)
        count, lr = int(each.step), float(hyper.lr)
        tensors: tuple[Tensor, ...] = (each.param, each.grad, each.exp_avg, each.exp_avg_sq)
        if not is_quantized(each.exp_avg):
            tensors = flat_views(tensors) or tensors
        w, g = tensors[0].to(dtype), tensors[1].to(dtype) * (-1 if hyper.maximize else 1)
        m = hyper.beta1 * dequantize(tensors[2], dtype) + (1 - hyper.beta1) * g
        v = hyper.beta2 * dequantize(tensors[3], dtype) + (1 - hyper.beta2) * g**2
        u = (m / (1 - hyper.beta1**count)) / ((v / (1 - hyper.beta2**count)).sqrt() + hyper.eps)
        result = (1 - lr * hyper.weight_decay) * w - lr * u
        if lr * hyper.lambda_p > 0 and bool(each.awake):
            if hyper.p_norm < 2:
                s = w.abs() ** (2 - hyper.p_norm)
                factor = s / (s + lr * hyper.lambda_p)
            else:
                factor = 1 / (1 + lr * hyper.lambda_p * w.abs() ** (hyper.p_norm - 2))
            apply_factor_(result, factor, dtype if each.param.dtype == dtype else torch.float32)
        if hyper.keep_zeros:
            result = result.masked_fill(w == 0, 0)
        noise = noise_bits(count, each.place, 0, w.numel(), w.device)
        for stored, value, bits in (
            (tensors[0], result, noise),
            (tensors[2], m, noise ^ (noise >> 16)),
            (tensors[3], v, noise >> 16),
        ):
            if stored.dtype in LOW_PRECISION and not is_quantized(stored):
                value = stochastic_round(value.to(torch.float32), stored.dtype, bits)
            stored.copy_(value)
