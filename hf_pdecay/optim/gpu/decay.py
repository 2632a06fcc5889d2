"""The decay of weights that another optimizer has stepped, on a GPU: one launch for all tensors of a dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensor_step import Decay, Stepped, is_flat, smallest
from .arithmetic import factor_of, felt, float64_of, mix, noise_of, scaled, seed_of
from .launch import BLOCK, CHUNK, DEVICES, OPTIONS, TYPES, bits, guard, rows_of_tensors, table_of
from .memory import COLUMNS, chunk_of, load_block, load_stored, number_of, rounded, row_of, store_rounded
from .to_base import decayed


def takes(stepped: Stepped) -> bool:
    """Whether the kernel takes a tensor."""
    weight = stepped.weight
    known = weight.device.type in DEVICES and weight.dtype in TYPES and weight.dtype != torch.float64
    bases = () if stepped.base is None else (stepped.base,)
    alike = all(base.device == weight.device and base.dtype == weight.dtype for base in bases)
    plain = stepped.awake is True and stepped.averaged is None
    return known and plain and alike and is_flat(weight, stepped.before, *bases)


def decay_weights(tensors: Sequence[Stepped], decay: Decay) -> None:
    """Decay tensors that the kernel :func:`takes`, in place; the host does not wait.

    All must be of one device and dtype, and either all or none decay to a base.
    """
    device, dtype = tensors[0].weight.device, tensors[0].weight.dtype
    words, chunks = rows_of_tensors(
        {
            "weights": stepped.weight.data_ptr(),
            "grad": stepped.before.data_ptr(),
            "numel": stepped.weight.numel(),
            "place": stepped.place,
            "base": 0 if stepped.base is None else stepped.base.data_ptr(),
        }
        for stepped in tensors
    )
    alpha_lambda, finite = decay.alpha_lambda, decay.finite
    given = alpha_lambda.to(device) if isinstance(alpha_lambda, Tensor) else None
    flag = finite.to(device) if isinstance(finite, Tensor) else None
    numbers = bits((2 - decay.p_norm, 0.0 if isinstance(alpha_lambda, Tensor) else alpha_lambda, smallest(dtype)))
    if chunks:
        # Where α λ_p is known to be 0 there is nothing to do to changes.
        to_base = tensors[0].base is not None and (given is not None or alpha_lambda != 0)
        sizes = {"PARAM": TYPES[dtype], "TO_BASE": to_base, "CHUNK": CHUNK, "BLOCK": BLOCK}
        table, flags = table_of(words, device), (decay.step, int(decay.keep_zeros))
        with guard(device):
            decay_chunk[(chunks,)](table, given, flag, len(tensors), *numbers, *flags, **sizes, **OPTIONS)
        torch.autograd.graph.increment_version([stepped.weight for stepped in tensors])


@triton.jit(do_not_specialize=list(range(3, 9)))
def decay_chunk(
    table: tl.tensor,
    given: tl.tensor,
    finite: tl.tensor,
    rows: tl.int32,
    x: tl.int64,
    strength: tl.int64,
    least: tl.int64,
    step: tl.int64,
    keep_zeros: tl.int32,
    PARAM: tl.constexpr,
    TO_BASE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Decay one chunk of one tensor. Numbers come as the bits of a float64; α λ_p may be on the device."""
    words = table + row_of(table, rows) * COLUMNS
    begin, whole, end = chunk_of(words, CHUNK, BLOCK)
    if finite is not None:
        going = tl.load(finite.to(tl.pointer_type(tl.int8))).to(tl.int64)
        whole = begin + (whole - begin) * going
        end = begin + (end - begin) * going
    exponent = float64_of(x)
    alpha_lambda = float64_of(strength)
    if given is not None:
        alpha_lambda = tl.load(given).to(tl.float64)
    decays, log2, at_zero = felt(alpha_lambda, exponent, float64_of(least))
    at_zero = tl.where(decays, at_zero, 1.0)
    if not TO_BASE:
        at_zero = tl.where(keep_zeros != 0, 0.0, at_zero)
    at_zero = at_zero.to(tl.float32)
    minus_x = (-exponent).to(tl.float32)
    noise = seed_of(step.to(tl.uint32), tl.load(words + 8).to(tl.uint32))
    kept = keep_zeros != 0
    _decay(words, begin, whole, minus_x, log2.to(tl.float32), at_zero, kept, noise, PARAM, TO_BASE, BLOCK, True)
    _decay(words, whole, end, minus_x, log2.to(tl.float32), at_zero, kept, noise, PARAM, TO_BASE, BLOCK, False)


@triton.jit
def _decay(
    words: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    minus_x: tl.tensor,
    log2: tl.tensor,
    at_zero: tl.tensor,
    keeps_zeros: tl.tensor,
    noise_a: tl.tensor,
    PARAM: tl.constexpr,
    TO_BASE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    weight, before = tl.load(words + 1), tl.load(words + 2)
    noise_b = mix(noise_a ^ 0x68E31DA4)
    lane = tl.arange(0, BLOCK)
    for at in range(begin, end, BLOCK):
        mask = lane < tl.minimum(end - at, BLOCK).to(tl.int32)
        w = load_block(before, at, lane, mask, PARAM, WHOLE)
        change = w
        if TO_BASE:
            base = load_stored(tl.load(words + 10), at, lane, mask, PARAM, WHOLE)
            change = w - number_of(base, PARAM)
        factor = factor_of(change, minus_x, log2, at_zero, False)
        result = load_block(weight, at, lane, mask, PARAM, WHOLE)
        if not TO_BASE:
            result = scaled(result, factor, False)
        noise = tl.zeros([BLOCK], tl.uint32)
        if PARAM != tl.float32:
            a, b = noise_a.to(tl.float32, bitcast=True), noise_b.to(tl.float32, bitcast=True)
            noise = noise_of((at + lane).to(tl.uint32), a, b)
        if TO_BASE:
            stored = decayed(result, change, factor, base, (w == 0) & keeps_zeros, noise, PARAM, False)
        else:
            stored = rounded(result, noise, PARAM, False)
        store_rounded(weight, at, lane, mask, stored, PARAM, WHOLE)
