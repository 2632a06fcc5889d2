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
from .memory import COLUMNS, chunk_of, load_block, row_of, store_block


def takes(stepped: Stepped) -> bool:
    """Whether the kernel takes a tensor."""
    weight = stepped.weight
    known = weight.device.type in DEVICES and weight.dtype in TYPES and weight.dtype != torch.float64
    plain = stepped.averaged is None and stepped.base is None
    return known and stepped.awake is True and plain and is_flat(weight, stepped.before)


def decay_weights(tensors: Sequence[Stepped], decay: Decay) -> None:
    """Decay tensors of one device and dtype that the kernel :func:`takes`, in place; the host does not wait."""
    device, dtype = tensors[0].weight.device, tensors[0].weight.dtype
    words, chunks = rows_of_tensors(
        {
            "weights": stepped.weight.data_ptr(),
            "grad": stepped.before.data_ptr(),
            "numel": stepped.weight.numel(),
            "place": stepped.place,
        }
        for stepped in tensors
    )
    alpha_lambda, finite = decay.alpha_lambda, decay.finite
    given = alpha_lambda.to(device) if isinstance(alpha_lambda, Tensor) else None
    flag = finite.to(device) if isinstance(finite, Tensor) else None
    numbers = bits((2 - decay.p_norm, 0.0 if isinstance(alpha_lambda, Tensor) else alpha_lambda, smallest(dtype)))
    if chunks:
        sizes = {"PARAM": TYPES[dtype], "CHUNK": CHUNK, "BLOCK": BLOCK}
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
    at_zero = tl.where(keep_zeros != 0, 0.0, tl.where(decays, at_zero, 1.0)).to(tl.float32)
    minus_x = (-exponent).to(tl.float32)
    noise = seed_of(step.to(tl.uint32), tl.load(words + 8).to(tl.uint32))
    _decay(words, begin, whole, minus_x, log2.to(tl.float32), at_zero, noise, PARAM, BLOCK, True)
    _decay(words, whole, end, minus_x, log2.to(tl.float32), at_zero, noise, PARAM, BLOCK, False)


@triton.jit
def _decay(
    words: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    minus_x: tl.tensor,
    log2: tl.tensor,
    at_zero: tl.tensor,
    noise_a: tl.tensor,
    PARAM: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    weight, before = tl.load(words + 1), tl.load(words + 2)
    noise_b = mix(noise_a ^ 0x68E31DA4)
    lane = tl.arange(0, BLOCK)
    for at in range(begin, end, BLOCK):
        mask = lane < tl.minimum(end - at, BLOCK).to(tl.int32)
        w = load_block(before, at, lane, mask, PARAM, WHOLE)
        factor = factor_of(w, minus_x, log2, at_zero, False)
        result = scaled(load_block(weight, at, lane, mask, PARAM, WHOLE), factor, False)
        noise = tl.zeros([BLOCK], tl.uint32)
        if PARAM != tl.float32:
            a, b = noise_a.to(tl.float32, bitcast=True), noise_b.to(tl.float32, bitcast=True)
            noise = noise_of((at + lane).to(tl.uint32), a, b)
        store_block(weight, at, lane, mask, result, noise, PARAM, False, WHOLE)
