"""Another reader of compressed tensors, written from docs/compressed.md with plain loops; it checks nothing."""

from __future__ import annotations


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
