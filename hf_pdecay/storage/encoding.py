"""One tensor as a self-describing block of bytes: a bitmask or gaps, and the non-zero values or their codes.

`docs/compressed.md` is the specification. Decoding is bit-identical, signs of zeros and payloads of NaNs included.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple, NoReturn

import numpy as np

from .bits import decode_values, expand, ones, put, unplane
from .code_search import search_codes
from .coded import CODED, MOST_BYTES, CodeForm, Codes, parse_form, stored_numbers, symbols_at
from .container import DIMENSIONS_LIMIT, ITEMSIZES, FormatError, tensor_bytes
from .zstd_planes import SPARE, Bytes, Sections, check_frame, pack, unpack


MAGIC = b"hfpdblob"
VERSION = 1
DENSE, BITMASK, GAPS = 0, 1, 2
ENCODINGS = {DENSE: "dense", BITMASK: "bitmask", GAPS: "index"}

_ZSTD, _SIGNS, _CODES, _CHANGES = 1, 2, 4, 8
_SIGNED = ("F16", "BF16", "F32", "F64")
_FIXED = struct.Struct("<8sBBBBB3x16sQQ")
_UNSIGNED: dict[int, Any] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
_GAP_WIDTHS = (1, 2, 4)
# Elements of a chunk: besides input and result, this module needs the memory of a few chunks.
_CHUNK = 1 << 18


class Blob(NamedTuple):
    """The checked head of a block; sizes are in bytes."""

    encoding: int
    zstd: bool
    signs: bool  # whether the signs of the zeros are stored; then an element is zero if all of its other bits are
    width: int  # of a gap, 0 for other encodings
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    values: int  # the number of stored values
    begin: int  # position of the payload in the block
    stored: int  # size of the stored payload
    raw: int  # size of the payload before zstd
    dense: int  # size of the tensor
    codes: CodeForm | None = None  # how codes are stored in place of values
    changes: bool = False  # whether the values are those that differ from a base's, which has all others

    @property
    def kind(self) -> str:
        """What reports call it."""
        if self.changes:
            return "changes"
        return ENCODINGS[self.encoding] if self.codes is None else "codes"

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
        """Bytes of the payload's sections (places, values or codes, signs), and bytes of their elements."""
        numbers = self.encoding, self.numel, self.values, self.width, self.itemsize, self.signs
        return _sections(*numbers, self.codes)

    @property
    def places(self) -> int:
        """Bytes of the section with the places of the values."""
        return self.sections[0][0]


def encode(
    data: Bytes, dtype: str, shape: tuple[int, ...], zstd: bool = False, block: int | None = None
) -> tuple[int, Bytes | None]:
    """Encode a tensor, given as little-endian bytes, in the fewest bytes; ``zstd`` also tries each encoding with it.

    If its weights are codes times scales, the codes are stored; ``block`` says how many inputs share a scale, if that
    is known.

    Returns the encoding, and the block, whose length is a multiple of 8; None if the plain tensor is smallest. Raises
    FormatError if dtype, shape and data do not match, and ValueError if zstandard is needed and not installed.
    """
    dense = tensor_bytes(dtype, shape, "the tensor")
    if dense != data.nbytes:
        raise FormatError(f"The tensor has {data.nbytes} bytes where its dtype and shape need {dense}.")
    itemsize = ITEMSIZES[dtype]
    elements = data.view(_UNSIGNED[itemsize])
    codes = search_codes(elements, dtype, shape, block)
    ways = _ways(elements, dtype, codes)
    sections = [
        _sections(way.encoding, elements.size, way.values, way.width, itemsize, way.signs, way.codes) for way in ways
    ]
    heads = [_FIXED.size + 8 * len(shape) + (0 if way.codes is None else len(way.codes.packed())) for way in ways]
    choices = [(_total(lengths) + heads[number], number, False) for number, lengths in enumerate(sections)]
    smallest: Bytes | None = None  # no other is kept in memory
    for number, (way, lengths) in enumerate(zip(ways, sections, strict=True)) if zstd else ():
        packed = pack(_payload(elements, way, codes), lengths)
        if smallest is None or packed.nbytes + heads[number] < choices[-1][0]:
            choices[len(ways) :] = [(packed.nbytes + heads[number], number, True)]
            smallest = packed
    size, number, is_packed = min(choices)
    best = ways[number]
    # Readers recognise a block by its dtype, and a plain tensor must keep the alignment of those after it.
    if dtype != "U8" and dense % 8 == 0 and dense <= _padded(size):
        return DENSE, None
    payload = smallest if is_packed and smallest is not None else _payload(elements, best, codes)
    del smallest
    return best.encoding, _assembled(best, payload, dtype, shape, _ZSTD if is_packed else 0)


def encode_changes(data: Bytes, base: Bytes, dtype: str, shape: tuple[int, ...], zstd: bool = False) -> Bytes:
    """Encode the elements of a tensor that differ from a base's, of the same dtype and shape, as :func:`encode` does.

    Returns the block.
    """
    kind = _UNSIGNED[ITEMSIZES[dtype]]
    elements, old = data.view(kind), base.view(kind)
    count, largest_gap = _look(elements, 0, old)
    widths = [0, *[width for width in _GAP_WIDTHS if largest_gap < 1 << 8 * width][:1]]
    found = []
    for way in [_Way(GAPS if width else BITMASK, count, width, False) for width in widths]:
        payload = _payload(elements, way, None, old)
        found.append((payload.nbytes, way, payload, 0))
        if zstd:
            packed = pack(payload, _sections(way.encoding, elements.size, count, way.width, elements.itemsize, False))
            found.append((packed.nbytes, way, packed, _ZSTD))
    _, best, payload, flags = min(found, key=lambda one: one[0])
    return _assembled(best, payload, dtype, shape, flags | _CHANGES)


def _assembled(way: _Way, payload: Bytes, dtype: str, shape: tuple[int, ...], flags: int) -> Bytes:
    """Return a block; ``flags`` are those that its way to store the tensor does not say."""
    flags |= (_SIGNS if way.signs else 0) | (0 if way.codes is None else _CODES)
    sizes = way.width, len(shape), dtype.encode(), way.values, payload.nbytes
    fixed = _FIXED.pack(MAGIC, VERSION, way.encoding, flags, *sizes)
    form = b"" if way.codes is None else way.codes.packed()
    head = np.frombuffer(fixed + struct.pack(f"<{len(shape)}Q", *shape) + form, dtype=np.uint8)
    blob = np.zeros(_padded(head.size + payload.nbytes), dtype=np.uint8)
    blob[: head.size] = head
    blob[head.size : head.size + payload.nbytes] = payload
    return blob


def smallest_payload(numel: int, values: int, itemsize: int) -> int:
    """Return the bytes of a tensor in its smallest encoding, without head and zstd; gaps are taken to fit a byte."""
    ways = (_Way(DENSE, numel, 0, False), _Way(BITMASK, values, 0, False), _Way(GAPS, values, 1, False))
    return min(_total(_sections(way.encoding, numel, *way[1:3], itemsize, way.signs)) for way in ways)


def parse(head: bytes | Bytes, size: int, what: str) -> Blob:
    """Read and check the head of a block of ``size`` bytes, given the block or its first ``HEAD_LIMIT`` bytes.

    Raises FormatError, which begins with ``what``, if the head is invalid or does not match the block's length.
    """

    def refuse(reason: str) -> NoReturn:
        raise FormatError(f"{what} is damaged or forged: {reason}.")

    head = bytes(head[:HEAD_LIMIT])
    if len(head) < _FIXED.size or not head.startswith(MAGIC):
        refuse("it does not begin like a compressed tensor")
    _, version, encoding, flags, width, dimensions, name, count, stored = _FIXED.unpack_from(head)
    if version != VERSION:
        raise FormatError(f"{what} has format version {version}; this hf_pdecay reads version {VERSION}.")
    if encoding not in ENCODINGS or flags & ~(_ZSTD | _SIGNS | _CODES | _CHANGES) or head[13:16] != b"\0\0\0":
        refuse(f"unknown encoding {encoding}, flags {flags} or non-zero reserved bytes")
    if dimensions > DIMENSIONS_LIMIT or len(head) < _FIXED.size + 8 * dimensions:
        refuse(f"its head has {dimensions} dimensions and is cut short")
    dtype = name.rstrip(b"\0").decode("ascii", "replace")
    shape = struct.unpack_from(f"<{dimensions}Q", head, _FIXED.size)
    dense = tensor_bytes(dtype, shape, what)
    itemsize = ITEMSIZES[dtype]
    numel = dense // itemsize
    if width not in (_GAP_WIDTHS if encoding == GAPS else (0,)):
        refuse(f"gaps of {width} bytes do not match its encoding {ENCODINGS[encoding]}")
    signs = bool(flags & _SIGNS)
    if signs and (encoding == DENSE or dtype not in _SIGNED):
        refuse(f"signs of zeros do not match its encoding {ENCODINGS[encoding]} and dtype {dtype}")
    changes = bool(flags & _CHANGES)
    if changes and (encoding == DENSE or flags & (_SIGNS | _CODES)):
        refuse(f"changes to a base do not match its encoding {ENCODINGS[encoding]} and flags {flags}")
    if count > numel or (encoding == DENSE and count != numel):
        refuse(f"it would hold {count} values of {numel} elements")
    begin, codes = _FIXED.size + 8 * dimensions, None
    if flags & _CODES:
        if signs or dtype not in CODED:
            refuse(f"codes do not match its dtype {dtype}, or signs of zeros")
        codes, begin = parse_form(head, begin, numel, what)
        if codes.offset_bytes and encoding != DENSE:
            refuse(f"offsets do not match its encoding {ENCODINGS[encoding]}")
    raw = _total(_sections(encoding, numel, count, width, itemsize, signs, codes))
    if not flags & _ZSTD and stored != raw:
        refuse(f"its payload has {stored} bytes where {count} values of {numel} elements need {raw}")
    if size != _padded(begin + stored):
        refuse(f"it has {size} bytes where its head needs {_padded(begin + stored)}")
    sizes = count, begin, stored, raw, dense
    return Blob(encoding, bool(flags & _ZSTD), signs, width, dtype, shape, *sizes, codes, changes)


# Bytes of the longest head.
HEAD_LIMIT = _FIXED.size + 8 * DIMENSIONS_LIMIT + MOST_BYTES


def check(blob: Bytes, what: str) -> Blob:
    """Check a block without unpacking zstd, in a few chunks of memory; raise FormatError if it is damaged."""
    head = parse(blob[:HEAD_LIMIT], blob.nbytes, what)
    payload = blob[head.begin : head.begin + head.stored]
    if blob[head.begin + head.stored :].any():
        raise FormatError(f"{what} is damaged or forged: there are non-zero bytes after its payload.")
    if head.zstd:
        check_frame(payload, head.sections, what)
    else:
        _check_places(payload, head, what)
    return head


def decode(blob: Bytes, limit: int, what: str, base: Bytes | None = None) -> tuple[Bytes, Blob]:
    """Decode a block to the tensor's bytes as one dimension, writable, and the block's head.

    Args:
        blob: The block.
        limit: The most bytes that the tensor may have; more are refused before memory is taken.
        what: What the block is, for errors.
        base: The bytes of a base's tensor, into which a block of changes is written; they are the result then.

    Raises:
        FormatError: If the block is damaged or forged, or its changes lack a base.
        ValueError: If zstandard is needed and not installed.
    """
    head, payload = opened(blob, what, limit)
    unsigned = _UNSIGNED[head.itemsize]
    if head.changes:
        if base is None or base.nbytes != head.dense:
            raise FormatError(f"{what} is damaged or forged: it holds changes, and there is no base that they fit.")
        put(head.width, payload[: head.places], values_of(head, payload), base.view(unsigned))
        return base, head
    if head.codes is not None:
        whole = np.zeros(head.numel, dtype=unsigned)
        _decode_values(head, payload, whole, at_places=True)
        return whole.view(np.uint8), head
    if head.encoding == DENSE:
        return payload[: head.raw].copy(), head
    result = np.zeros(head.numel, dtype=unsigned)
    expand(head.width, payload[: head.places], values_of(head, payload), result)
    if head.signs:
        _sign_zeros(result, payload, head)
    return result.view(np.uint8), head


def opened(blob: Bytes, what: str, limit: int | None = None, size: int | None = None) -> tuple[Blob, Bytes]:
    """Return the head of a block, checked, and its payload without zstd, which may be longer than its sections.

    Errors as of :func:`decode`. ``size`` is the block's, if ``blob`` is longer: then so is the payload.
    """
    head = check(blob[:size], what)
    if limit is not None and head.dense > limit:
        raise FormatError(f"{what} is a tensor of {head.dense} bytes; at most {limit} bytes are possible.")
    payload = blob[head.begin :]
    if head.zstd:
        payload = unpack(payload[: head.stored], head.sections, what, unplane)
        _check_places(payload, head, what)
    return head, payload


def with_plain_values(head: Blob, payload: Bytes) -> tuple[Blob, Bytes]:
    """Return a block's head and its payload with values in place of codes; they may be longer than their sections."""
    if head.codes is None:
        return head, payload
    plain = head._replace(codes=None)
    values = np.zeros(head.values, dtype=_UNSIGNED[head.itemsize])
    _decode_values(head, payload, values, at_places=False)
    return plain, np.concatenate([payload[: head.places], values.view(np.uint8), np.zeros(SPARE, np.uint8)])


def codes_and_scales(head: Blob, payload: Bytes) -> tuple[Any, Any]:
    """Return the code of each element, in int8, and the scales in float32, of a block that is not dense."""
    if head.codes is None:
        raise TypeError("the block has no codes")
    places, scales, _, symbols = _parts(payload, head.sections[:4])
    levels = np.zeros(1 << head.codes.bits, dtype=np.int8)
    levels[: len(head.codes.levels)] = head.codes.levels
    result = np.zeros(head.numel, dtype=np.uint8)
    found = levels[symbols_at(symbols, head.codes.bits, 0, head.values)].view(np.uint8)
    expand(head.width, places, np.concatenate([found, np.zeros(SPARE, np.uint8)])[: found.size], result)
    return result.view(np.int8), stored_numbers(scales, head.codes.scale_bytes)


def _decode_values(head: Blob, payload: Bytes, result: Any, *, at_places: bool) -> None:
    """Write what codes stand for to its places in a tensor, or one after the other."""
    if head.codes is None:
        raise TypeError("the block has no codes")
    places, scales, offsets, symbols = _parts(payload, head.sections[:4])
    width = -1 if head.encoding == DENSE else head.width
    decode_values(
        *(width, places, symbols, head.codes, head.numel, head.values, head.dtype),
        stored_numbers(scales, head.codes.scale_bytes),
        stored_numbers(offsets, head.codes.offset_bytes),
        result,
        at_places=at_places,
    )


def _parts(payload: Bytes, sections: Sections) -> list[Bytes]:
    ends = np.cumsum([0, *(size for size, _ in sections)]).tolist()
    return [payload[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]


def values_of(head: Blob, payload: Bytes) -> Any:
    """Return the values in a payload as unsigned integers."""
    return payload[head.places : head.places + head.values * head.itemsize].view(_UNSIGNED[head.itemsize])


class _Way(NamedTuple):
    """A way to store a tensor: its encoding, the number of values, bytes of a gap, whether zeros have signs, codes."""

    encoding: int
    values: int
    width: int
    signs: bool
    codes: CodeForm | None = None


def _ways(elements: Any, dtype: str, codes: Codes | None) -> list[_Way]:
    """All ways to store these elements."""
    ways = [_Way(DENSE, elements.size, 0, False)]
    plain = _look(elements, 0)
    looks = [(False, plain)]
    if dtype in _SIGNED:
        signed = _look(elements, _sign_bit(elements.itemsize))
        if signed != plain:  # some zeros are negative, as after a product with a mask
            looks.append((True, signed))
    for signs, (count, largest_gap) in looks:
        width = next((width for width in _GAP_WIDTHS if largest_gap < 1 << 8 * width), 0)
        ways.append(_Way(BITMASK, count, 0, signs))
        if width:
            ways.append(_Way(GAPS, count, width, signs))
    if codes is not None:
        ways.append(ways[0]._replace(codes=codes.form(None)))
        if codes.offsets is None:
            some = codes.form(elements != 0)
            ways += [way._replace(codes=some) for way in ways if way.encoding != DENSE and not way.signs]
    return ways


def _sign_bit(itemsize: int) -> int:
    return 1 << 8 * itemsize - 1


def _is_value(chunk: Any, sign: int, old: Any = None) -> Any:
    """Which elements have bits other than the sign bit, or any bits if ``sign`` is 0; or others than a base's."""
    if old is not None:
        return chunk != old
    return chunk & chunk.dtype.type(sign - 1) != 0 if sign else chunk != 0


def _sign_zeros(result: Any, payload: Bytes, head: Blob) -> None:
    """Give the zeros of a tensor, in place, the signs in its block."""
    signs = np.unpackbits(payload[head.raw - head.sections[2][0] : head.raw], bitorder="little")
    taken = 0
    for begin in range(0, result.size, _CHUNK):
        chunk = result[begin : begin + _CHUNK]
        zeros = np.flatnonzero(chunk == 0)
        chunk[zeros] = signs[taken : taken + zeros.size].astype(chunk.dtype) << 8 * head.itemsize - 1
        taken += zeros.size


def _look(elements: Any, sign: int, old: Any = None) -> tuple[int, int]:
    """The number of values, and the largest number of other elements before one of them."""
    count, largest, last = 0, 0, -1
    for begin in range(0, elements.size, _CHUNK):
        before = None if old is None else old[begin : begin + _CHUNK]
        indices = np.flatnonzero(_is_value(elements[begin : begin + _CHUNK], sign, before))
        if indices.size:
            largest = max(largest, int(indices[0]) + begin - last - 1)
            if indices.size > 1:
                largest = max(largest, int(np.diff(indices).max()) - 1)
            last = int(indices[-1]) + begin
            count += indices.size
    return count, largest


def _sections(
    encoding: int, numel: int, values: int, width: int, itemsize: int, signs: bool, codes: CodeForm | None = None
) -> Sections:
    places = {DENSE: 0, BITMASK: -(-numel // 8), GAPS: values * width}[encoding]
    sections = [(places, width or 1)]
    sections += [(values * itemsize, itemsize)] if codes is None else codes.sections(numel, values)
    return [*sections, (-(-(numel - values) // 8), 1)] if signs else sections


def _total(sections: Sections) -> int:
    return sum(size for size, _ in sections)


def _payload(elements: Any, way: _Way, codes: Codes | None, old: Any = None) -> Bytes:
    if way.codes is not None and codes is not None:
        if way.encoding == DENSE:
            return np.concatenate(codes.payload(way.codes, None))
        plain = _payload(elements, way._replace(codes=None), None)
        return np.concatenate([plain[: -way.values * elements.itemsize], *codes.payload(way.codes, elements != 0)])
    if way.encoding == DENSE:
        return elements.view(np.uint8)
    sign = _sign_bit(elements.itemsize) if way.signs else 0
    places, values, signs, last = [], [], [], -1
    for begin in range(0, elements.size, _CHUNK):
        chunk = elements[begin : begin + _CHUNK]
        marks = _is_value(chunk, sign, None if old is None else old[begin : begin + _CHUNK])
        indices = np.flatnonzero(marks)
        values.append(chunk[indices])
        if way.signs:
            signs.append(chunk[~marks] != 0)
        if way.encoding == BITMASK:
            places.append(np.packbits(marks, bitorder="little"))
        elif indices.size:
            gaps = np.diff(indices, prepend=last - begin) - 1
            places.append(gaps.astype(_UNSIGNED[way.width]).view(np.uint8))
            last = int(indices[-1]) + begin
    packed = [np.packbits(np.concatenate(signs), bitorder="little")] if signs else []
    return np.concatenate([*places, *(chunk.view(np.uint8) for chunk in values), *packed] or [np.zeros(0, np.uint8)])


def _check_places(payload: Bytes, head: Blob, what: str) -> None:
    """Check that a bitmask marks as many elements as there are values, or that gaps stay inside the tensor."""
    places = payload[: head.places]
    zeros = head.numel - head.values
    if head.signs:
        if zeros % 8 and payload[head.raw - 1] >> zeros % 8:
            raise FormatError(f"{what} is damaged or forged: it has signs of more zeros than there are.")
        values = values_of(head, payload)
        for begin in range(0, values.size, _CHUNK):
            if not _is_value(values[begin : begin + _CHUNK], _sign_bit(head.itemsize)).all():
                raise FormatError(f"{what} is damaged or forged: zeros are among its values.")
    if head.encoding == BITMASK:
        bits = sum(ones(places[begin : begin + _CHUNK]) for begin in range(0, places.size, _CHUNK))
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


def _padded(size: int) -> int:
    return -(-size // 8) * 8
