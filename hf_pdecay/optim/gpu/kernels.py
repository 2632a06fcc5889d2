"""The Triton kernels of the step; triton_step.py launches them.

The arithmetic is that of adamw_lp.cpp. :func:`update` finds its tensors by a table of addresses on the device, so that
many small tensors cost one launch. :func:`prepare`, with one thread a tensor, goes before it, counts the step and
computes in float64 what all weights of a tensor share. :func:`look` goes before both where somebody wants to know
whether the gradients are finite. No hyperparameter is a constant of a kernel: when one changes,
nothing is compiled again. Where a product and a sum are fused is said here, so that all compilers agree.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .eight_bit import decode, encode
from .structured import factor_of_unit, is_weak


# A row of the table of tensors, in int64: the place of its first chunk among those of all rows; the addresses of
# weights, gradient, first and second moment, step counter, and of the flag whether it is awake, or 0; the number of
# weights; the place of the tensor in the optimizer; whether all addresses are multiples of 16.
COLUMNS = tl.constexpr(10)
# A row of what the weights of a tensor share, in float32 or float64; see prepare.
SHARED = tl.constexpr(16)


@triton.jit(do_not_specialize=list(range(2, 13)))
def prepare(
    table: tl.tensor,
    shared: tl.tensor,
    finite: tl.tensor,
    rate: tl.tensor,
    rows: tl.int32,
    lr: tl.int64,
    beta1: tl.int64,
    beta2: tl.int64,
    eps: tl.int64,
    weight_decay: tl.int64,
    p_norm: tl.int64,
    lambda_p: tl.int64,
    flags: tl.int32,
    MOMENT: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Count the step of each tensor and write its row of ``shared``. Numbers come as the bits of a float64."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    words = table + row * COLUMNS
    step = tl.load(words + 5, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    flag = tl.load(words + 6, mask=mask, other=0)
    awake = tl.load(flag.to(tl.pointer_type(tl.int8)), mask=flag != 0, other=1) != 0
    count = tl.load(step, mask=mask, other=0.0) + 1.0
    going = mask
    if finite is not None:
        going = row < rows * tl.load(finite.to(tl.pointer_type(tl.int8))).to(tl.int32)
    tl.store(step, count, mask=going)

    if rate is not None:
        alpha = tl.load(rate).to(tl.float64)
    else:
        alpha = float64_of(lr)
    weight1, weight2, epsilon = 1.0 - float64_of(beta1), 1.0 - float64_of(beta2), float64_of(eps)
    times = count.to(tl.float64)
    correction1 = 1.0 - tl.exp2(times * tl.log2(float64_of(beta1)))
    correction2 = 1.0 - tl.exp2(times * tl.log2(float64_of(beta2)))
    # What is below float16's smallest number is stored as 0, and the fast root takes what is below float32's smallest
    # normal number for 0; and m / (0 + eps) is no step that anyone wants.
    if MOMENT == tl.float16:
        least = tl.where(epsilon < 2.0**-25, 2.0**-12, 0.0)
    else:
        least = 0.0 if MOMENT == tl.float64 else 2.0**-63
    x = 2.0 - float64_of(p_norm)
    alpha_lambda = tl.where(awake, alpha * float64_of(lambda_p), 0.0)
    # Where α λ_p is not even a normal number its logarithm is set to that of 0, which makes every factor 1.
    tiny = 2.0**-1022 if shared.dtype.element_ty == tl.float64 else 2.0**-126
    decays = alpha_lambda >= tiny
    log2_alpha_lambda = tl.where(decays, tl.log2(tl.where(decays, alpha_lambda, 1.0)), float("-inf"))
    at_zero = tl.where(x > 0, 0.0, tl.where(x == 0, 1.0 / (1.0 + alpha_lambda), 1.0))
    keeps_zeros = (flags >> 1) != 0
    place = tl.load(words + 8, mask=mask, other=0).to(tl.uint32)
    noise = mix(count.to(tl.int64).to(tl.uint32) + place * 0x9E3779B9)

    out = shared + row * SHARED
    tl.store(out + 0, going.to(tl.float32), mask=mask)
    tl.store(out + 1, 1.0 - 2.0 * (flags & 1).to(tl.float32), mask=mask)
    # torch's lerp works from the nearer end, to which the sign says how far.
    tl.store(out + 2, tl.where(weight1 < 0.5, weight1, weight1 - 1.0), mask=mask)
    tl.store(out + 3, float64_of(beta2), mask=mask)
    tl.store(out + 4, weight2, mask=mask)
    tl.store(out + 5, 1.0 / tl.sqrt(correction2), mask=mask)
    tl.store(out + 6, epsilon, mask=mask)
    tl.store(out + 7, least, mask=mask)
    tl.store(out + 8, -alpha / correction1, mask=mask)
    tl.store(out + 9, 1.0 - alpha * float64_of(weight_decay), mask=mask)
    tl.store(out + 10, -x, mask=mask)
    tl.store(out + 11, log2_alpha_lambda, mask=mask)
    tl.store(out + 12, tl.where(keeps_zeros, 0.0, tl.where(decays, at_zero, 1.0)), mask=mask)
    # The weight that becomes 0 whatever its gradient: 0, or NaN, which no weight equals.
    tl.store(out + 13, tl.where(keeps_zeros, 0.0, float("nan")), mask=mask)
    # The bits of two integers, for which float64 weights have no use.
    tl.store(out + 14, noise.to(tl.float32, bitcast=True), mask=mask)
    tl.store(out + 15, mix(noise ^ 0x68E31DA4).to(tl.float32, bitcast=True), mask=mask)


@triton.jit
def float64_of(bits: tl.tensor) -> tl.tensor:
    """Return the number that has these bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["encoding", "groups", "rows"])
def update(
    table: tl.tensor,
    shared: tl.tensor,
    encoding: tl.tensor,
    groups: tl.tensor,
    rows: tl.int32,
    PARAM: tl.constexpr,
    MOMENT: tl.constexpr,
    DECAY: tl.constexpr,
    NEAREST: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Do the step of one chunk of one tensor.

    Where MOMENT is uint8 ``encoding`` has for each tensor the addresses of the scales of both moments and of the maps
    of both, see triton_eight_bit.py; else it is None. DECAY is "none", "elements", "groups" or "2:4"; for groups
    ``groups`` has for each tensor the address of a factor for each index of a dimension, the elements from one index to
    the next and the number of indices, else it is None.
    """
    row = row_of(table, rows)
    words = table + row * COLUMNS
    scalars = shared + row * SHARED
    if encoding is not None:
        encoding += row * 4
    if groups is not None:
        groups += row * 3
    if tl.load(scalars) != 0:
        begin, whole, end = chunk_of(words, CHUNK, BLOCK)
        _run(words, scalars, encoding, groups, begin, whole, PARAM, MOMENT, DECAY, NEAREST, BLOCK, True)
        _run(words, scalars, encoding, groups, whole, end, PARAM, MOMENT, DECAY, NEAREST, BLOCK, False)


@triton.jit(do_not_specialize=["rows"])
def look(
    table: tl.tensor,
    finite: tl.tensor,
    rows: tl.int32,
    PARAM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Set ``finite``, a bool, to false if a gradient of one chunk of one tensor is NaN or infinite."""
    words = table + row_of(table, rows) * COLUMNS
    begin, whole, end = chunk_of(words, CHUNK, BLOCK)
    most = tl.maximum(
        _largest(tl.load(words + 2), begin, whole, PARAM, BLOCK, True),
        _largest(tl.load(words + 2), whole, end, PARAM, BLOCK, False),
    )
    if most == float("inf"):
        tl.store(finite.to(tl.pointer_type(tl.int8)), 0)


@triton.jit
def _largest(
    grad: tl.tensor, begin: tl.tensor, end: tl.tensor, PARAM: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
) -> tl.tensor:
    """The largest magnitude from ``begin`` to ``end``, with NaN as infinity."""
    lane = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.float64 if PARAM == tl.float64 else tl.float32)
    for at in range(begin, end, BLOCK):
        g = tl.abs(load_block(grad, at, lane, lane < tl.minimum(end - at, BLOCK).to(tl.int32), PARAM, WHOLE))
        most = tl.maximum(most, tl.where(g == g, g, float("inf")))
    return tl.max(most, 0)


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

    The same code is to run twice: with a mask, or addresses of which it does not know that they are multiples of 16,
    the compiler loads one element at a time.
    """
    begin = (tl.program_id(0) - tl.load(words)) * CHUNK
    end = tl.minimum(begin + CHUNK, tl.load(words + 7))
    return begin, begin + (end - begin) // BLOCK * BLOCK * tl.load(words + 9), end


@triton.jit
def _run(
    words: tl.tensor,
    scalars: tl.tensor,
    encoding: tl.tensor,
    groups: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    PARAM: tl.constexpr,
    MOMENT: tl.constexpr,
    DECAY: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Do the step of the elements from ``begin`` to ``end``, which are whole blocks or not.

    The place in the tensor is kept apart from the place in the block: it may need 64 bits, of which threads have few.
    """
    param, grad, exp_avg, exp_avg_sq = tl.load(words + 1), tl.load(words + 2), tl.load(words + 3), tl.load(words + 4)
    sign, lerp, beta2, weight2 = tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3), tl.load(scalars + 4)
    correction2, eps, least = tl.load(scalars + 5), tl.load(scalars + 6), tl.load(scalars + 7)
    step_size, shrink_l2, minus_x = tl.load(scalars + 8), tl.load(scalars + 9), tl.load(scalars + 10)
    log2_alpha_lambda, at_zero, dead = tl.load(scalars + 11), tl.load(scalars + 12), tl.load(scalars + 13)
    noise_a, noise_b = tl.load(scalars + 14), tl.load(scalars + 15)
    lane = tl.arange(0, BLOCK)
    for at in range(begin, end, BLOCK):
        mask = lane < tl.minimum(end - at, BLOCK).to(tl.int32)
        w = load_block(param, at, lane, mask, PARAM, WHOLE)
        g = load_block(grad, at, lane, mask, PARAM, WHOLE) * sign
        m = load_block(exp_avg, at, lane, mask, MOMENT, WHOLE)
        v = load_block(exp_avg_sq, at, lane, mask, MOMENT, WHOLE)
        if MOMENT == tl.uint8:
            m = decode(m, tl.load(encoding), tl.load(encoding + 2), at, lane, mask)
            v = decode(v, tl.load(encoding + 1), tl.load(encoding + 3), at, lane, mask)

        m = tl.fma(g - m, lerp, tl.where(lerp > 0, m, g))
        v = tl.fma(g * weight2, g, v * beta2)
        if MOMENT == tl.float16:
            # The square of a finite gradient may be beyond float16; that of an infinite one is.
            v = tl.where((tl.abs(g) <= 65504.0) & (v > 65504.0), 65504.0, v)
        denominator = tl.fma(tl.sqrt(v), correction2, eps)
        denominator = tl.where(denominator < least, least, denominator)
        result = tl.fma(w, shrink_l2, m * step_size / denominator)
        if DECAY == "none":
            result = tl.where(w == dead, 0.0, result)
        else:
            if DECAY == "groups":
                factor = factor_of_unit(groups, at, lane, mask)
            else:
                factor = factor_of(tl.abs(w), minus_x, log2_alpha_lambda, PARAM == tl.float64)
                factor = tl.where(w == 0, at_zero, factor)
            if DECAY == "2:4":
                factor = tl.where(is_weak(tl.abs(w), BLOCK), factor, 1.0)
            result = result * factor
            # What decays to a subnormal number, which processors are slow to multiply, becomes 0; so does -0.
            normal = tl.where(factor < 1.0, 2.0**-1022 if PARAM == tl.float64 else 2.0**-126, 0.0)
            result = tl.where((result == 0) | (tl.abs(result) < normal), 0.0, result)
            if DECAY != "elements":
                result = tl.where(w == dead, 0.0, result)

        noise = tl.zeros([BLOCK], tl.uint32)
        if not NEAREST:
            noise = noise_of((at + lane).to(tl.uint32), noise_a, noise_b)
        # Each rounding gets bits of its own: the low half, the high half, and both together.
        store_block(param, at, lane, mask, result, noise, PARAM, NEAREST, WHOLE)
        if MOMENT == tl.uint8:
            m = encode(m, tl.load(encoding), tl.load(encoding + 2), at, mask, BLOCK)
            v = encode(v, tl.load(encoding + 1), tl.load(encoding + 3), at, mask, BLOCK)
        store_block(exp_avg, at, lane, mask, m, noise ^ (noise >> 16), MOMENT, NEAREST, WHOLE)
        store_block(exp_avg_sq, at, lane, mask, v, noise >> 16, MOMENT, NEAREST, WHOLE)


@triton.jit
def factor_of(magnitude: tl.tensor, minus_x: tl.tensor, log2_alpha_lambda: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """Return s / (s + α λ_p) with s = |w|^x, which is 1 / (1 + α λ_p |w|^-x) for every p; of a weight other than 0."""
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
    return factor


@triton.jit
def mix(x: tl.tensor) -> tl.tensor:
    """Return a hash of 32 bits to 32 bits, see rounding.py."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


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
