"""The compiled C++ products, and the forms of the values that they multiply."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..optim.cpu.native import load


SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp") for name in ("values", "sparse_product", "bitmask_product", "list_product")
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of layers, and of values that are stored as they are."""

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
VALUES = {str(dtype).removeprefix("torch."): dtype for dtype in _KINDS}
"""Dtypes of stored values, by name."""


def kind_of(values: Tensor) -> int:
    """Return the number by which C++ knows a dtype."""
    return _KINDS[values.dtype]


def kept_of(numbers: Tensor, kept: Tensor) -> Tensor:
    """Return the numbers of a CPU tensor that a mask keeps, in order: ``numbers[kept]``, by numpy's faster loop."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32}[numbers.element_size()]
    found = np.compress(kept.reshape(-1).numpy(), numbers.contiguous().view(words).view(-1).numpy())
    return torch.from_numpy(found).view(numbers.dtype)


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor's memory begins; None for None."""
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled products; None without a C++ compiler. The first call on a machine compiles them."""
    compiled, _ = load(SOURCES, "Sparse inference", "products")
    return None if compiled is None else declared(compiled)


def declared(compiled: ctypes.CDLL) -> ctypes.CDLL:
    """Return the compiled products, knowing the types of their arguments."""
    pointer, number, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    compiled.hf_pdecay_block_rows.restype = whole
    compiled.hf_pdecay_sparse_product.restype = None
    compiled.hf_pdecay_sparse_product.argtypes = (
        *(whole, whole, pointer, pointer, pointer, pointer, number, number),
        *(pointer, number, pointer, pointer, whole),
    )
    weight = whole, pointer, pointer, pointer, pointer
    compiled.hf_pdecay_bitmask_rows.restype = whole
    compiled.hf_pdecay_bitmask_product.restype = None
    compiled.hf_pdecay_bitmask_product.argtypes = (
        *(*weight, pointer, pointer, number, number, number),
        *(pointer, whole, number, pointer, pointer, whole),
    )
    compiled.hf_pdecay_bitmask_dense.restype = None
    compiled.hf_pdecay_bitmask_dense.argtypes = (
        *(*(whole, *weight), number, number, number, number),
        *(pointer, pointer, whole),
    )
    compiled.hf_pdecay_list_rows.restype = whole
    compiled.hf_pdecay_list_rows.argtypes = whole, whole
    compiled.hf_pdecay_list_product.restype = whole
    compiled.hf_pdecay_list_product.argtypes = (
        *(whole, *weight, pointer, number, number, number),
        *(pointer, number, pointer, pointer, whole),
    )
    return compiled
