"""The arithmetic that the Triton kernels share: shrink factors and random bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def float64_of(bits: tl.tensor) -> tl.tensor:
    """Return the number that has these bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def felt(alpha_lambda: tl.tensor, x: tl.tensor, tiny: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return whether α λ_p is felt, its logarithm, and the factor of a weight of 0, with x = 2 - p.

    Below ``tiny`` the logarithm is that of 0, which makes every factor 1.
    """
    decays = alpha_lambda >= tiny
    log2 = tl.where(decays, tl.log2(tl.where(decays, alpha_lambda, 1.0)), float("-inf"))
    at_zero = tl.where(x > 0, 0.0, tl.where(x == 0, 1.0 / (1.0 + alpha_lambda), 1.0))
    return decays, log2, at_zero


@triton.jit
def factor_of(
    weight: tl.tensor, minus_x: tl.tensor, log2_alpha_lambda: tl.tensor, at_zero: tl.tensor, WIDE: tl.constexpr
) -> tl.tensor:
    """Return s / (s + α λ_p) with s = |w|^x, which is 1 / (1 + α λ_p |w|^-x) for every p; ``at_zero`` where w is 0."""
    magnitude = tl.abs(weight)
    if WIDE:
        y = tl.fma(tl.log2(tl.where(magnitude == 0, 1.0, magnitude)), minus_x, log2_alpha_lambda)
        factor = 1.0 / (1.0 + tl.exp2(y))
    else:
        # The fast logarithm would take denormal numbers for 0. So the exponent is read from the bits, of 2^24 times as
        # much if need be, and the logarithm of the mantissa is the polynomial of adamw_lp.cpp.
        denormal = magnitude < 2.0**-126
        bits = tl.where(denormal, magnitude * 16777216.0, magnitude).to(tl.int32, bitcast=True)
        # The bits of 2^23, 0x4B000000, in front of an integer make the float32 of the two's sum.
        exponent = ((bits >> 23) | 0x4B000000).to(tl.float32, bitcast=True) - tl.where(denormal, 8388759.0, 8388735.0)
        mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        log2 = tl.fma(mantissa, 0.0151253382, -0.1839394578)
        log2 = tl.fma(log2, mantissa, 0.9780940427)
        log2 = tl.fma(log2, mantissa, -2.9850191145)
        log2 = tl.fma(log2, mantissa, 5.7814362270)
        log2 = tl.fma(log2, mantissa, -7.4941276938)
        log2 = tl.fma(log2, mantissa, 7.1339685832)
        log2 = tl.fma(log2, mantissa, -3.2455376464)
        y = tl.fma(exponent, minus_x, tl.fma(log2, minus_x, log2_alpha_lambda))
        # The fast quotient may be off by two units in the last place. A Newton step mends that: the factor of a weight
        # that does not decay is exactly 1.
        inverse = 1.0 + tl.exp2(y)
        factor = 1.0 / inverse
        factor = tl.fma(factor, tl.fma(-inverse, factor, 1.0), factor)
        factor = tl.where(y < 126.0, factor, 0.0)
    return tl.where(weight == 0, at_zero, factor)


@triton.jit
def scaled(weight: tl.tensor, factor: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """Return weights times factors; what decays to a subnormal number, slow to multiply, becomes 0, as does -0."""
    result = weight * factor
    normal = tl.where(factor < 1.0, 2.0**-1022 if WIDE else 2.0**-126, 0.0)
    return tl.where((result == 0) | (tl.abs(result) < normal), 0.0, result)


@triton.jit
def factor_of_unit(units: tl.tensor, at: tl.tensor, lane: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Return the factor of each element of a block, by the index of the dimension along which the units lie."""
    table, inner, length = tl.load(units).to(tl.pointer_type(tl.float32)), tl.load(units + 1), tl.load(units + 2)
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


@triton.jit
def mix(x: tl.tensor) -> tl.tensor:
    """Return a hash of 32 bits to 32 bits, see rounding.py."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def seed_of(step: tl.tensor, place: tl.tensor) -> tl.tensor:
    """Return the hash of a tensor's step and place that its random bits begin with, see rounding.py."""
    return mix(step + place * 0x9E3779B9)


@triton.jit
def noise_of(element: tl.tensor, a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Return 32 random bits for each element, see rounding.py."""
    x = element + a.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = ((x ^ (x >> 15)) + b.to(tl.uint32, bitcast=True)) * 0xD35A2D97
    return x ^ (x >> 15)
