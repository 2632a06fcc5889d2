"""Places of values, as a bitmask or as gaps: by compiled C++ if there is some already, else by numpy."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .coded import CodeForm, symbols_at, values_at
from .zstd_planes import Bytes


SOURCES = (Path(__file__).with_name("bits.cpp"),)

_CHUNK = 1 << 18  # elements
_KINDS = {"F32": 0, "BF16": 1, "F16": 2}
# Loading a model must not compile anything, unless it was asked for.
_compiling = False


class Rows(NamedTuple):
    """The values of a matrix, row by row.

    Attributes:
        starts: The index of the first value of each row, and then the number of values: int64.
        columns: The column of each value: uint16, or uint32 if there are more than 65,536 columns.
        values: The values.
    """

    starts: Any
    columns: Any
    values: Any


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


def ones(bits: Bytes) -> int:
    """Return the number of ones; fastest for a multiple of 8 bytes."""
    words = bits.view(np.uint64) if bits.size % 8 == 0 else bits
    return int(np.bitwise_count(words).sum(dtype=np.int64))


def expand(width: int, places: Bytes, values: Any, result: Any) -> None:
    """Write values to their places in ``result``, of one dimension and zero before, in order.

    There must be as many values as places, which are gaps of ``width`` bytes, or ones of a bitmask if that is 0.
    """
    compiled = library()
    if compiled is not None:
        compiled.hf_pdecay_expand(
            *(width, _address(places), values.itemsize, _address(values)),
            *(_whole(values.size), _whole(result.size), _address(result)),
        )
        return
    put(width, places, values, result)


def put(width: int, places: Bytes, values: Any, result: Any) -> None:
    """Write values to their places in ``result``, of one dimension, and leave all others; see :func:`expand`."""
    taken = 0
    for begin, indices in _chunks(width, places, result.size):
        result[begin:][indices] = values[taken : taken + indices.size]
        taken += indices.size


def indices_of(width: int, places: Bytes, size: int) -> Any:
    """Return the places among ``size`` elements as int64, in order."""
    found = [indices + begin for begin, indices in _chunks(width, places, size)]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def decode_values(
    width: int,
    places: Bytes,
    symbols: Bytes,
    form: CodeForm,
    numel: int,
    number: int,
    dtype: str,
    scales: Any,
    offsets: Any,
    result: Any,
    *,
    at_places: bool,
) -> None:
    """Write the elements of a tensor of ``numel`` elements for which there are symbols.

    Args:
        width: As for :func:`expand`, or -1 if all elements have one.
        places: Where they are.
        symbols: One for each.
        form: How they are stored.
        numel: Of the tensor.
        number: Of the symbols.
        dtype: Of the elements.
        scales: Of all blocks, in float32.
        offsets: The same, or None.
        result: Gets the elements' bits.
        at_places: Whether they go to their places, or one after the other.
    """
    compiled = library()
    if compiled is not None:
        levels = np.zeros(256, dtype=np.float32)
        levels[: len(form.levels)] = form.levels
        compiled.hf_pdecay_decode(
            *(width, _address(places), _address(symbols), form.bits, _whole(number), _whole(numel)),
            *(_whole(form.inputs), _whole(form.inner), _whole(form.block), _address(levels)),
            *(_address(scales), None if offsets is None else _address(offsets)),
            *(_KINDS[dtype], int(at_places), _address(result)),
        )
        return
    taken = 0
    for begin, indices in _chunks(width, places, numel):
        found = symbols_at(symbols, form.bits, taken, indices.size)
        where = result[begin:] if at_places else result[taken:]
        where[indices if at_places else slice(indices.size)] = values_at(
            indices + begin, found, form, scales, offsets, dtype
        )
        taken += indices.size


def unplane(planes: Bytes, width: int, result: Bytes) -> None:
    """Write elements from their bytes: all first bytes are given, then all second ones, and so on."""
    compiled = library() if width > 1 else None
    if compiled is not None and width in (2, 4, 8):
        compiled.hf_pdecay_unplane(width, _address(planes), _whole(planes.size // width), _address(result))
        return
    result.reshape(-1, width)[:] = planes.reshape(width, -1).T


def rows_of(width: int, places: Bytes, values: Any, shape: tuple[int, int]) -> Rows:
    """Return the rows of a matrix of (rows, columns); the values are the ones given."""
    rows, columns = shape
    starts = np.zeros(rows + 1, dtype=np.int64)
    found = np.empty(values.size, dtype=_index(columns))
    compiled = library()
    if compiled is not None:
        compiled.hf_pdecay_rows(
            *(width, _address(places), _whole(values.size), _whole(rows), _whole(columns)),
            *(_address(starts), found.itemsize, _address(found)),
        )
        return Rows(starts, found, values)
    taken = 0
    for begin, indices in _chunks(width, places, rows * columns):
        row, column = np.divmod(indices + begin, columns)
        found[taken : taken + indices.size] = column
        _count(starts[1:], row)
        taken += indices.size
    np.cumsum(starts, out=starts)
    return Rows(starts, found, values)


def columns_of(width: int, places: Bytes, values: Any, shape: tuple[int, int]) -> Rows:
    """Return the rows of the transpose of a matrix of (rows, columns)."""
    rows, columns = shape
    starts = np.zeros(columns + 1, dtype=np.int64)
    found, held = np.empty(values.size, dtype=_index(rows)), np.empty(values.size, dtype=values.dtype)
    compiled = library()
    if compiled is not None:
        compiled.hf_pdecay_columns(
            *(width, _address(places), values.itemsize, _address(values), _whole(values.size)),
            *(_whole(rows), _whole(columns), _address(starts), found.itemsize, _address(found), _address(held)),
        )
        return Rows(starts, found, held)
    for begin, indices in _chunks(width, places, rows * columns):
        _count(starts[1:], (indices + begin) % columns)
    np.cumsum(starts, out=starts)
    following, taken = starts[:-1].copy(), 0  # of each column, where its next value goes
    for begin, indices in _chunks(width, places, rows * columns):
        row, column = np.divmod(indices + begin, columns)
        order = np.argsort(column, kind="stable")
        column = column[order]
        there = following[column] + np.arange(order.size) - np.searchsorted(column, column)
        found[there], held[there] = row[order], values[taken : taken + order.size][order]
        _count(following, column)
        taken += order.size
    return Rows(starts, found, held)


def turned(places: Bytes, values: Any, shape: tuple[int, int], beyond: int) -> tuple[Bytes, Any] | None:
    """Return the transpose of a matrix of (rows, columns) in a bitmask; None if nothing is compiled.

    That is its bits, of shape (columns, 8 * words), and its values, with some bytes of zeros beyond them.
    """
    compiled = library()
    if compiled is None:
        return None
    rows, columns = shape
    masks = np.empty((columns, -(-rows // 64) * 8), dtype=np.uint8)
    held = np.zeros(values.size + beyond // values.itemsize, dtype=values.dtype)
    compiled.hf_pdecay_turn(
        *(_address(places), values.itemsize, _address(values), _whole(values.size)),
        *(_whole(rows), _whole(columns), _address(masks), _address(held)),
    )
    return masks, held


def masks_of(rows: Rows, width: int) -> Bytes:
    """Return the bits of the values of each row, of shape (rows, ``width``)."""
    count = len(rows.starts) - 1
    masks = np.zeros((count, width), dtype=np.uint8)
    compiled = library()
    if compiled is not None:
        compiled.hf_pdecay_mark(
            *(_address(rows.starts), rows.columns.itemsize, _address(rows.columns)),
            *(_whole(count), _whole(width), _address(masks)),
        )
        return masks
    step = max(_CHUNK // max(8 * width, 1), 1)
    for first in range(0, count, step):
        starts = rows.starts[first : first + step + 1]
        marks = np.zeros((len(starts) - 1, 8 * width), dtype=np.bool_)
        row = np.repeat(np.arange(len(marks)), np.diff(starts))
        marks[row, rows.columns[starts[0] : starts[-1]]] = True
        masks[first : first + step] = np.packbits(marks, axis=1, bitorder="little")
    return masks


def _chunks(width: int, places: Bytes, size: int) -> Iterator[tuple[int, Any]]:
    """Yield the places of values among ``size`` elements, some at a time: an element, and the places from there."""
    if width < 0:
        for begin in range(0, size, _CHUNK):
            yield begin, np.arange(min(_CHUNK, size - begin))
        return
    if width == 0:
        for begin in range(0, size, _CHUNK):
            marks = np.unpackbits(places[begin // 8 : (begin + _CHUNK) // 8], bitorder="little")
            yield begin, np.flatnonzero(marks.view(np.bool_))  # numpy is faster for booleans
        return
    begin = 0
    for first in range(0, places.size, _CHUNK * width):
        gaps = places[first : first + _CHUNK * width].view(f"<u{width}")
        indices = np.cumsum(gaps.astype(np.int64) + 1) - 1
        yield begin, indices
        begin += int(indices[-1]) + 1


def _count(counts: Any, numbers: Any) -> None:
    """Add to each count how often its index is among some numbers."""
    if numbers.size:
        first = int(numbers.min())
        found = np.bincount(numbers - first)
        counts[first : first + found.size] += found


def _index(columns: int) -> Any:
    return np.uint16 if columns <= 1 << 16 else np.uint32


def _whole(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


def _address(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
