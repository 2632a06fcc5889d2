"""Another reader of compressed tensors, written from docs/compressed.md with plain loops; it checks nothing."""

from __future__ import annotations

import numpy as np


SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4}
SIZES |= {"F64": 8, "I64": 8, "U64": 8, "C64": 8}
SIZES |= dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1)


def number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def unplaned(data: bytes, width: int) -> bytes:
    """Bytes that were put plane by plane, element by element again."""
    count = len(data) // width
    return bytes(data[plane * count + element] for element in range(count) for plane in range(width))


def read_block(block: bytes) -> tuple[str, tuple[int, ...], bytes]:
    """Return dtype, shape and the tensor's bytes."""
    encoding, flags, width, dimensions = block[9], block[10], block[11], block[12]
    dtype = block[16:32].rstrip(b"\0").decode()
    values, stored = number(block[32:40]), number(block[40:48])
    shape = tuple(number(block[48 + 8 * each : 56 + 8 * each]) for each in range(dimensions))
    begin = 48 + 8 * dimensions
    payload = block[begin : begin + stored]
    size = SIZES[dtype]
    elements = 1
    for each in shape:
        elements *= each
    places = {0: 0, 1: (elements + 7) // 8, 2: values * width}[encoding]
    if flags & 4:
        return dtype, shape, read_codes(block, begin, elements, places)
    signs = (elements - values + 7) // 8 if flags & 2 else 0
    if flags & 1:
        import zstandard

        payload = zstandard.ZstdDecompressor().decompress(payload)
        where = unplaned(payload[:places], width) if encoding == 2 else payload[:places]
        end = len(payload) - signs
        payload = where + unplaned(payload[places:end], size) + payload[end:]
    found = [payload[places + size * each : places + size * (each + 1)] for each in range(values)]
    if encoding == 0:
        return dtype, shape, b"".join(found)
    result = [bytes(size)] * elements
    if encoding == 1:
        marked = [each for each in range(elements) if payload[each // 8] >> each % 8 & 1]
    else:
        marked, place = [], -1
        for each in range(values):
            place += 1 + number(payload[each * width : (each + 1) * width])
            marked.append(place)
    for place, value in zip(marked, found, strict=True):
        result[place] = value
    if flags & 2:
        zeros = [place for place in range(elements) if place not in set(marked)]
        for each, place in enumerate(zeros):
            if payload[len(payload) - signs + each // 8] >> each % 8 & 1:
                result[place] = bytes(size - 1) + b"\x80"
    return dtype, shape, b"".join(result)


def read_codes(block: bytes, begin: int, elements: int, places: int) -> bytes:
    """Return the bytes of a tensor that is stored as codes, given where its head describes them."""
    encoding, width, values, stored = block[9], block[11], number(block[32:40]), number(block[40:48])
    dtype = block[16:32].rstrip(b"\0").decode()
    inputs, inner = number(block[begin : begin + 8]), number(block[begin + 8 : begin + 16])
    size, levels = number(block[begin + 16 : begin + 20]), block[begin + 20] + 1
    scale_bytes, offset_bytes = block[begin + 21], block[begin + 22]
    table = [each - 256 if each > 127 else each for each in block[begin + 24 : begin + 24 + levels]]
    begin += 24 + (levels + 7) // 8 * 8
    payload = block[begin : begin + stored]
    row_blocks = (inputs + size - 1) // size
    blocks = elements // inputs * row_blocks
    bits = next(each for each in (1, 2, 4, 8) if levels <= 2**each)
    lengths = [places, blocks * scale_bytes, blocks * offset_bytes, (values * bits + 7) // 8]
    planes = [width or 1, scale_bytes, offset_bytes or 1, 1]
    if block[10] & 1:
        import zstandard

        payload = zstandard.ZstdDecompressor().decompress(payload)
    sections, first = [], 0
    for length, each in zip(lengths, planes, strict=True):
        section = payload[first : first + length]
        sections.append(unplaned(section, each) if block[10] & 1 else section)
        first += length
    where, scales, offsets, symbols = sections
    if encoding == 0:
        marked = list(range(elements))
    elif encoding == 1:
        marked = [each for each in range(elements) if where[each // 8] >> each % 8 & 1]
    else:
        marked, place = [], -1
        for each in range(values):
            place += 1 + number(where[each * width : (each + 1) * width])
            marked.append(place)
    result = [bytes(SIZES[dtype])] * elements
    for each, place in enumerate(marked):
        symbol = symbols[each * bits // 8] >> each * bits % 8 & (1 << bits) - 1
        outer, rest = place // (inputs * inner), place % (inputs * inner)
        which = (outer * row_blocks + rest // inner // size) * inner + rest % inner
        value = np.float32(table[symbol]) * float_at(scales, which, scale_bytes)
        value = value + (float_at(offsets, which, offset_bytes) if offset_bytes else np.float32(0))
        result[place] = rounded(value, dtype)
    return b"".join(result)


def float_at(data: bytes, which: int, size: int) -> np.float32:
    """One of some numbers of 4 bytes, or of the first 2 of these."""
    return np.frombuffer(bytes(4 - size) + data[which * size : (which + 1) * size], dtype="<f4")[0]


def rounded(value: np.float32, dtype: str) -> bytes:
    """A number in a dtype, rounded to nearest, ties to even."""
    if dtype != "BF16":
        return np.array(value, dtype={"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    word = number(value.tobytes())
    rest, word = word & 0xFFFF, word >> 16
    word += rest > 0x8000 or (rest == 0x8000 and word & 1 == 1)
    return (word & 0xFFFF).to_bytes(2, "little")


def sizes(data: bytes, dtype: str) -> dict[str, int]:
    """Bytes of the payload in each way, counted by loops; index is missing where no gap of 4 bytes is wide enough."""
    size = SIZES[dtype]
    elements = [data[begin : begin + size] for begin in range(0, len(data), size)]
    found = {"dense": len(data)}
    negative = bytes(size - 1) + b"\x80"
    for signs in (False, True):
        count, zeros, widest = 0, 0, 0
        for element in elements:
            if any(element) and not (signs and element == negative):
                count, widest, zeros = count + 1, max(widest, zeros), 0
            else:
                zeros += 1
        width = 1 if widest < 256 else 2 if widest < 65536 else 4
        more = (len(elements) - count + 7) // 8 if signs else 0
        ways = {"bitmask": (len(elements) + 7) // 8 + count * size + more, "index": count * (width + size) + more}
        for name, length in ways.items():
            if not signs or dtype in ("F16", "BF16", "F32", "F64"):
                found[name] = min(length, found.get(name, length))
    return found
