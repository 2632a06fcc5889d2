"""Stochastic rounding of float32 values to bfloat16 and float16.

A low-precision weight times a factor of 0.996 rounds back to itself, so that it would never decay. Rounding up or down
at random, with probabilities that keep the mean, lets small changes through.
"""

from __future__ import annotations

import torch
from torch import Tensor


LOW_PRECISION = (torch.bfloat16, torch.float16)

_FLOAT16_MIN_NORMAL = 2.0**-14
_FLOAT16_SUBNORMAL_STEP = 2.0**-24


def stochastic_round(values: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Round to one of the two neighbours in ``dtype`` at random, such that the mean is the value itself.

    Values that ``dtype`` can hold stay as they are. Values beyond its range become its largest finite value.

    Args:
        values: A float32 tensor of any shape.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        generator: Source of the random bits, on the device of ``values``; the default generator if none.

    Returns:
        A new tensor of ``dtype``.

    Raises:
        ValueError: If ``values`` is not float32 or ``dtype`` is not one of the two.
    """
    if values.dtype != torch.float32 or dtype not in LOW_PRECISION:
        raise ValueError(f"stochastic_round takes float32 to bfloat16 or float16, not {values.dtype} to {dtype}.")
    dropped_bits = 16 if dtype == torch.bfloat16 else 13
    noise = torch.randint(
        0, 1 << dropped_bits, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    # Adding noise below the last kept mantissa bit and cutting there rounds the magnitude up with probability equal to
    # the fraction that is cut off. What is left converts without any further rounding.
    bits = values.view(torch.int32).add(noise).bitwise_and_(-(1 << dropped_bits))
    rounded = bits.view(torch.float32)
    if dtype == torch.float16:
        # Below the smallest normal number float16 has a fixed step, not a fixed number of mantissa bits.
        uniform = noise.to(torch.float32).mul_(1.0 / (1 << dropped_bits))
        steps = values.abs().div_(_FLOAT16_SUBNORMAL_STEP).add_(uniform).floor_()
        subnormal = steps.mul_(_FLOAT16_SUBNORMAL_STEP).copysign_(values)
        rounded = torch.where(values.abs() < _FLOAT16_MIN_NORMAL, subnormal, rounded)
    largest = torch.finfo(dtype).max
    # A NaN must stay one: noise added to its bits could make an infinity or a number of it.
    return torch.where(values.isnan(), values, rounded.clamp_(-largest, largest)).to(dtype)
