"""Stochastic rounding of float32 values to bfloat16 and float16, and the random bits for it.

A low-precision weight times 0.996 rounds back to itself, so it would never decay, and a second moment would never
change by a thousandth. Rounding up or down at random, with probabilities that keep the mean, lets such changes through.

The random bits are a hash of the tensor's place in the optimizer, its step and the element's place in the tensor. So
they need no state, and resumed runs, replicas and all backends get the same bits.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


LOW_PRECISION = (torch.bfloat16, torch.float16)

_FLOAT16_MIN_NORMAL = 2.0**-14
_FLOAT16_SUBNORMAL_STEP = 2.0**-24

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_FIRST = 0x21F0AAAD
_SECOND = 0xD35A2D97


@overload
def mix32(x: int) -> int: ...
@overload
def mix32(x: Tensor) -> Tensor: ...
def mix32(x: int | Tensor) -> int | Tensor:
    """Return a hash of 32 bits to 32 bits in which each bit depends on all, of a number or an int64 tensor."""
    x = x ^ (x >> 16)
    x = (x * _FIRST) & _MASK
    x = x ^ (x >> 15)
    x = (x * _SECOND) & _MASK
    return x ^ (x >> 15)


def noise_bits(step: int | Tensor, index: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return 32 random bits for each of ``count`` elements: an int64 tensor with values in [0, 2^32).

    ``index`` is the place of the tensor in the optimizer, ``first`` the place of the first element in the tensor.
    """
    whole = step.to(torch.int64) if isinstance(step, Tensor) else step
    a = mix32((whole + index * _GOLDEN) & _MASK)
    b = mix32(a ^ 0x68E31DA4)
    x = (torch.arange(first, first + count, device=device) + a) & _MASK
    x ^= x >> 16
    x = x.mul_(_FIRST).bitwise_and_(_MASK)
    x ^= x >> 15
    x = x.add_(b).mul_(_SECOND).bitwise_and_(_MASK)
    return x ^ (x >> 15)


def stochastic_round(values: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round to one of the two neighbours in ``dtype`` at random, such that the mean is the value itself.

    Values that ``dtype`` can hold do not change. Values beyond its range become its largest finite value. No result is
    -0: that becomes 0, as does what is rounded to it.

    ``values`` are float32, and ``noise`` has an integer with at least 16 random bits for each.
    """
    if values.dtype != torch.float32 or dtype not in LOW_PRECISION:
        raise ValueError(f"stochastic_round takes float32 to bfloat16 or float16, not {values.dtype} to {dtype}.")
    dropped_bits = 16 if dtype == torch.bfloat16 else 13
    noise = (noise.view(values.shape) & ((1 << dropped_bits) - 1)).to(torch.int32)
    # Adding noise below the last kept mantissa bit and truncating there rounds the magnitude up with a probability
    # equal to the dropped fraction. The rest converts without any further rounding.
    bits = values.view(torch.int32).add(noise).bitwise_and_(-(1 << dropped_bits))
    rounded = bits.view(torch.float32)
    if dtype == torch.float16:
        # Below the smallest normal number float16 has a fixed step, not a fixed number of mantissa bits.
        uniform = noise.to(torch.float32).mul_(1.0 / (1 << dropped_bits))
        steps = values.abs().div_(_FLOAT16_SUBNORMAL_STEP).add_(uniform).floor_()
        subnormal = steps.mul_(_FLOAT16_SUBNORMAL_STEP).copysign_(values)
        rounded = torch.where(values.abs() < _FLOAT16_MIN_NORMAL, subnormal, rounded)
    largest = torch.finfo(dtype).max
    # A NaN must stay one: noise added to its bits could turn it into an infinity or a number.
    return torch.where(values.isnan(), values, rounded.clamp_(-largest, largest)).to(dtype).add_(0.0)
