"""Compresses a payload by zstd, plane by plane.

The first bytes of all elements are stored together, then the second ones, and so on, each plane with separate zstd
blocks and codes: the byte of a float with sign and exponent has few values, those of the mantissa have any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from .container import FormatError


Bytes = np.ndarray[Any, np.dtype[np.uint8]]
# For each section of a payload its bytes, and the bytes of one of its elements.
Sections = Sequence[tuple[int, int]]

# Codes of bytes, and hardly a search for repetitions: short ones are chance in weights, and cost more than they save.
# docs/compressed.md has the figures.
_SEARCH = {"window_log": 17, "chain_log": 6, "hash_log": 6, "search_log": 1, "min_match": 7, "target_length": 0}
_TABLE = 0.5  # bytes for each byte that occurs, which say how it is coded
SPARE = 64
"""Bytes of zeros after what was unpacked, which may be read in vectors."""

# Bytes of the longest header of a frame.
_FRAME_HEADER = 18


def pack(payload: Bytes, sections: Sections) -> Bytes:
    """Return one zstd frame, whose header has the number of unpacked bytes."""
    library = zstandard()
    search = library.ZstdCompressionParameters(strategy=library.STRATEGY_FAST, write_content_size=1, **_SEARCH)
    compressor = library.ZstdCompressor(compression_params=search).compressobj(size=payload.nbytes)
    packed, begin = [], 0
    for size, width in sections:
        for plane in np.ascontiguousarray(payload[begin : begin + size].reshape(-1, width).T):
            packed += [compressor.compress(plane.data), compressor.flush(library.COMPRESSOBJ_FLUSH_BLOCK)]
        begin += size
    packed.append(compressor.flush())
    return np.frombuffer(b"".join(packed), dtype=np.uint8)


def unpack(packed: Bytes, sections: Sections, what: str, unplane: Callable[[Bytes, int, Bytes], None]) -> Bytes:
    """Return the payload of a frame that has passed :func:`check_frame`, and some zeros; FormatError if damaged.

    ``unplane`` writes elements of some bytes from their planes.
    """
    library = zstandard()
    raw = sum(size for size, _ in sections)
    try:
        planes = library.ZstdDecompressor().decompress(packed.data, max_output_size=raw, allow_extra_data=False)
    except library.ZstdError as error:
        raise FormatError(f"{what} is damaged or forged: zstd cannot unpack it ({error}).") from None
    if len(planes) != raw:
        raise FormatError(f"{what} is damaged or forged: it unpacks to {len(planes)} bytes, not {raw}.")
    payload = np.empty(raw + SPARE, dtype=np.uint8)
    payload[raw:] = 0
    begin = 0
    for size, width in sections:
        section = np.frombuffer(planes, dtype=np.uint8, count=size, offset=begin)
        unplane(section, width, payload[begin : begin + size])
        begin += size
    return payload


def check_frame(packed: Bytes, sections: Sections, what: str) -> None:
    """Check that a frame's header is valid and states the right number of unpacked bytes; raise FormatError if not."""
    library = zstandard()
    raw = sum(size for size, _ in sections)
    try:
        size = library.get_frame_parameters(packed[:_FRAME_HEADER].tobytes()).content_size
    except library.ZstdError as error:
        raise FormatError(f"{what} is damaged or forged: its payload is not a zstd frame ({error}).") from None
    if size != raw:
        raise FormatError(f"{what} is damaged or forged: its zstd frame would unpack to {size} bytes, not {raw}.")


def is_installed() -> bool:
    """Whether the package zstandard is."""
    return find_spec("zstandard") is not None


def likely_bytes(payload: Bytes, sections: Sections) -> int:
    """Return about how many bytes :func:`pack` would give: the entropy of the bytes in each plane."""
    total, begin = 0.0, 0
    for size, width in sections:
        for plane in payload[begin : begin + size].reshape(-1, width).T:
            counts = np.bincount(plane, minlength=1)
            shares = counts[counts > 0] / max(size // width, 1)
            coded = -float((shares * np.log2(shares)).sum()) * plane.size / 8 + _TABLE * shares.size
            total += min(coded, plane.size)
        begin += size
    return round(total)


def zstandard() -> Any:
    """Import and return zstandard; raise ValueError if it is not installed."""
    try:
        import zstandard as library
    except ImportError:
        raise ValueError("zstd needs the package zstandard: pip install 'hf-pdecay[zstd]'.") from None
    return library
