"""Moments in 8 bits within the Triton step, as torchao stores them.

256 values share a scale. Each is stored as the nearest of the 256 ascending numbers of a map, the upper one if two are
as near, as in torchao's quantize_8bit_with_qmap.
"""

from __future__ import annotations

import triton
import triton.language as tl


SCALED = tl.constexpr(256)  # values that share a scale


@triton.jit
def decode(
    codes: tl.tensor, scales: tl.tensor, numbers: tl.tensor, at: tl.tensor, lane: tl.tensor, mask: tl.tensor
) -> tl.tensor:
    """Return the values of a block of codes, in float32; ``scales`` and ``numbers`` are addresses."""
    scale = tl.load(scales.to(tl.pointer_type(tl.float32)) + at // SCALED + lane // SCALED, mask=mask, other=0.0)
    return tl.load(numbers.to(tl.pointer_type(tl.float32)) + codes.to(tl.int32)) * scale


@triton.jit
def encode(
    value: tl.tensor, scales: tl.tensor, numbers: tl.tensor, at: tl.tensor, mask: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Return the codes of a block of values, and store its scales; the mask covers whole scales."""
    SCALES: tl.constexpr = BLOCK // SCALED
    # As integers infinities and NaN are the largest magnitudes, and go into the scale.
    bits = tl.where(mask, value, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.reshape(bits, [SCALES, SCALED]), 1)
    scale = tl.where(largest < 0x2B8CBCCC, 0x2B8CBCCC, largest).to(tl.float32, bitcast=True)  # at least 1e-12
    first = tl.arange(0, SCALES)
    there = tl.max(tl.reshape(mask.to(tl.int32), [SCALES, SCALED]), 1) != 0
    tl.store(scales.to(tl.pointer_type(tl.float32)) + at // SCALED + first, scale, mask=there)
    scaled = value / tl.reshape(tl.broadcast_to(tl.expand_dims(scale, 1), [SCALES, SCALED]), [BLOCK])

    table = numbers.to(tl.pointer_type(tl.float32))
    code = tl.where(scaled >= tl.load(table + 128), 128, 0)
    code += tl.where(scaled >= tl.load(table + code + 64), 64, 0)
    code += tl.where(scaled >= tl.load(table + code + 32), 32, 0)
    code += tl.where(scaled >= tl.load(table + code + 16), 16, 0)
    code += tl.where(scaled >= tl.load(table + code + 8), 8, 0)
    code += tl.where(scaled >= tl.load(table + code + 4), 4, 0)
    code += tl.where(scaled >= tl.load(table + code + 2), 2, 0)
    code += tl.where(scaled >= tl.load(table + code + 1), 1, 0)
    above = tl.minimum(code + 1, 255)
    lower, upper = tl.load(table + code), tl.load(table + above)
    return tl.where(scaled - lower >= (upper - lower) * 0.5, above, code).to(tl.uint8)
