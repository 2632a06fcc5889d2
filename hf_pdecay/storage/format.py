"""One tensor as a block of bytes that tells of itself: a bitmask or gaps, and the values that are not zero.

`docs/compressed.md` is the specification. An element is zero if all of its bits are: the sign of a zero and the payload
of a NaN are bits like others and come back.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np

from .container import DIMENSIONS_LIMIT, ITEMSIZES, FormatError, tensor_bytes
from .packing import Bytes, Sections, check_frame, pack, unpack


MAGIC = b"hfpdblob"
VERSION = 1
DENSE, BITMASK, GAPS = 0, 1, 2
ENCODINGS = {DENSE: "dense", BITMASK: "bitmask", GAPS: "index"}

_ZSTD = 1
_FIXED = struct.Struct("<8sBBBBB3x16sQQ")
_UNSIGNED: dict[int, Any] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
_GAP_WIDTHS = (1, 2, 4)
# Elements that are looked at together: what this module takes beside its input and its result is a few of these.
_CHUNK = 1 << 18


class Blob(NamedTuple):
    """What the head of a block says, checked.

    Attributes:
        encoding: ``DENSE``, ``BITMASK`` or ``GAPS``.
        zstd: Whether the payload is compressed by zstd.
        width: Bytes of a gap, 0 for other encodings.
        dtype: safetensors' name.
        shape: Shape of the tensor.
        values: How many values are stored.
        begin: Where the payload begins in the block.
        stored: Bytes of the payload as it is stored.
        raw: Bytes of the payload before zstd.
        dense: Bytes of the tensor.
    """

    encoding: int
    zstd: bool
    width: int
    dtype: str
    shape: tuple[int, ...]
    values: int
    begin: int
    stored: int
    raw: int
    dense: int

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZES[self.dtype]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.dense // self.itemsize

    @property
    def sections(self) -> Sections:
        """Bytes of the payload that say where the values are, and of the values; with the bytes of an element."""
        return _sections(self.encoding, self.numel, self.values, self.width, self.itemsize)

    @property
    def places(self) -> int:
        """Bytes of the payload that say where the values are."""
        return self.sections[0][0]


def encode(data: Bytes, dtype: str, shape: tuple[int, ...], zstd: bool = False) -> tuple[int, Bytes | None]:
    """Encode a tensor in the way that takes the fewest bytes.

    Args:
        data: Its bytes, little-endian, as one dimension.
        dtype: safetensors' name of its dtype.
        shape: Its shape.
        zstd: Compress each way by zstd, too, before their sizes are compared.

    Returns:
        The encoding, and the block; None in place of the block if the tensor is best stored as it is. A block's length
        is a multiple of 8.

    Raises:
        FormatError: If dtype, shape and data do not go together.
        ValueError: If ``zstd`` is asked for and zstandard is not installed.
    """
    dense = tensor_bytes(dtype, shape, "the tensor")
    if dense != data.nbytes:
        raise FormatError(f"The tensor has {data.nbytes} bytes where its dtype and shape need {dense}.")
    itemsize = ITEMSIZES[dtype]
    elements = data.view(_UNSIGNED[itemsize])
    count, largest_gap = _look(elements)
    width = next((each for each in _GAP_WIDTHS if largest_gap < 1 << 8 * each), 0)
    ways = {DENSE: (elements.size, 0), BITMASK: (count, 0)} | ({GAPS: (count, width)} if width else {})
    sections = {each: _sections(each, elements.size, *way, itemsize) for each, way in ways.items()}
    choices = [(sum(size for size, _ in parts), False, each) for each, parts in sections.items()]
    packed: dict[int, Bytes] = {}
    if zstd:
        packed = {each: pack(_payload(elements, each, width), parts) for each, parts in sections.items()}
        choices += [(found.nbytes, True, each) for each, found in packed.items()]
    size, is_packed, best = min(choices)
    head = _FIXED.size + 8 * len(shape)
    # A block is told from a tensor by its dtype, and tensors must lie where their elements may.
    if dtype != "U8" and dense % 8 == 0 and dense <= _padded(head + size):
        return DENSE, None
    payload = packed[best] if is_packed else _payload(elements, best, width)
    values, width = ways[best]
    blob = np.zeros(_padded(head + payload.nbytes), dtype=np.uint8)
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        best,
        _ZSTD if is_packed else 0,
        width,
        len(shape),
        dtype.encode(),
        values,
        payload.nbytes,
    )
    blob[:head] = np.frombuffer(fixed + struct.pack(f"<{len(shape)}Q", *shape), dtype=np.uint8)
    blob[head : head + payload.nbytes] = payload
    return best, blob


def blob_shape(blob: Bytes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which a block is stored: never that of its tensor.

    So a loader that takes a block for the tensor finds that the shape is wrong, and does not load bytes for weights.
    """
    return (1, blob.nbytes) if len(shape) == 1 else (blob.nbytes,)


def parse(head: bytes | Bytes, size: int, what: str) -> Blob:
    """Read and check the head of a block.

    Args:
        head: The block, or its first bytes: as many as the longest head has, or all there are.
        size: How many bytes the whole block has.
        what: Name for errors.

    Raises:
        FormatError: If the head is not one, or does not go with the block's length.
    """

    def refuse(reason: str) -> NoReturn:
        raise FormatError(f"{what} is damaged or forged: {reason}.")

    head = bytes(head[:HEAD_LIMIT])
    if len(head) < _FIXED.size or not head.startswith(MAGIC):
        refuse("it does not begin as a compressed tensor does")
    _, version, encoding, flags, width, dimensions, name, count, stored = _FIXED.unpack_from(head)
    if version != VERSION:
        raise FormatError(f"{what} has format version {version}; this hf_pdecay reads version {VERSION}.")
    if encoding not in ENCODINGS or flags not in (0, _ZSTD) or head[13:16] != b"\0\0\0":
        refuse(f"its encoding {encoding}, flags {flags} or reserved bytes are none that there are")
    if dimensions > DIMENSIONS_LIMIT or len(head) < _FIXED.size + 8 * dimensions:
        refuse(f"it tells of {dimensions} dimensions and is cut short")
    dtype = name.rstrip(b"\0").decode("ascii", "replace")
    shape = struct.unpack_from(f"<{dimensions}Q", head, _FIXED.size)
    dense = tensor_bytes(dtype, shape, what)
    itemsize = ITEMSIZES[dtype]
    numel = dense // itemsize
    if width not in (_GAP_WIDTHS if encoding == GAPS else (0,)):
        refuse(f"gaps of {width} bytes do not go with its encoding {ENCODINGS[encoding]}")
    if count > numel or (encoding == DENSE and count != numel):
        refuse(f"it would hold {count} values of {numel} elements")
    raw = sum(part for part, _ in _sections(encoding, numel, count, width, itemsize))
    begin = _FIXED.size + 8 * dimensions
    if not flags and stored != raw:
        refuse(f"its payload has {stored} bytes where {count} values of {numel} elements need {raw}")
    if size != _padded(begin + stored):
        refuse(f"it has {size} bytes where its head tells of {_padded(begin + stored)}")
    return Blob(encoding, bool(flags), width, dtype, shape, count, begin, stored, raw, dense)


# The longest head: what a reader needs of a block before anything else.
HEAD_LIMIT = _FIXED.size + 8 * DIMENSIONS_LIMIT


def check(blob: Bytes, what: str) -> Blob:
    """Check a block by all that can be seen without unpacking zstd; takes a few chunks of memory.

    Raises:
        FormatError: If it is damaged or forged.
    """
    head = parse(blob[:HEAD_LIMIT], blob.nbytes, what)
    payload = blob[head.begin : head.begin + head.stored]
    if blob[head.begin + head.stored :].any():
        raise FormatError(f"{what} is damaged or forged: there is something behind its payload.")
    if head.zstd:
        check_frame(payload, head.sections, what)
    else:
        _check_places(payload[: head.places], head, what)
    return head


def decode(blob: Bytes, limit: int, what: str) -> tuple[Bytes, Blob]:
    """Give a tensor's bytes back.

    Args:
        blob: The block.
        limit: How many bytes the tensor may have at most; more are refused before memory is taken.
        what: Name for errors.

    Returns:
        The tensor's bytes as one dimension, writable, and what the block's head says.

    Raises:
        FormatError: If the block is damaged or forged, or the tensor too large.
        ValueError: If zstd is needed and zstandard is not installed.
    """
    head = check(blob, what)
    if head.dense > limit:
        raise FormatError(f"{what} tells of a tensor of {head.dense} bytes, and no more than {limit} can be its size.")
    payload = blob[head.begin : head.begin + head.stored]
    if head.zstd:
        payload = unpack(payload, head.sections, what)
        _check_places(payload[: head.places], head, what)
    unsigned = _UNSIGNED[head.itemsize]
    if head.encoding == DENSE:
        return payload.copy(), head
    values = payload[head.places :].view(unsigned)
    result = np.zeros(head.numel, dtype=unsigned)
    taken = 0
    for begin, indices in _indices(payload[: head.places], head):
        result[begin:][indices] = values[taken : taken + indices.size]
        taken += indices.size
    return result.view(np.uint8), head


def _look(elements: Any) -> tuple[int, int]:
    """The number of elements that are not zero, and the most zeros in front of one of them."""
    count, largest, last = 0, 0, -1
    for begin in range(0, elements.size, _CHUNK):
        indices = np.flatnonzero(elements[begin : begin + _CHUNK] != 0)
        if indices.size:
            largest = max(largest, int(indices[0]) + begin - last - 1)
            if indices.size > 1:
                largest = max(largest, int(np.diff(indices).max()) - 1)
            last = int(indices[-1]) + begin
            count += indices.size
    return count, largest


def _sections(encoding: int, numel: int, values: int, width: int, itemsize: int) -> Sections:
    places = {DENSE: 0, BITMASK: -(-numel // 8), GAPS: values * width}[encoding]
    return [(places, width or 1), (values * itemsize, itemsize)]


def _payload(elements: Any, encoding: int, width: int) -> Bytes:
    if encoding == DENSE:
        return elements.view(np.uint8)
    places, values, last = [], [], -1
    for begin in range(0, elements.size, _CHUNK):
        part = elements[begin : begin + _CHUNK]
        marks = part != 0
        indices = np.flatnonzero(marks)
        values.append(part[indices])
        if encoding == BITMASK:
            places.append(np.packbits(marks, bitorder="little"))
        elif indices.size:
            gaps = np.diff(indices, prepend=last - begin) - 1
            places.append(gaps.astype(_UNSIGNED[width]).view(np.uint8))
            last = int(indices[-1]) + begin
    return np.concatenate([*places, *(part.view(np.uint8) for part in values)] or [np.zeros(0, np.uint8)])


def _check_places(places: Bytes, head: Blob, what: str) -> None:
    """Check that a bitmask has as many bits as there are values, or that gaps do not lead out of the tensor."""
    if head.encoding == BITMASK:
        bits = sum(
            int(np.bitwise_count(places[begin : begin + _CHUNK]).sum(dtype=np.int64))
            for begin in range(0, places.size, _CHUNK)
        )
        if bits != head.values:
            raise FormatError(
                f"{what} is damaged or forged: its bitmask marks {bits} elements and {head.values} values are stored."
            )
        if head.numel % 8 and places[-1] >> head.numel % 8:
            raise FormatError(f"{what} is damaged or forged: its bitmask marks elements beyond the last one.")
    elif head.encoding == GAPS:
        end = head.values
        for begin in range(0, places.size, _CHUNK * head.width):
            gaps = places[begin : begin + _CHUNK * head.width]
            end += int(gaps.view(_UNSIGNED[head.width]).sum(dtype=np.uint64))
        if end > head.numel:
            raise FormatError(
                f"{what} is damaged or forged: its last index is {end - 1} and it has {head.numel} elements."
            )


def _indices(places: Bytes, head: Blob) -> Iterator[tuple[int, Any]]:
    """The places of the values, chunk by chunk: where a chunk begins, and indices from there."""
    if head.encoding == BITMASK:
        for begin in range(0, head.numel, _CHUNK):
            marks = np.unpackbits(places[begin // 8 : (begin + _CHUNK) // 8], bitorder="little")
            yield begin, np.flatnonzero(marks.view(np.bool_))  # which numpy finds faster than other numbers
        return
    begin = 0
    for first in range(0, places.size, _CHUNK * head.width):
        gaps = places[first : first + _CHUNK * head.width].view(_UNSIGNED[head.width])
        indices = np.cumsum(gaps.astype(np.int64) + 1) - 1
        yield begin, indices
        begin += int(indices[-1]) + 1


def _padded(size: int) -> int:
    return -(-size // 8) * 8
