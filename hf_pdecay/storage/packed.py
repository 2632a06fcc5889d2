"""A matrix of a compressed file as rows of bits and packed values, without its dense form."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .bits import transpose
from .container import FormatError
from .encoding import BITMASK, Blob, Bytes, gap_indices, opened


WORD = 64
"""Weights of a word of the masks: rows are padded to whole words."""

_ELEMENTS = 1 << 22  # of a block: besides input and result, this module needs the memory of a few blocks
_BYTE = 8


class Packed(NamedTuple):
    """A matrix of (rows, columns).

    Attributes:
        masks: Of shape (rows, 8 * words): element j of a row has a value if bit j mod 8 of byte j // 8 is 1.
        values: The values, row by row, as unsigned integers, and then some zeros.
        number: The number of values.
        shape: (rows, columns).
    """

    masks: Bytes
    values: Any
    number: int
    shape: tuple[int, int]


def read_packed(stored: Bytes, limit: int, what: str, transposed: bool = False, beyond: int = 0) -> Packed:
    """Return the matrix that a block with the encoding bitmask or index holds, or its transpose.

    Negative zeros of a block with the signs of zeros become zeros. Takes the memory of the result, for a transpose that
    of the block too, and a few blocks of 4 million elements.

    Args:
        stored: The block.
        limit: The most bytes that bits and values may have.
        what: Begins the messages of errors.
        transposed: Whether to return the transpose.
        beyond: Bytes of zeros after the values.

    Raises:
        FormatError: If the block is damaged or forged, or, before memory is taken, if the limit is too low.
        ValueError: If zstandard is needed and not installed.
    """
    head, payload = opened(stored, what)
    rows, columns = head.shape
    size = max(rows, columns) * -(-min(rows, columns) // WORD) * _BYTE + head.values * head.itemsize
    if size > limit:
        raise FormatError(f"{what} needs {size} bytes; at most {limit} bytes are possible.")
    bits = payload[: head.places] if head.encoding == BITMASK else _bits(payload[: head.places], head)
    values = payload[head.places : head.places + head.values * head.itemsize].view(f"<u{head.itemsize}")
    masks = _padded_rows(bits, rows, columns)
    held = np.zeros(head.values + beyond // head.itemsize, dtype=values.dtype)
    if not transposed:
        held[: head.values] = values
        return Packed(masks, held, head.values, (rows, columns))
    return Packed(_transpose(masks, values, held, (rows, columns)), held, head.values, (columns, rows))


def _bits(gaps: Bytes, head: Blob) -> Bytes:
    """The bitmask of a block of gaps."""
    bits = np.zeros(-(-head.numel // _BYTE), dtype=np.uint8)
    for begin, indices in gap_indices(gaps, head):
        if not indices.size:
            continue
        places = indices + begin
        there = places // _BYTE
        first = np.flatnonzero(np.diff(there, prepend=-1))
        bits[there[first]] |= np.add.reduceat(np.left_shift(1, places % _BYTE), first).astype(np.uint8)
    return bits


def _padded_rows(bits: Bytes, rows: int, columns: int) -> Bytes:
    """Rows of whole words, from bits without gaps between the rows."""
    width = -(-columns // WORD) * _BYTE
    if columns % WORD == 0:
        return np.array(bits).reshape(rows, width)
    masks = np.zeros((rows, width), dtype=np.uint8)
    if columns % _BYTE == 0:
        masks[:, : columns // _BYTE] = bits.reshape(rows, -1)
        return masks
    step = max(_ELEMENTS // columns // _BYTE, 1) * _BYTE  # so that each block begins with a byte
    for first in range(0, rows, step):
        last = min(first + step, rows)
        part = bits[first * columns // _BYTE : -(-last * columns // _BYTE)]
        marks = np.unpackbits(part, count=(last - first) * columns, bitorder="little").reshape(-1, columns)
        masks[first:last, : -(-columns // _BYTE)] = np.packbits(marks, axis=1, bitorder="little")
    return masks


def _transpose(masks: Bytes, values: Any, held: Any, shape: tuple[int, int]) -> Bytes:
    """Write the values of the transpose into ``held``, and return its masks."""
    rows, columns = shape
    result = np.zeros((columns, -(-rows // WORD) * _BYTE), dtype=np.uint8)
    if transpose(masks, values, shape, result, held):
        return result
    counts = np.bitwise_count(masks).sum(1, dtype=np.int64)
    following = np.cumsum(counts) - counts  # of each row, the index of its first value that is not taken yet
    step = max(_ELEMENTS // max(rows, 1) // _BYTE, 1) * _BYTE
    taken = 0
    for first in range(0, columns, step):
        last = min(first + step, columns)
        marks = np.unpackbits(
            masks[:, first // _BYTE : -(-last // _BYTE)], axis=1, count=last - first, bitorder="little"
        )
        ranks = np.cumsum(marks, axis=1, dtype=np.int32)
        upright = np.ascontiguousarray(marks.T)
        result[first:last, : -(-rows // _BYTE)] = np.packbits(upright, axis=1, bitorder="little")
        sources = (ranks + (following - 1)[:, None]).T[upright.view(np.bool_)]
        held[taken : taken + sources.size] = values[sources]
        taken += sources.size
        following += ranks[:, -1]
    return result
