"""The shrink of weights that another optimizer has stepped, on a GPU: one launch for all tensors of a dtype."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensor_step import Decay, is_flat, smallest
from .kernels import COLUMNS, chunk_of, factor_of, float64_of, load_block, mix, noise_of, row_of, store_block
from .step import ALIGNMENT, BLOCK, DEVICES, OPTIONS, TYPES, bits, guard, table_of


if TYPE_CHECKING:
    from ..tensor_step import Stepped

_CHUNK = 4 * BLOCK  # elements of a program, over which finding their tensor is spread


def takes(each: Stepped) -> bool:
    """Whether the kernel shrinks a tensor."""
    weight = each.weight
    known = weight.device.type in DEVICES and weight.dtype in TYPES and weight.dtype != torch.float64
    return known and each.awake is True and each.averaged is None and is_flat(weight, each.before)


def decay_all(tensors: Sequence[Stepped], decay: Decay) -> None:
    """Shrink weights in place; the host does not wait.

    Args:
        tensors: Tensors of one device and dtype that the kernel :func:`takes`.
        decay: See there.
    """
    device, dtype = tensors[0].weight.device, tensors[0].weight.dtype
    words = array("q")
    chunks = 0
    for weight, before, _, _, place in tensors:
        addresses = weight.data_ptr(), before.data_ptr()
        aligned = all(address % ALIGNMENT == 0 for address in addresses)
        row = (chunks, *addresses, 0, 0, 0, 0, weight.numel(), place, aligned)
        words.extend(row[: COLUMNS.value])
        chunks += triton.cdiv(weight.numel(), _CHUNK)
    strength, finite = decay.alpha_lambda, decay.finite
    given = strength.to(device) if isinstance(strength, Tensor) else None
    flag = finite.to(device) if isinstance(finite, Tensor) else None
    numbers = bits((2 - decay.p_norm, 0.0 if isinstance(strength, Tensor) else strength, smallest(dtype)))
    if chunks:
        sizes = {"PARAM": TYPES[dtype], "CHUNK": _CHUNK, "BLOCK": BLOCK}
        table = table_of(words, device)
        with guard(device):
            shrink[(chunks,)](
                table, given, flag, len(tensors), *numbers, decay.step, int(decay.keep_zeros), **sizes, **OPTIONS
            )
        torch.autograd.graph.increment_version([each.weight for each in tensors])


@triton.jit(do_not_specialize=list(range(3, 9)))
def shrink(
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
    """Shrink one chunk of one tensor. Numbers come as the bits of a float64, or α λ_p on the device."""
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
    decays = alpha_lambda >= float64_of(least)
    log2 = tl.where(decays, tl.log2(tl.where(decays, alpha_lambda, 1.0)), float("-inf")).to(tl.float32)
    at_zero = tl.where(exponent > 0, 0.0, tl.where(exponent == 0, 1.0 / (1.0 + alpha_lambda), 1.0))
    at_zero = tl.where(keep_zeros != 0, 0.0, tl.where(decays, at_zero, 1.0)).to(tl.float32)
    minus_x = (-exponent).to(tl.float32)
    noise = mix(step.to(tl.uint32) + tl.load(words + 8).to(tl.uint32) * 0x9E3779B9)
    _shrunk(words, begin, whole, minus_x, log2, at_zero, noise, PARAM, BLOCK, True)
    _shrunk(words, whole, end, minus_x, log2, at_zero, noise, PARAM, BLOCK, False)


@triton.jit
def _shrunk(
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
        factor = tl.where(w == 0, at_zero, factor_of(tl.abs(w), minus_x, log2, False))
        result = load_block(weight, at, lane, mask, PARAM, WHOLE) * factor
        normal = tl.where(factor < 1.0, 2.0**-126, 0.0)
        result = tl.where((result == 0) | (tl.abs(result) < normal), 0.0, result)
        noise = tl.zeros([BLOCK], tl.uint32)
        if PARAM != tl.float32:
            a, b = noise_a.to(tl.float32, bitcast=True), noise_b.to(tl.float32, bitcast=True)
            noise = noise_of((at + lane).to(tl.uint32), a, b)
        store_block(weight, at, lane, mask, result, noise, PARAM, False, WHOLE)
