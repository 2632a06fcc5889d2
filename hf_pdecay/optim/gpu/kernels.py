"""The Triton kernels of the step, launched by step.py; the arithmetic is that of adamw_lp.cpp.

:func:`look` checks that the gradients are finite. :func:`prepare`, with one thread per tensor, counts the step and
computes in float64 what all weights of a tensor share. :func:`update` does the step. Kernels find tensors by a table of
addresses, so that many small tensors cost one launch. No hyperparameter is a constant of a kernel, so nothing is
compiled again. The kernels say where a product and a sum are fused, so that all compilers agree.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import factor_of, factor_of_unit, felt, float64_of, is_weak, mix, noise_of, scaled, seed_of
from .eight_bit import decode, encode
from .memory import COLUMNS, chunk_of, load_block, load_stored, number_of, rounded, row_of, store_block, store_rounded
from .to_base import decayed


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
    # m / (0 + eps) would not be a useful step where v is 0 because it is below float16's smallest number, or because
    # the fast root takes it for 0, being below float32's smallest normal number.
    if MOMENT == tl.float16:
        least = tl.where(epsilon < 2.0**-25, 2.0**-12, 0.0)
    else:
        least = 0.0 if MOMENT == tl.float64 else 2.0**-63
    x = 2.0 - float64_of(p_norm)
    alpha_lambda = tl.where(awake, alpha * float64_of(lambda_p), 0.0)
    tiny = 2.0**-1022 if shared.dtype.element_ty == tl.float64 else 2.0**-126
    decays, log2_alpha_lambda, at_zero = felt(alpha_lambda, x, tiny)
    keeps_zeros = (flags & 2) != 0
    # With a base zeros are not those of what decays.
    holds = keeps_zeros & (flags < 4)
    place = tl.load(words + 8, mask=mask, other=0).to(tl.uint32)
    noise = seed_of(count.to(tl.int64).to(tl.uint32), place)

    out = shared + row * SHARED
    tl.store(out + 0, going.to(tl.float32), mask=mask)
    tl.store(out + 1, 1.0 - 2.0 * (flags & 1).to(tl.float32), mask=mask)
    # torch's lerp works from the nearer end; the sign says which.
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
    tl.store(out + 12, tl.where(holds, 0.0, tl.where(decays, at_zero, 1.0)), mask=mask)
    # The weight that becomes 0 for any gradient: 0, or NaN, which no weight equals.
    tl.store(out + 13, tl.where(keeps_zeros, 0.0, float("nan")), mask=mask)
    # The bits of two integers, which float64 weights do not need.
    tl.store(out + 14, noise.to(tl.float32, bitcast=True), mask=mask)
    tl.store(out + 15, mix(noise ^ 0x68E31DA4).to(tl.float32, bitcast=True), mask=mask)


@triton.jit(do_not_specialize=["encoding", "units", "rows"])
def update(
    table: tl.tensor,
    shared: tl.tensor,
    encoding: tl.tensor,
    units: tl.tensor,
    rows: tl.int32,
    PARAM: tl.constexpr,
    MOMENT: tl.constexpr,
    DECAY: tl.constexpr,
    TO_BASE: tl.constexpr,
    NEAREST: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Do the step of one chunk of one tensor.

    If MOMENT is uint8, ``encoding`` has the addresses of both scales and both maps of each tensor, see eight_bit.py.
    DECAY is "none", "elements", "2:4" or "units". If it is "units", ``units`` has for each tensor the address of a
    factor for each index of a dimension, the elements from one index to the next and the number of indices. If TO_BASE,
    the changes of weights from their base decay.
    """
    row = row_of(table, rows)
    words = table + row * COLUMNS
    scalars = shared + row * SHARED
    if encoding is not None:
        encoding += row * 4
    if units is not None:
        units += row * 3
    if tl.load(scalars) != 0:
        begin, whole, end = chunk_of(words, CHUNK, BLOCK)
        _run(words, scalars, encoding, units, begin, whole, PARAM, MOMENT, DECAY, TO_BASE, NEAREST, BLOCK, True)
        _run(words, scalars, encoding, units, whole, end, PARAM, MOMENT, DECAY, TO_BASE, NEAREST, BLOCK, False)


@triton.jit(do_not_specialize=["rows"])
def look(
    table: tl.tensor, finite: tl.tensor, rows: tl.int32, PARAM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
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
def _run(
    words: tl.tensor,
    scalars: tl.tensor,
    encoding: tl.tensor,
    units: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    PARAM: tl.constexpr,
    MOMENT: tl.constexpr,
    DECAY: tl.constexpr,
    TO_BASE: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Do the step of the elements from ``begin`` to ``end``. Only the place of a block needs 64 bits."""
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
            # The square of a finite gradient may be beyond float16, and must not become infinite.
            v = tl.where((tl.abs(g) <= 65504.0) & (v > 65504.0), 65504.0, v)
        denominator = tl.fma(tl.sqrt(v), correction2, eps)
        denominator = tl.where(denominator < least, least, denominator)
        result = tl.fma(w, shrink_l2, m * step_size / denominator)
        before = w
        if TO_BASE:
            base = load_stored(tl.load(words + 10), at, lane, mask, PARAM, WHOLE)
            before = w - number_of(base, PARAM)
        if DECAY == "none":
            result = tl.where(w == dead, 0.0, result)
        else:
            if DECAY == "units":
                factor = factor_of_unit(units, at, lane, mask)
            else:
                factor = factor_of(before, minus_x, log2_alpha_lambda, at_zero, PARAM == tl.float64)
            if DECAY == "2:4":
                factor = tl.where(is_weak(tl.abs(before), BLOCK), factor, 1.0)
            if not TO_BASE:
                result = scaled(result, factor, PARAM == tl.float64)
                if DECAY != "elements":
                    result = tl.where(w == dead, 0.0, result)

        noise = tl.zeros([BLOCK], tl.uint32)
        if not NEAREST:
            noise = noise_of((at + lane).to(tl.uint32), noise_a, noise_b)
        # Each rounding gets different bits: the low half, the high half, and both together.
        if TO_BASE:
            stored = decayed(result, before, factor, base, w == dead, noise, PARAM, NEAREST)
        else:
            stored = rounded(result, noise, PARAM, NEAREST)
        store_rounded(param, at, lane, mask, stored, PARAM, WHOLE)
        if MOMENT == tl.uint8:
            m = encode(m, tl.load(encoding), tl.load(encoding + 2), at, mask, BLOCK)
            v = encode(v, tl.load(encoding + 1), tl.load(encoding + 3), at, mask, BLOCK)
        store_block(exp_avg, at, lane, mask, m, noise ^ (noise >> 16), MOMENT, NEAREST, WHOLE)
        store_block(exp_avg_sq, at, lane, mask, v, noise >> 16, MOMENT, NEAREST, WHOLE)
