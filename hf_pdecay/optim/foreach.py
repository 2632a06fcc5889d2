"""The step in plain torch operations on bounded chunks: it runs wherever torch does.

The order of operations is that of ``torch.optim.AdamW``, so that λ_p = 0 gives bit-identical weights on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .bases import change, decayed
from .decay import shrink_factor
from .moments import dequantize, is_quantized, slice_quantized
from .rounding import LOW_PRECISION, noise_bits, stochastic_round
from .tensor_step import Hyperparameters, TensorStep, apply_factor_, flat_views


# Elements worked on at a time, both multiples of the block of quantised moments. On a CPU a chunk stays in the cache
# from one operation to the next; elsewhere few launches matter more.
CPU_CHUNK = 1 << 18
DEVICE_CHUNK = 1 << 22

# A second moment below float16's smallest number is stored as 0, and m / (0 + eps) would be a huge step. This is the
# square root of that number, so a denominator that torch's AdamW would have computed does not change.
_FLOAT16_DENOMINATOR = 2.0**-12


@dataclass(frozen=True)
class StepScalars:
    """The scalars of one step of one tensor: floats, or 0-dim tensors on the tensor's device."""

    shrink_l2: float | Tensor
    step_size: float | Tensor
    bias_correction2_sqrt: float | Tensor
    alpha_lambda: float | Tensor
    count: int | Tensor


def scalars_of(step: Tensor, hyper: Hyperparameters, on_device: bool) -> StepScalars:
    """Compute the scalars on the device of ``step`` without a synchronisation, or in Python as AdamW does."""
    count: Any = (
        step.item() if not on_device else step.to(torch.float32 if step.device.type == "mps" else torch.float64)
    )
    rate: Any = hyper.lr
    if not on_device:
        rate = float(rate)
    elif isinstance(rate, Tensor):
        rate = rate.reshape(()).to(step.device, count.dtype, non_blocking=True)
    else:
        rate = torch.full((), rate, dtype=count.dtype, device=step.device)
    return StepScalars(
        shrink_l2=1 - rate * hyper.weight_decay,
        step_size=rate / (1 - hyper.beta1**count),
        bias_correction2_sqrt=(1 - hyper.beta2**count) ** 0.5,
        alpha_lambda=rate * hyper.lambda_p,
        count=step if on_device else int(count),
    )


def step(steps: Sequence[TensorStep], finite: bool | Tensor = True) -> None:
    """Do one step on each tensor, in place; nothing is written where ``finite`` (a bool or 0-dim tensor) is false."""
    for tensor in steps:
        if tensor.param.device.type != "cpu":
            step_on_device(tensor, finite)
        elif finite:
            tensor.step.add_(1)
            _step_tensor(tensor, scalars_of(tensor.step, tensor.hyper, on_device=False), True)


def step_on_device(tensor: TensorStep, finite: bool | Tensor = True) -> None:
    """Do one step on a tensor; all scalars stay on its device, so that the host never waits."""
    if finite is False:
        return
    if isinstance(finite, Tensor):
        finite = finite.to(tensor.param.device)
    tensor.step.add_(finite)
    _step_tensor(tensor, scalars_of(tensor.step, tensor.hyper, on_device=True), finite)


def _step_tensor(tensor: TensorStep, scalars: StepScalars, finite: bool | Tensor) -> None:
    """Do AdamW's step, then the decay by a factor from the weight before it.

    Low-precision weights that decay, and moments of another dtype than the weights', are computed in float32 and
    rounded once, stochastically.
    """
    hyper, awake, dtype = tensor.hyper, tensor.awake, tensor.param.dtype
    select = isinstance(finite, Tensor)
    decays = hyper.decays and awake is not False
    upcast = (dtype in LOW_PRECISION and hyper.decays) or tensor.exp_avg.dtype != dtype or is_quantized(tensor.exp_avg)
    half = tensor.exp_avg.dtype == torch.float16
    floor = _FLOAT16_DENOMINATOR if half and hyper.eps < 2.0**-25 else 0.0
    working = torch.float64 if dtype == torch.float64 else torch.float32

    first = 0
    stored: tuple[Tensor, ...] = (tensor.param, tensor.grad, tensor.exp_avg, tensor.exp_avg_sq)
    if tensor.base is not None and decays and hyper.lambda_p != 0:
        stored += (tensor.base,)
    for stored_p, g, stored_m, stored_v, *bases in chunks(*stored):
        if upcast:
            p, m, v = stored_p.to(working, copy=True), dequantize(stored_m, working), dequantize(stored_v, working)
            g = g.to(working)
        elif select:
            p, m, v = stored_p.clone(), stored_m.clone(), stored_v.clone()
        else:
            p, m, v = stored_p, stored_m, stored_v
        if hyper.maximize:
            g = -g

        base = bases[0] if bases else None
        before = p if base is None else change(p, base, p.dtype)
        factor = shrink_factor(before, hyper.p_norm, scalars.alpha_lambda) if decays else None
        if factor is not None and isinstance(awake, Tensor):
            factor = torch.where(awake, factor, torch.ones_like(factor))
        zeros = p == 0 if hyper.keep_zeros else None

        if hyper.weight_decay != 0:
            p.mul_(scalars.shrink_l2)
        m.lerp_(g, 1 - hyper.beta1)
        v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
        if half:
            # Clamp the overflow of a finite gradient's square, not of an infinite gradient's.
            v.copy_(torch.where(g.isfinite(), v.clamp(max=torch.finfo(torch.float16).max), v))
        denominator = v.sqrt().div_(scalars.bias_correction2_sqrt).add_(hyper.eps)
        if floor:
            denominator.clamp_(min=floor)
        if isinstance(scalars.step_size, Tensor):
            p.sub_((m * scalars.step_size).div_(denominator))
        else:
            p.addcdiv_(m, denominator, value=-scalars.step_size)

        noise = None
        if upcast:
            low = stored_p.dtype in LOW_PRECISION or stored_m.dtype in LOW_PRECISION
            noise = noise_bits(scalars.count, tensor.place, first, p.numel(), p.device) if low else None
            first += p.numel()
        if factor is not None and base is not None:
            rounded = partial(_rounded, stored=stored_p, noise=noise)
            p.copy_(decayed(p, before, factor, base, rounded, zeros=zeros))
        elif factor is not None:
            apply_factor_(p, factor)
        if zeros is not None and base is None:
            p.masked_fill_(zeros, 0)

        if upcast:
            p = p if base is not None else _rounded(p, stored_p, noise)
            # Each rounding gets bits of its own: the low half, the high half, and both together.
            m = _rounded(m, stored_m, None if noise is None else noise ^ (noise >> 16))
            v = _rounded(v, stored_v, None if noise is None else noise >> 16)
        if isinstance(finite, Tensor):
            p, m, v = (
                torch.where(finite, new, dequantize(old, new.dtype))
                for new, old in ((p, stored_p), (m, stored_m), (v, stored_v))
            )
        if upcast or select:
            stored_p.copy_(p)
            stored_m.copy_(m)
            stored_v.copy_(v)


def _rounded(values: Tensor, stored: Tensor, noise: Tensor | None) -> Tensor:
    if noise is None or stored.dtype not in LOW_PRECISION or is_quantized(stored):
        return values
    return stochastic_round(values.to(torch.float32), stored.dtype, noise)


def chunk_size(device: torch.device) -> int:
    """Return the number of elements worked on at a time on a device."""
    return CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching views, of a bounded number of elements, of tensors of one shape and device."""
    numel = tensors[0].numel()
    size = chunk_size(tensors[0].device)
    if any(is_quantized(tensor) for tensor in tensors):
        for start in range(0, numel, size):
            length = min(size, numel - start)
            yield tuple(slice_quantized(tensor, start, length) for tensor in tensors)
        return
    tensors = flat_views(tensors) or tensors
    if numel <= size:
        yield tensors
        return
    shape = tensors[0].shape
    dim = max(range(len(shape)), key=shape.__getitem__)
    length = max(1, size * shape[dim] // numel)
    for start in range(0, shape[dim], length):
        extent = min(length, shape[dim] - start)
        yield tuple(tensor.narrow(dim, start, extent) for tensor in tensors)
