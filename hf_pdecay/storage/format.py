"""One tensor as a block of bytes that tells of itself: a bitmask or gaps, and the values that are not zero.

`docs/compressed.md` is the specification. Signs of zeros and payloads of NaNs are bits like others and come back: an
element is zero if all of its bits are, or, in a block that stores the signs of its zeros, all but the sign.
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

_ZSTD, _SIGNS = 1, 2
_SIGNED = ("F16", "BF16", "F32", "F64")
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
        signs: Whether it has the signs of the zeros.
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
    signs: bool
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
        """Bytes of the payload's parts: where the values are, the values, the signs; each with those of an element."""
        return _sections(self.encoding, self.numel, self.values, self.width, self.itemsize, self.signs)

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
    ways = _ways(elements, dtype)
    sections = {way: _sections(way.encoding, elements.size, *way[1:3], itemsize, way.signs) for way in ways}
    choices = [(sum(size for size, _ in parts), number, False) for number, parts in enumerate(sections.values())]
    packed: list[Bytes] = []
    if zstd:
        packed = [pack(_payload(elements, way), parts) for way, parts in sections.items()]
        choices += [(found.nbytes, number, True) for number, found in enumerate(packed)]
    size, number, is_packed = min(choices)
    best = ways[number]
    head = _FIXED.size + 8 * len(shape)
    # A block is told from a tensor by its dtype, and tensors must lie where their elements may.
    if dtype != "U8" and dense % 8 == 0 and dense <= _padded(head + size):
        return DENSE, None
    payload = packed[number] if is_packed else _payload(elements, best)
    blob = np.zeros(_padded(head + payload.nbytes), dtype=np.uint8)
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        best.encoding,
        (_ZSTD if is_packed else 0) | (_SIGNS if best.signs else 0),
        best.width,
        len(shape),
        dtype.encode(),
        best.values,
        payload.nbytes,
    )
    blob[:head] = np.frombuffer(fixed + struct.pack(f"<{len(shape)}Q", *shape), dtype=np.uint8)
    blob[head : head + payload.nbytes] = payload
    return best.encoding, blob


def smallest_payload(numel: int, values: int, itemsize: int) -> int:
    """Return the bytes of a tensor in its smallest encoding, without head and zstd; gaps are taken to fit a byte.

    Args:
        numel: Number of elements.
        values: Number of elements that are not zero.
        itemsize: Bytes of an element.
    """
    ways = (_Way(DENSE, numel, 0, False), _Way(BITMASK, values, 0, False), _Way(GAPS, values, 1, False))
    return min(sum(size for size, _ in _sections(way.encoding, numel, *way[1:3], itemsize, way.signs)) for way in ways)


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
    if encoding not in ENCODINGS or flags & ~(_ZSTD | _SIGNS) or head[13:16] != b"\0\0\0":
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
    signs = bool(flags & _SIGNS)
    if signs and (encoding == DENSE or dtype not in _SIGNED):
        refuse(f"signs of zeros do not go with its encoding {ENCODINGS[encoding]} and dtype {dtype}")
    if count > numel or (encoding == DENSE and count != numel):
        refuse(f"it would hold {count} values of {numel} elements")
    raw = sum(part for part, _ in _sections(encoding, numel, count, width, itemsize, signs))
    begin = _FIXED.size + 8 * dimensions
    if not flags & _ZSTD and stored != raw:
        refuse(f"its payload has {stored} bytes where {count} values of {numel} elements need {raw}")
    if size != _padded(begin + stored):
        refuse(f"it has {size} bytes where its head tells of {_padded(begin + stored)}")
    return Blob(encoding, bool(flags & _ZSTD), signs, width, dtype, shape, count, begin, stored, raw, dense)


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
        _check_places(payload, head, what)
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
        _check_places(payload, head, what)
    unsigned = _UNSIGNED[head.itemsize]
    if head.encoding == DENSE:
        return payload.copy(), head
    values = payload[head.places : head.places + head.values * head.itemsize].view(unsigned)
    result = np.zeros(head.numel, dtype=unsigned)
    taken = 0
    for begin, indices in _indices(payload[: head.places], head):
        result[begin:][indices] = values[taken : taken + indices.size]
        taken += indices.size
    if head.signs:
        _sign_zeros(result, payload, head)
    return result.view(np.uint8), head


class _Way(NamedTuple):
    """A way to store a tensor: how many values, the bytes of a gap, and whether zeros have signs."""

    encoding: int
    values: int
    width: int
    signs: bool


def _ways(elements: Any, dtype: str) -> list[_Way]:
    """The ways that there are to store some elements."""
    found = [_Way(DENSE, elements.size, 0, False)]
    plain = _look(elements, 0)
    looks = [(False, plain)]
    if dtype in _SIGNED:
        signed = _look(elements, _sign_bit(elements.itemsize))
        if signed != plain:  # there are zeros with a sign, as a product with a mask makes them
            looks.append((True, signed))
    for signs, (count, largest_gap) in looks:
        width = next((each for each in _GAP_WIDTHS if largest_gap < 1 << 8 * each), 0)
        found.append(_Way(BITMASK, count, 0, signs))
        if width:
            found.append(_Way(GAPS, count, width, signs))
    return found


def _sign_bit(itemsize: int) -> int:
    return 1 << 8 * itemsize - 1


def _is_value(part: Any, sign: int) -> Any:
    """Which elements have more bits than that of the sign, if any are left out."""
    return part & part.dtype.type(sign - 1) != 0 if sign else part != 0


def _sign_zeros(result: Any, payload: Bytes, head: Blob) -> None:
    """Give the zeros of a tensor, in place, the signs that its block has."""
    signs = np.unpackbits(payload[payload.size - head.sections[2][0] :], bitorder="little")
    taken = 0
    for begin in range(0, result.size, _CHUNK):
        part = result[begin : begin + _CHUNK]
        zeros = np.flatnonzero(part == 0)
        part[zeros] = signs[taken : taken + zeros.size].astype(part.dtype) << 8 * head.itemsize - 1
        taken += zeros.size


def _look(elements: Any, sign: int) -> tuple[int, int]:
    """The number of elements that are values, and the most zeros in front of one of them."""
    count, largest, last = 0, 0, -1
    for begin in range(0, elements.size, _CHUNK):
        indices = np.flatnonzero(_is_value(elements[begin : begin + _CHUNK], sign))
        if indices.size:
            largest = max(largest, int(indices[0]) + begin - last - 1)
            if indices.size > 1:
                largest = max(largest, int(np.diff(indices).max()) - 1)
            last = int(indices[-1]) + begin
            count += indices.size
    return count, largest


def _sections(encoding: int, numel: int, values: int, width: int, itemsize: int, signs: bool) -> Sections:
    places = {DENSE: 0, BITMASK: -(-numel // 8), GAPS: values * width}[encoding]
    found = [(places, width or 1), (values * itemsize, itemsize)]
    return [*found, (-(-(numel - values) // 8), 1)] if signs else found


def _payload(elements: Any, way: _Way) -> Bytes:
    if way.encoding == DENSE:
        return elements.view(np.uint8)
    sign = _sign_bit(elements.itemsize) if way.signs else 0
    places, values, signs, last = [], [], [], -1
    for begin in range(0, elements.size, _CHUNK):
        part = elements[begin : begin + _CHUNK]
        marks = _is_value(part, sign)
        indices = np.flatnonzero(marks)
        values.append(part[indices])
        if way.signs:
            signs.append(part[~marks] != 0)
        if way.encoding == BITMASK:
            places.append(np.packbits(marks, bitorder="little"))
        elif indices.size:
            gaps = np.diff(indices, prepend=last - begin) - 1
            places.append(gaps.astype(_UNSIGNED[way.width]).view(np.uint8))
            last = int(indices[-1]) + begin
    packed = [np.packbits(np.concatenate(signs), bitorder="little")] if signs else []
    return np.concatenate([*places, *(part.view(np.uint8) for part in values), *packed] or [np.zeros(0, np.uint8)])


def _check_places(payload: Bytes, head: Blob, what: str) -> None:
    """Check that a bitmask has as many bits as there are values, or that gaps do not lead out of the tensor."""
    places = payload[: head.places]
    zeros = head.numel - head.values
    if head.signs:
        if zeros % 8 and payload[-1] >> zeros % 8:
            raise FormatError(f"{what} is damaged or forged: it has signs of more zeros than there are.")
        values = payload[head.places : head.places + head.values * head.itemsize].view(_UNSIGNED[head.itemsize])
        for begin in range(0, values.size, _CHUNK):
            if not _is_value(values[begin : begin + _CHUNK], _sign_bit(head.itemsize)).all():
                raise FormatError(f"{what} is damaged or forged: zeros are among its values.")
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
