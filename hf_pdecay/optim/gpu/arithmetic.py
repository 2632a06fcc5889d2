"""What all Triton kernels are made of: rows of tables, shrink factors, random bits, loads and stores."""

from __future__ import annotations

import triton
import triton.language as tl


# A row of the table of tensors, in int64: the place of its first chunk among those of all rows; the addresses of
# weights, gradient, first and second moment, step counter, and of the flag whether it is awake, or 0; the number of
# weights; the place of the tensor in the optimizer; whether all addresses are multiples of 16.
COLUMNS = tl.constexpr(10)


@triton.jit
def float64_of(bits: tl.tensor) -> tl.tensor:
    """Return the number that has these bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def row_of(table: tl.tensor, rows: tl.tensor) -> tl.tensor:
    """Return the row of the tensor that the chunk of this program belongs to."""
    # The last row whose first chunk is not beyond this one. Rows without weights have the first chunk of the next.
    low = tl.program_id(1)  # 0
    high = rows
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * COLUMNS) <= tl.program_id(0)
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def chunk_of(words: tl.tensor, CHUNK: tl.constexpr, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return where this program's chunk of a tensor begins, where its part of whole blocks ends, and where it ends.

    The same code must run twice: with a mask, or with addresses that are not known to be multiples of 16,
    the compiler loads one element at a time.
    """
    begin = (tl.program_id(0) - tl.load(words)) * CHUNK
    end = tl.minimum(begin + CHUNK, tl.load(words + 7))
    return begin, begin + (end - begin) // BLOCK * BLOCK * tl.load(words + 9), end


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


@triton.jit
def load_block(
    address: tl.tensor, at: tl.tensor, lane: tl.tensor, mask: tl.tensor, TYPE: tl.constexpr, WHOLE: tl.constexpr
) -> tl.tensor:
    """Load a block; bfloat16 and float16 become float32."""
    LOW: tl.constexpr = TYPE == tl.bfloat16 or TYPE == tl.float16
    STORED: tl.constexpr = tl.uint16 if LOW else TYPE
    pointer = address.to(tl.pointer_type(STORED))
    if WHOLE:
        value = tl.load(tl.multiple_of(pointer, 16) + at + lane)
    else:
        value = tl.load(pointer + at + lane, mask=mask, other=0)
    if TYPE == tl.bfloat16:
        value = (value.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    if TYPE == tl.float16:
        value = value.to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def store_block(
    address: tl.tensor,
    at: tl.tensor,
    lane: tl.tensor,
    mask: tl.tensor,
    value: tl.tensor,
    noise: tl.tensor,
    TYPE: tl.constexpr,
    NEAREST: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Store a block; bfloat16 and float16 are rounded stochastically, see rounding.py, or to the nearest."""
    LOW: tl.constexpr = TYPE == tl.bfloat16 or TYPE == tl.float16
    STORED: tl.constexpr = tl.uint16 if LOW else TYPE
    if LOW:
        bits = value.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        if TYPE == tl.bfloat16:
            if NEAREST:
                kept = (magnitude + (0x7FFF + ((bits >> 16) & 1))) >> 16
            else:
                kept = tl.minimum(magnitude + (noise & 0xFFFF), 0x7F7FFFFF) >> 16
            kept = tl.where(magnitude > 0x7F800000, 0x7FC0, kept)  # a NaN stays one
        else:
            if NEAREST:
                kept = tl.abs(value).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
            else:
                dropped = noise & 0x1FFF
                # Below its smallest normal number float16 has a fixed step, 2^-24.
                small = tl.minimum(magnitude, 0x38800000).to(tl.float32, bitcast=True) * 16777216.0
                subnormal = (small + dropped.to(tl.float32) * (1.0 / 8192.0)).to(tl.int32).to(tl.uint32)
                normal = (tl.maximum(magnitude, 0x38800000) - 0x38000000 + dropped) >> 13
                kept = tl.where(magnitude < 0x38800000, subnormal, tl.minimum(normal, 0x7BFF))
            kept = tl.where(magnitude > 0x7F800000, 0x7E00, kept)
        value = (kept | ((bits >> 16) & 0x8000)).to(tl.uint16)
    pointer = address.to(tl.pointer_type(STORED))
    if WHOLE:
        tl.store(tl.multiple_of(pointer, 16) + at + lane, value)
    else:
        tl.store(pointer + at + lane, value, mask=mask)
