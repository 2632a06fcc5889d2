"""Places values where a bitmask has ones: by compiled C++ if there is some already, else by numpy."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .zstd_planes import Bytes


SOURCES = (Path(__file__).with_name("bits.cpp"),)

_CHUNK = 1 << 18  # elements
# Loading a model must not compile anything, unless it was asked for.
_compiling = False


def compile_functions() -> None:
    """Compile the C++ functions, if they are not compiled yet and there is a compiler."""
    global _compiling
    _compiling = True
    library()


def library() -> ctypes.CDLL | None:
    """Return the compiled functions, or None if there are none yet, or if the process has not imported torch."""
    if sys.byteorder != "little" or "torch" not in sys.modules:  # compressing needs no torch, nor its memory
        return None
    from ..optim.cpu.native import load  # which imports it

    return load(SOURCES, "Loading compressed models", "functions", compiling=_compiling)[0]


def expand(bits: Bytes, values: Any, result: Any) -> None:
    """Write values to those elements of ``result``, of one dimension and zero before, whose bit is 1, in order.

    There must be as many values as ones.
    """
    compiled = library()
    if compiled is not None:
        count = ctypes.c_int64(result.size)
        compiled.hf_pdecay_expand(result.itemsize, _address(bits), _address(values), count, _address(result))
        return
    taken = 0
    for begin in range(0, result.size, _CHUNK):
        marks = np.unpackbits(bits[begin // 8 : (begin + _CHUNK) // 8], bitorder="little")
        indices = np.flatnonzero(marks.view(np.bool_))  # numpy is faster for booleans
        result[begin:][indices] = values[taken : taken + indices.size]
        taken += indices.size


def transpose(masks: Bytes, values: Any, shape: tuple[int, int], masks_out: Bytes, values_out: Any) -> bool:
    """Write the bits and values of a matrix's transpose, see :class:`.packed.Packed`; False if nothing is compiled.

    ``shape`` is (rows, columns) of the matrix. ``masks_out`` must be zero before.
    """
    compiled = library()
    if compiled is not None:
        rows, columns = map(ctypes.c_int64, shape)
        given = values.itemsize, _address(masks), _address(values), rows, columns
        compiled.hf_pdecay_transpose_bits(*given, _address(masks_out), _address(values_out))
    return compiled is not None


def _address(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
