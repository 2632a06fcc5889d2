"""The decay of changes from a base in the Triton kernels; the rule is that of bases.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import bases
from .arithmetic import scaled
from .memory import number_of, rounded


HELD = tl.constexpr(bases.HELD)


@triton.jit
def decayed(
    result: tl.tensor,
    before: tl.tensor,
    factor: tl.tensor,
    base: tl.tensor,
    kept: tl.tensor,
    noise: tl.tensor,
    TYPE: tl.constexpr,
    NEAREST: tl.constexpr,
) -> tl.tensor:
    """Return weights after the decay of their changes, as they are stored.

    ``result`` has the weights after the optimizer's step, ``before`` their changes before it, ``factor`` the shrink
    factors of these, ``base`` the base as it is stored, and ``kept`` whether the weights are zeros to keep.
    """
    wide = number_of(base, TYPE)
    held = factor >= HELD
    after = scaled(result - wide, factor, TYPE == tl.float64)
    stored = rounded(tl.where(kept, 0.0, tl.where(held, result, wide + after)), noise, TYPE, NEAREST)
    # What equals its base gets the bits of it, as zeros have two signs.
    ends = tl.where(held & (before != 0), next_to(base, wide, before > 0, TYPE), base)
    return tl.where(number_of(stored, TYPE) == wide, ends, stored)


@triton.jit
def next_to(base: tl.tensor, wide: tl.tensor, up: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """Return the numbers next to a base, above it where ``up`` and below it elsewhere, as they are stored."""
    if TYPE == tl.float64:
        bits = base.to(tl.int64, bitcast=True)
        minus = -0x8000000000000000
    elif TYPE == tl.float32:
        bits = base.to(tl.int32, bitcast=True)
        minus = -0x80000000
    else:
        bits = base.to(tl.int32)
        minus = 0x8000
    # The bits of numbers above 0 have the order of the numbers, those of numbers below 0 the opposite one.
    bits = tl.where(wide == 0, tl.where(up, 0, minus), bits)
    bits += tl.where((wide == 0) | ((wide > 0) == up), 1, -1)
    return bits.to(base.dtype, bitcast=True) if TYPE == tl.float64 or TYPE == tl.float32 else bits.to(tl.uint16)
