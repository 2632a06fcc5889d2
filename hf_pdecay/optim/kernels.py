"""The arithmetic of one step, in plain torch operations on bounded chunks.

Everything that depends on how the step is computed is in :func:`step_tensor`; the optimizer class around it only keeps
state. The order of the operations is that of ``torch.optim.AdamW``, so that λ_p = 0 gives its weights to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decay import shrink_factor
from .rounding import LOW_PRECISION, stochastic_round


# Elements worked on at a time, which bounds the temporaries. On a CPU a chunk stays in the cache from one operation to
# the next; elsewhere few launches matter more.
CPU_CHUNK = 1 << 18
DEVICE_CHUNK = 1 << 22

# A second moment below float16's smallest number is stored as 0, and m / (0 + eps) is no step that anyone wants. This
# is the square root of that number, so a denominator that torch's AdamW would have computed is left as it is.
_FLOAT16_DENOMINATOR = 2.0**-12


@dataclass(frozen=True)
class Hyperparameters:
    """What a param group says of its step, but for the learning rate; see :class:`~hf_pdecay.AdamWLp`."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    p_norm: float
    lambda_p: float
    keep_zeros: bool
    maximize: bool


@dataclass(frozen=True)
class StepScalars:
    """What one step of one tensor needs beside the tensors: floats, or 0-dim tensors on the tensor's device."""

    shrink_l2: float | Tensor
    step_size: float | Tensor
    bias_correction2_sqrt: float | Tensor
    alpha_lambda: float | Tensor


def host_scalars(step: Tensor, lr: float | Tensor, hyper: Hyperparameters) -> StepScalars:
    """Compute the scalars in Python, as torch's AdamW does for a step that the host knows."""
    count, rate = step.item(), float(lr)
    return StepScalars(
        shrink_l2=1 - rate * hyper.weight_decay,
        step_size=rate / (1 - hyper.beta1**count),
        bias_correction2_sqrt=(1 - hyper.beta2**count) ** 0.5,
        alpha_lambda=rate * hyper.lambda_p,
    )


def device_scalars(step: Tensor, lr: float | Tensor, hyper: Hyperparameters) -> StepScalars:
    """Compute the scalars on the device of ``step``, without a synchronisation."""
    dtype = torch.float32 if step.device.type == "mps" else torch.float64
    count = step.to(dtype)
    if isinstance(lr, Tensor):
        rate = lr.reshape(()).to(step.device, dtype, non_blocking=True)
    else:
        rate = torch.full((), lr, dtype=dtype, device=step.device)
    return StepScalars(
        shrink_l2=1 - rate * hyper.weight_decay,
        step_size=rate / (1 - hyper.beta1**count),
        bias_correction2_sqrt=(1 - hyper.beta2**count).sqrt(),
        alpha_lambda=rate * hyper.lambda_p,
    )


def step_tensor(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: StepScalars,
    hyper: Hyperparameters,
    *,
    awake: bool | Tensor,
    finite: bool | Tensor,
    generator: torch.Generator | None,
) -> None:
    """Do one step on one tensor in place: AdamW's step, then the shrink by a factor from the weight before it.

    Low-precision weights with λ_p > 0 are computed in float32 and rounded once, stochastically.

    Args:
        param: The weights, of any shape and floating dtype.
        grad: Their gradient, of the same shape.
        exp_avg: First moment, of the same shape.
        exp_avg_sq: Second moment, of the same shape.
        scalars: From :func:`host_scalars` or :func:`device_scalars`.
        hyper: Hyperparameters of the group.
        awake: False, or a 0-dim tensor of that value, for a tensor that was wholly zero at the start and still is.
        finite: Where it is a 0-dim tensor of value False, nothing is written.
        generator: Random bits for the rounding of low-precision weights.
    """
    select = isinstance(finite, Tensor)
    decays = hyper.lambda_p != 0 and awake is not False
    upcast = param.dtype in LOW_PRECISION and hyper.lambda_p != 0
    floor = _FLOAT16_DENOMINATOR if param.dtype == torch.float16 and hyper.eps < 2.0**-25 else 0.0

    for stored_p, g, stored_m, stored_v in _chunks(param, grad, exp_avg, exp_avg_sq):
        if upcast:
            p, m, v, g = stored_p.float(), stored_m.float(), stored_v.float(), g.float()
        elif select:
            p, m, v = stored_p.clone(), stored_m.clone(), stored_v.clone()
        else:
            p, m, v = stored_p, stored_m, stored_v
        if hyper.maximize:
            g = -g

        factor = shrink_factor(p, hyper.p_norm, scalars.alpha_lambda) if decays else None
        if factor is not None and isinstance(awake, Tensor):
            factor = torch.where(awake, factor, torch.ones_like(factor))
        zeros = p == 0 if hyper.keep_zeros else None

        if hyper.weight_decay != 0:
            p.mul_(scalars.shrink_l2)
        m.lerp_(g, 1 - hyper.beta1)
        v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
        if param.dtype == torch.float16:
            # Overflow of a finite gradient's square, not that of an infinite gradient.
            v.copy_(torch.where(g.isfinite(), v.clamp(max=torch.finfo(torch.float16).max), v))
        denominator = v.sqrt().div_(scalars.bias_correction2_sqrt).add_(hyper.eps)
        if floor:
            denominator.clamp_(min=floor)
        if isinstance(scalars.step_size, Tensor):
            p.sub_((m * scalars.step_size).div_(denominator))
        else:
            p.addcdiv_(m, denominator, value=-scalars.step_size)

        if factor is not None:
            # Adding 0 turns -0 into 0: one bit pattern for all zeros.
            p.mul_(factor).add_(0.0)
        if zeros is not None:
            p.masked_fill_(zeros, 0)

        if upcast:
            p = stochastic_round(p, param.dtype, generator)
            m, v = m.to(stored_m.dtype), v.to(stored_v.dtype)
        if isinstance(finite, Tensor):
            p, m, v = (torch.where(finite, new, old) for new, old in ((p, stored_p), (m, stored_m), (v, stored_v)))
        if upcast or select:
            stored_p.copy_(p)
            stored_m.copy_(m)
            stored_v.copy_(v)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching views of tensors of one shape, of a bounded number of elements each."""
    numel = tensors[0].numel()
    size = CPU_CHUNK if tensors[0].device.type == "cpu" else DEVICE_CHUNK
    if numel <= size:
        yield tensors
        return
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.view(-1) for tensor in tensors)
    shape = tensors[0].shape
    dim = max(range(len(shape)), key=shape.__getitem__)
    length = max(1, size * shape[dim] // numel)
    for start in range(0, shape[dim], length):
        extent = min(length, shape[dim] - start)
        yield tuple(tensor.narrow(dim, start, extent) for tensor in tensors)
