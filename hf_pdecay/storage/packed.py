"""A matrix of a compressed file as rows of bits or of columns, and packed values, without its dense form."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .bits import Rows, columns_of, masks_of, rows_of, turned
from .encoding import BITMASK, Blob, Bytes, codes_and_scales, opened, values_of, with_plain_values


WORD = 64
"""Weights of a word of the masks: rows are padded to whole words."""

_BYTE = 8


class Packed(NamedTuple):
    """A matrix of (rows, columns).

    Attributes:
        masks: Of shape (rows, 8 * words): element j of a row has a value if bit j mod 8 of byte j // 8 is 1.
        values: The values, row by row, as unsigned integers, and then some more bytes of any content.
        number: The number of values.
    """

    masks: Bytes
    values: Any
    number: int


def packed_bytes(head: Blob, transposed: bool) -> int:
    """Return the most bytes that a matrix takes as bits or columns and values."""
    rows, columns = reversed(head.shape) if transposed else head.shape
    return rows * (-(-columns // WORD) * _BYTE + _BYTE) + head.values * (head.itemsize + 4)


class PackedBlock:
    """The matrix that a block with the encoding bitmask or index holds, or its transpose.

    Negative zeros of a block with the signs of zeros become zeros. What it returns shares the memory of the block if
    that has it already.

    Args:
        stored: The block, and what follows it in the file.
        size: The bytes of the block.
        what: Begins the messages of errors.
        transposed: Whether it is the transpose.

    Raises:
        FormatError: If the block is damaged or forged.
        ValueError: If zstandard is needed and not installed.
    """

    def __init__(self, stored: Bytes, size: int, what: str, transposed: bool = False) -> None:
        self._coded = opened(stored, what, size=size)
        self._head, self._payload = with_plain_values(*self._coded)
        rows, columns = self._head.shape
        self._stored_shape, self._transposed = (rows, columns), transposed
        self.shape = (columns, rows) if transposed else (rows, columns)

    @property
    def number(self) -> int:
        """The number of values."""
        return self._head.values

    @property
    def values(self) -> Any:
        """The values as unsigned integers, in the order of the file."""
        return values_of(self._head, self._payload)

    def codes(self) -> tuple[Any, Any, int] | None:
        """Return the matrix of the codes, the scales of each row's blocks, and inputs of a block; None without such."""
        head, payload = self._coded
        form, (rows, columns) = head.codes, self._stored_shape
        lies = (1, columns) if not self._transposed else (columns, rows)
        if form is None or form.offset_bytes or (form.inner, form.inputs) != lies:
            return None
        codes, scales = codes_and_scales(head, payload)
        codes = codes.reshape(rows, columns)
        if not self._transposed:
            return codes, scales.reshape(rows, -1), form.block
        return np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.reshape(-1, columns).T), form.block

    def rows(self) -> Rows:
        """Return the values row by row, with their columns."""
        found = self._turned(0)
        if found is not None:
            masks, values = found
            return rows_of(0, masks.reshape(-1), values, (len(masks), masks.shape[1] * _BYTE))
        find = columns_of if self._transposed else rows_of
        return find(self._head.width, self._places, self.values, self._stored_shape)

    def packed(self, beyond: int) -> Packed:
        """Return bits and values, with at least some bytes beyond these."""
        rows, columns = self._stored_shape
        if self._head.encoding == BITMASK and not self._transposed and columns % _BYTE == 0:
            return Packed(self._masks(), self._values(beyond), self.number)
        transpose = self._turned(beyond)
        if transpose is not None:
            return Packed(*transpose, self.number)
        found = self.rows()
        masks = masks_of(found, -(-self.shape[1] // WORD) * _BYTE)
        if not self._transposed:
            return Packed(masks, self._values(beyond), self.number)
        return Packed(masks, _longer(found.values, beyond), self.number)

    @property
    def _places(self) -> Bytes:
        return self._payload[: self._head.places]

    def _turned(self, beyond: int) -> tuple[Bytes, Any] | None:
        """Bits and values of the transpose of a bitmask, if compiled functions can make them."""
        if not self._transposed or self._head.encoding != BITMASK:
            return None
        return turned(self._places, self.values, self._stored_shape, beyond)

    def _masks(self) -> Bytes:
        """Rows of whole words from a bitmask whose rows are whole bytes."""
        rows, columns = self._stored_shape
        if columns % WORD == 0 and _may_be_shared(self._places, _BYTE):
            return self._places.reshape(rows, columns // _BYTE)
        masks = np.zeros((rows, -(-columns // WORD) * _BYTE), dtype=np.uint8)
        masks[:, : columns // _BYTE] = self._places.reshape(rows, -1)
        return masks

    def _values(self, beyond: int) -> Any:
        head = self._head
        last = head.places + head.values * head.itemsize + beyond
        if last > self._payload.size or not _may_be_shared(self.values, head.itemsize):
            return _longer(self.values, beyond)
        return self._payload[head.places : last].view(self.values.dtype)


def _may_be_shared(array: Any, size: int) -> bool:
    return bool(array.flags.writeable and array.ctypes.data % size == 0)


def _longer(values: Any, beyond: int) -> Any:
    result = np.zeros(values.size + beyond // values.itemsize, dtype=values.dtype)
    result[: values.size] = values
    return result
