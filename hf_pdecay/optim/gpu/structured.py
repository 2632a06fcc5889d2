"""Weights that decay by groups, or of each 4 the 2 weakest, within the Triton step; see grouped.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def factor_of_unit(groups: tl.tensor, at: tl.tensor, lane: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Return the factor of each element of a block, by the index of the dimension along which the groups lie."""
    table, inner, length = tl.load(groups).to(tl.pointer_type(tl.float32)), tl.load(groups + 1), tl.load(groups + 2)
    # The place of the block is divided once; threads divide 32 bits.
    first = (at // inner % length).to(tl.int32)
    index = first + ((at % inner).to(tl.int32) + lane) // inner.to(tl.int32)
    return tl.load(table + index % length.to(tl.int32), mask=mask, other=1.0)


@triton.jit
def is_weak(magnitude: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Return whether each element is below the second largest of the four that it is one of."""
    even, odd = tl.split(tl.reshape(magnitude, [BLOCK // 4, 2, 2]))
    larger_a, larger_b = tl.split(tl.maximum(even, odd))
    smaller_a, smaller_b = tl.split(tl.minimum(even, odd))
    second = tl.maximum(tl.minimum(larger_a, larger_b), tl.maximum(smaller_a, smaller_b))
    second = tl.broadcast_to(tl.expand_dims(second, 1), [BLOCK // 4, 4])
    return magnitude < tl.reshape(second, [BLOCK])
