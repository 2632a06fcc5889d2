"""Weights as codes: whole numbers times the scale of a block of consecutive inputs, and an offset of the block."""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple, NoReturn

import numpy as np

from .container import FormatError
from .floats import is_short, rounded, widened
from .zstd_planes import Bytes, Sections


# inputs, inner, block, the number of codes minus 1, bytes of a scale and of an offset.
_FIXED = struct.Struct("<QQIBBBx")
_SYMBOL_BITS = (1, 2, 4, 8)
_MOST_CODES = 256
MOST_BYTES = _FIXED.size + _MOST_CODES
"""Bytes of the longest description of codes in a head."""

CODED = ("F16", "BF16", "F32")
"""Dtypes that may have codes."""


class CodeForm(NamedTuple):
    """How the codes of a tensor are stored.

    The tensor is seen as (outer, inputs, inner), with blocks along the inputs; the last one of a row may be shorter.

    Attributes:
        inputs: Its second dimension.
        inner: Its third dimension.
        block: Inputs that share a scale.
        levels: The codes that occur, each at most once: what a symbol of 0, 1 and so on stands for.
        scale_bytes: 2 for bfloat16, 4 for float32.
        offset_bytes: The same, or 0 without offsets.
    """

    inputs: int
    inner: int
    block: int
    levels: tuple[int, ...]
    scale_bytes: int
    offset_bytes: int

    @property
    def bits(self) -> int:
        """Bits of a symbol."""
        return symbol_bits(len(self.levels))

    @property
    def row_blocks(self) -> int:
        """Blocks of a row of inputs."""
        return -(-self.inputs // self.block)

    def blocks(self, numel: int) -> int:
        """Blocks of a tensor."""
        return numel // max(self.inputs, 1) * self.row_blocks

    def sections(self, numel: int, values: int) -> Sections:
        """Return the bytes of scales, offsets and symbols, and of their elements."""
        blocks = self.blocks(numel)
        scales = blocks * self.scale_bytes, self.scale_bytes
        offsets = blocks * self.offset_bytes, self.offset_bytes or 1
        return [scales, offsets, (-(-values * self.bits // 8), 1)]

    def packed(self) -> bytes:
        """Return the description in a head, a multiple of 8 bytes."""
        sizes = len(self.levels) - 1, self.scale_bytes, self.offset_bytes
        levels = struct.pack(f"<{len(self.levels)}b", *self.levels)
        return _FIXED.pack(self.inputs, self.inner, self.block, *sizes) + levels.ljust(_padded(len(levels)), b"\0")


class Codes(NamedTuple):
    """The codes of a tensor.

    Attributes:
        inputs: As of a :class:`CodeForm`.
        inner: The same.
        block: The same.
        codes: For each element, in the order of the tensor; int8.
        scales: For each block, in the order (outer, blocks, inner); float32.
        offsets: The same, or None.
    """

    inputs: int
    inner: int
    block: int
    codes: Any
    scales: Any
    offsets: Any

    def form(self, kept: Any) -> CodeForm:
        """Return how they are stored if only some elements are."""
        codes = self.codes if kept is None else self.codes[kept]
        levels = np.flatnonzero(np.bincount(codes.view(np.uint8), minlength=_MOST_CODES)).astype(np.uint8)
        found = tuple(sorted(levels.view(np.int8).tolist())) or (0,)
        sizes = [0 if each is None else 2 if is_short(each) else 4 for each in (self.scales, self.offsets)]
        return CodeForm(self.inputs, self.inner, self.block, found, *sizes)

    def payload(self, form: CodeForm, kept: Any) -> list[Bytes]:
        """Return scales, offsets and symbols as bytes."""
        table = np.zeros(_MOST_CODES, dtype=np.uint8)
        table[np.array(form.levels, dtype=np.int8).view(np.uint8)] = np.arange(len(form.levels))
        symbols = table[(self.codes if kept is None else self.codes[kept]).view(np.uint8)]
        scales, offsets = _stored(self.scales, form.scale_bytes), _stored(self.offsets, form.offset_bytes)
        return [scales, offsets, _pack(symbols, form.bits)]


def symbol_bits(codes: int) -> int:
    """Return the bits of a symbol that stands for one of some codes."""
    return next(bits for bits in _SYMBOL_BITS if codes <= 1 << bits)


def parse_form(head: bytes, begin: int, numel: int, what: str) -> tuple[CodeForm, int]:
    """Read the description of codes in a head, and return where it ends; raise FormatError if it is invalid."""

    def refuse(reason: str) -> NoReturn:
        raise FormatError(f"{what} is damaged or forged: {reason}.")

    if len(head) < begin + _FIXED.size:
        refuse("its head is cut short before its codes")
    inputs, inner, block, last, scale_bytes, offset_bytes = _FIXED.unpack_from(head, begin)
    begin += _FIXED.size
    end = begin + _padded(last + 1)
    if len(head) < end:
        refuse("its head is cut short in its codes")
    if not 1 <= block <= inputs or inner < 1 or numel % (inputs * inner):
        refuse(f"blocks of {block} among {inputs} inputs of {inner} do not fit its {numel} elements")
    if scale_bytes not in (2, 4) or offset_bytes not in (0, 2, 4) or (offset_bytes and scale_bytes != 2):
        refuse(f"its scales have {scale_bytes} bytes and its offsets {offset_bytes}")
    levels = struct.unpack_from(f"<{last + 1}b", head, begin)
    if list(levels) != sorted(set(levels)) or any(head[begin + last + 1 : end]) or head[begin - 1]:
        refuse("its codes are not in order, or there are non-zero reserved bytes")
    return CodeForm(inputs, inner, block, levels, scale_bytes, offset_bytes), end


def stored_numbers(section: Bytes, size: int) -> Any:
    """Return scales or offsets in float32; None if there are none."""
    if size == 0:
        return None
    return widened(section.view(f"<u{size}"), "BF16" if size == 2 else "F32")


def symbols_at(section: Bytes, bits: int, first: int, count: int) -> Any:
    """Return some of the symbols in a section."""
    if bits == 8:
        return section[first : first + count]
    begin = first * bits // 8
    each = 8 // bits
    held = section[begin : -(-(first + count) * bits // 8)]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread = (held[:, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(-1)
    return spread[first - begin * each :][:count]


def values_at(places: Any, symbols: Any, form: CodeForm, scales: Any, offsets: Any, dtype: str) -> Any:
    """Return the bits of the elements at some places, which have these symbols."""
    levels = np.zeros(1 << form.bits, dtype=np.float32)
    levels[: len(form.levels)] = form.levels
    lines, lanes = np.divmod(places, form.inner)
    outer, inputs = np.divmod(lines, form.inputs)
    block = (outer * form.row_blocks + inputs // form.block) * form.inner + lanes
    with np.errstate(invalid="ignore", over="ignore"):
        return number_of(levels[symbols], scales[block], None if offsets is None else offsets[block], dtype)


def number_of(codes: Any, scales: Any, offsets: Any, dtype: str) -> Any:
    """Return the bits of codes times scales plus offsets, computed in float32; no zero is negative without offsets."""
    products = codes * scales
    return rounded(products + (np.float32(0) if offsets is None else offsets), dtype)


def layouts(shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return how the matrices in a tensor of a shape may lie, as (outer, inputs, inner).

    They are those of linear layers, of HF's ``Conv1D``, of convolutions and transposed ones, and stacks of matrices.
    """
    rest = math.prod(shape[1:])
    found = [(math.prod(shape[:-1]), shape[-1], 1), (shape[0], rest, 1), (1, shape[0], rest)]
    if len(shape) == 3:
        found.append((shape[0], shape[1], shape[2]))
    return list(dict.fromkeys(found))


def _stored(numbers: Any, size: int) -> Bytes:
    if size == 0:
        return np.zeros(0, dtype=np.uint8)
    return np.ascontiguousarray(rounded(numbers, "BF16" if size == 2 else "F32")).view(np.uint8)


def _pack(symbols: Bytes, bits: int) -> Bytes:
    each = 8 // bits
    if each == 1:
        return symbols
    held = np.zeros(-(-symbols.size // each) * each, dtype=np.uint8)
    held[: symbols.size] = symbols
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(held.reshape(-1, each) << shifts, axis=1).astype(np.uint8)


def _padded(size: int) -> int:
    return -(-size // 8) * 8
