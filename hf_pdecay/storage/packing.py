"""zstd over a payload, plane by plane.

The bytes of a float are not alike: the one of sign and exponent takes few values, those of the mantissa any. So all
first bytes of the elements go beside each other, then all second ones and so on, and each such plane gets zstd blocks,
hence codes, of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .container import FormatError


Bytes = np.ndarray[Any, np.dtype[np.uint8]]
# Of the parts of a payload: how many bytes each has, and the bytes of one of its elements.
Sections = Sequence[tuple[int, int]]

# In a trial on random float32 values levels 3 and 9 took longer and gave no smaller files.
_LEVEL = 1
# The longest header of a frame.
_FRAME_HEADER = 18


def pack(payload: Bytes, sections: Sections) -> Bytes:
    """Return one zstd frame, which says how many bytes it unpacks to."""
    library = zstandard()
    compressor = library.ZstdCompressor(level=_LEVEL).compressobj(size=payload.nbytes)
    parts, begin = [], 0
    for size, width in sections:
        for plane in np.ascontiguousarray(payload[begin : begin + size].reshape(-1, width).T):
            parts += [compressor.compress(plane.data), compressor.flush(library.COMPRESSOBJ_FLUSH_BLOCK)]
        begin += size
    parts.append(compressor.flush())
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def unpack(packed: Bytes, sections: Sections, what: str) -> Bytes:
    """Return the payload of a frame that has passed :func:`check_frame`.

    Raises:
        FormatError: If zstd finds it damaged.
    """
    library = zstandard()
    raw = sum(size for size, _ in sections)
    try:
        found = library.ZstdDecompressor().decompress(packed.tobytes(), max_output_size=raw, allow_extra_data=False)
    except library.ZstdError as error:
        raise FormatError(f"{what} is damaged or forged: zstd cannot unpack it ({error}).") from None
    if len(found) != raw:
        raise FormatError(f"{what} is damaged or forged: it unpacks to {len(found)} bytes where {raw} are due.")
    payload = np.empty(raw, dtype=np.uint8)
    begin = 0
    for size, width in sections:
        planes = np.frombuffer(found, dtype=np.uint8, count=size, offset=begin).reshape(width, -1)
        payload[begin : begin + size].reshape(-1, width)[:] = planes.T
        begin += size
    return payload


def check_frame(packed: Bytes, sections: Sections, what: str) -> None:
    """Check that a frame says that it unpacks to as many bytes as are due; it is not unpacked.

    Raises:
        FormatError: If it does not, or is none.
    """
    library = zstandard()
    raw = sum(size for size, _ in sections)
    try:
        size = library.get_frame_parameters(packed[:_FRAME_HEADER].tobytes()).content_size
    except library.ZstdError as error:
        raise FormatError(f"{what} is damaged or forged: its payload is no zstd frame ({error}).") from None
    if size != raw:
        raise FormatError(f"{what} is damaged or forged: its zstd frame would unpack to {size} bytes, not {raw}.")


def zstandard() -> Any:
    """Return the library.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        import zstandard as library
    except ImportError:
        raise ValueError("zstd needs the package zstandard: pip install 'hf-pdecay[zstd]'.") from None
    return library
