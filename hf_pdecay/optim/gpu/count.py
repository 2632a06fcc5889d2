"""Counting zeros on a GPU, by one launch for all tensors of a dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensor_step import is_flat
from .launch import BLOCK, DEVICES, OPTIONS, TYPES, guard, rows_of_tensors, table_of
from .memory import COLUMNS, chunk_of, load_block, row_of


_CHUNK = 16 * BLOCK  # elements of a program: many, because programs add to the same memory


def countable(weights: Tensor) -> bool:
    """Whether the kernel counts a tensor."""
    return weights.device.type in DEVICES and weights.dtype in TYPES and is_flat(weights)


def count_zeros(tensors: Sequence[Tensor], threshold: float) -> Tensor:
    """Count zeros and weights below a threshold; the host does not wait.

    All tensors must be :func:`countable` and of one device and dtype, to which the threshold is rounded. Returns an
    int64 tensor of shape ``(len(tensors), 2)``: zeros, and weights below the threshold including zeros.
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    columns = ({"weights": tensor.data_ptr(), "numel": tensor.numel()} for tensor in tensors)
    words, chunks = rows_of_tensors(columns, _CHUNK)
    counts = torch.zeros(len(tensors), 2, dtype=torch.int64, device=device)
    if chunks:
        limit = float(torch.tensor(threshold, dtype=dtype))
        sizes = {"PARAM": TYPES[dtype], "CHUNK": _CHUNK, "BLOCK": BLOCK}
        with guard(device):
            count[(chunks,)](table_of(words, device), counts, len(tensors), limit, **sizes, **OPTIONS)
    return counts


@triton.jit(do_not_specialize=["rows"])
def count(
    table: tl.tensor,
    counts: tl.tensor,
    rows: tl.int32,
    threshold: tl.float32,
    PARAM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add the zeros of one chunk and its weights below a threshold to the two int64 counts of a tensor."""
    row = row_of(table, rows)
    words = table + row * COLUMNS
    begin, whole, end = chunk_of(words, CHUNK, BLOCK)
    weights = tl.load(words + 1)
    zeros_a, below_a = _counted(weights, begin, whole, threshold, PARAM, BLOCK, True)
    zeros_b, below_b = _counted(weights, whole, end, threshold, PARAM, BLOCK, False)
    tl.atomic_add(counts + 2 * row, (zeros_a + zeros_b).to(tl.int64))
    tl.atomic_add(counts + 2 * row + 1, (below_a + below_b).to(tl.int64))


@triton.jit
def _counted(
    weights: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    threshold: tl.tensor,
    PARAM: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    lane = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], tl.int32)
    below = tl.zeros([BLOCK], tl.int32)
    for at in range(begin, end, BLOCK):
        mask = lane < tl.minimum(end - at, BLOCK).to(tl.int32)
        w = load_block(weights, at, lane, mask, PARAM, WHOLE)
        zeros += ((w == 0) & mask).to(tl.int32)
        below += ((tl.abs(w) < threshold) & mask).to(tl.int32)
    return tl.sum(zeros, 0), tl.sum(below, 0)
