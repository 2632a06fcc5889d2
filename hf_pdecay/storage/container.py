"""Headers of files in the safetensors format, see https://huggingface.co/docs/safetensors.

Tensors come one at a time, so that a model may be larger than memory; a header is checked before memory is taken.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn


# For each dtype by safetensors' name: bytes of an element and torch's name; in the order in which the library lays
# tensors out.
DTYPES = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "F32": (4, "float32"),
    "C64": (8, "complex64"),
    "F64": (8, "float64"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
}
# The dtype of a tensor that is stored as a block of bytes. No reader of safetensors knows it, so a reader that cannot
# decode blocks refuses the file, whatever it would do with tensors of wrong shapes.
BLOCK = "hf_pdecay"
ITEMSIZES = {dtype: size for dtype, (size, _) in DTYPES.items()}
_ORDER = {dtype: number for number, dtype in enumerate(DTYPES)}

# The library's own limit, in bytes.
_HEADER_LIMIT = 100_000_000
# No tensor has more bytes or dimensions than this in any library; larger figures are forged.
_BYTES_LIMIT = 1 << 62
DIMENSIONS_LIMIT = 64


class FormatError(ValueError):
    """A damaged, forged or unreadable file of weights; the message explains it in one sentence."""


class Entry(NamedTuple):
    """A tensor of a file: safetensors' name of its dtype, shape, position of its first byte, number of bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


class Header(NamedTuple):
    """The header of a file: tensors in the order of their bytes, the file's strings, the bytes for its checksum."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    raw: bytes


def entry_bytes(dtype: str, shape: Iterable[int], what: str) -> int:
    """Return the number of bytes of an entry, a tensor or a block; errors as of :func:`tensor_bytes`."""
    return tensor_bytes("U8" if dtype == BLOCK else dtype, shape, what)


def tensor_bytes(dtype: str, shape: Iterable[int], what: str) -> int:
    """Return the number of bytes of a tensor; raise FormatError if no tensor has such a dtype or shape."""
    if dtype not in ITEMSIZES:
        raise FormatError(f"{what} has the dtype {dtype!r}; it must be one of {', '.join(ITEMSIZES)}.")
    total, empty, count = ITEMSIZES[dtype], False, 0
    for size in shape:
        count += 1
        if type(size) is not int or size < 0:
            raise FormatError(f"{what} has a dimension of {size!r}; it must be a whole number of at least 0.")
        # For strides, libraries multiply the non-zero sizes.
        empty |= size == 0
        total *= max(size, 1)
        if total > _BYTES_LIMIT or count > DIMENSIONS_LIMIT:
            raise FormatError(f"{what} has a shape that no tensor can have: more than 2^62 bytes or 64 dimensions.")
    return 0 if empty else total


def read_header(file: str | os.PathLike[str]) -> Header:
    """Read the header of a file of tensors; raise FormatError if it is invalid or does not match the file's length."""
    with open(file, "rb") as handle:
        return header_of(handle, os.fstat(handle.fileno()).st_size, Path(file).name)


def header_of(handle: BinaryIO, whole: int, file: str) -> Header:
    """Read the header of an opened file, as :func:`read_header` does, given its length and its name."""

    def refuse(reason: str) -> NoReturn:
        raise FormatError(f"{file} is not a whole file of safetensors: {reason}.")

    length = handle.read(8)
    if len(length) < 8:
        refuse(f"it has {whole} bytes")
    (size,) = struct.unpack("<Q", length)
    if size > min(whole - 8, _HEADER_LIMIT):
        refuse(f"its header would have {size} bytes and the file has {whole}")
    raw = handle.read(size)
    try:
        parsed = json.loads(raw, object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        refuse(f"its header cannot be read ({error})")
    if not isinstance(parsed, dict):
        refuse("its header is not a table of tensors")
    if not all(map(_is_string, parsed)):
        refuse("a name in its header is not a valid string")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_string, [*metadata, *metadata.values()])):
        refuse("its __metadata__ does not hold strings only")
    spans: list[tuple[int, int, str]] = []
    entries: dict[str, Entry] = {}
    for name, entry in parsed.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            refuse(f"its entry {name!r} does not have exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or not isinstance(shape, list):
            refuse(f"the dtype or the shape of {name!r} has a wrong type")
        if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
            refuse(f"data_offsets of {name!r} are not two whole numbers")
        expected = entry_bytes(dtype, shape, f"{name!r} in {file}")
        if offsets[1] - offsets[0] != expected:
            refuse(f"{name!r} has {offsets[1] - offsets[0]} bytes where its dtype and shape need {expected}")
        spans.append((offsets[0], offsets[1], name))
        entries[name] = Entry(dtype, tuple(shape), 8 + size + offsets[0], expected)
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            refuse(f"{name!r} begins at {begin} where the tensor before it ends at {end}")
        end = stop
    if 8 + size + end != whole:
        refuse(f"it has {whole} bytes where its header needs {8 + size + end}")
    return Header({name: entries[name] for _, _, name in sorted(spans)}, metadata, raw)


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """Return names of tensors in the order in which the safetensors library writes them: wide dtypes first."""
    return sorted(tensors, key=lambda name: (-_ORDER[tensors[name][0]], name))


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return a header, padded as the library does; ``tensors`` are in the order of their bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + entry_bytes(dtype, shape, repr(name))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return raw + b" " * (-len(raw) % 8)


def write_header(handle: BinaryIO, raw: bytes) -> None:
    """Write the beginning of a file, which the tensors' bytes follow."""
    handle.write(struct.pack("<Q", len(raw)))
    handle.write(raw)


def _is_string(value: object) -> bool:
    """Whether a value is a string that can be written: in JSON one can escape halves of a character."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
