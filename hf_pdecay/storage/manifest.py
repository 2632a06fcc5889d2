"""The manifest of a compressed file, in its header: format version, checksums, and the base of a delta."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .container import BLOCK, FormatError, Header, header_bytes


# The key of the manifest in a file's `__metadata__`.
MANIFEST = BLOCK
FORMAT_VERSION = 3
_READ = (2, 3)  # version 2 has no codes

_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS = ("format_version", "header", "sha256")
_BASE = "base"  # a key that only the file of a delta has
# Stands for the checksum of the header while that is computed.
_UNKNOWN = "0" * 64


class Base(NamedTuple):
    """The model that a delta changes."""

    name: str  # on the Hub, or a folder, from the delta's or absolute
    revision: str | None  # on the Hub
    sha256: dict[str, str]  # of each tensor that the delta changes


class Manifest(NamedTuple):
    """The checksums of a file's header and of its entries, and the base of a delta."""

    header: str
    sha256: dict[str, str]
    base: Base | None


def is_compressed(header: Header) -> bool:
    """Whether a file is one that :func:`compress` has written."""
    return MANIFEST in header.metadata


def compressed_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    checksums: Mapping[str, str],
    base: Base | None = None,
) -> bytes:
    """Return the header of a compressed file, given the SHA-256 of the bytes of each entry."""
    manifest: dict[str, Any] = dict(zip(_KEYS, (FORMAT_VERSION, _UNKNOWN, dict(checksums)), strict=True))
    if base is not None:
        manifest[_BASE] = base._asdict()
    text = json.dumps(manifest, separators=(",", ":"))
    raw = header_bytes(tensors, {MANIFEST: text} | dict(metadata))
    return raw.replace(_UNKNOWN.encode(), sha256(raw).encode(), 1)


def header_checksum(raw: bytes, stated: str) -> str:
    """Return the SHA-256 of a header without the checksum that it states of itself."""
    return sha256(raw.replace(stated.encode(), _UNKNOWN.encode(), 1))


def read_manifest(header: Header, name: str) -> Manifest:
    """Return the manifest of a file, checked.

    Raises FormatError if it has no manifest, or one of other tensors.
    """
    where = f"The manifest in {name}"
    if not is_compressed(header):
        raise FormatError(f"{name} has no manifest of hf_pdecay in its __metadata__: its weights are not compressed.")
    try:
        manifest = json.loads(header.metadata[MANIFEST])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} cannot be read as JSON ({error}).") from None
    if not isinstance(manifest, dict) or (version := manifest.get("format_version")) is None:
        raise FormatError(f"{where} does not have a format_version.")
    if version not in _READ:
        known = " and ".join(map(str, _READ))
        raise FormatError(f"{where} has version {version!r}; this hf_pdecay reads {known}.")
    if manifest.keys() - {_BASE} != set(_KEYS):
        raise FormatError(f"{where} does not have exactly {', '.join(_KEYS)}.")
    checksums = manifest["sha256"]
    if not isinstance(checksums, dict) or checksums.keys() != header.entries.keys():
        raise FormatError(f"{where} does not list the tensors of the file.")
    for tensor, checksum in checksums.items():
        _check_checksum(checksum, f"{where} for {tensor}")
    _check_checksum(manifest["header"], f"{where} for its header")
    base = _read_base(manifest[_BASE], header, where) if _BASE in manifest else None
    return Manifest(manifest["header"], checksums, base)


def _read_base(stated: object, header: Header, where: str) -> Base:
    if not isinstance(stated, dict) or stated.keys() != set(Base._fields):
        raise FormatError(f"{where} does not have exactly {', '.join(Base._fields)} of its base.")
    name, revision, checksums = (stated[key] for key in Base._fields)
    if not isinstance(name, str) or not name or not isinstance(revision, str | None) or not isinstance(checksums, dict):
        raise FormatError(f"{where} does not say which model its base is.")
    for tensor, checksum in checksums.items():
        if header.entries.get(tensor) is None or header.entries[tensor].dtype != BLOCK:
            raise FormatError(f"{where} has a base for {tensor!r}, of which the file has no changes.")
        _check_checksum(checksum, f"{where} for {tensor} of its base")
    return Base(name, revision, checksums)


def sha256(data: Any) -> str:
    """Return the SHA-256 of bytes, or of an array of bytes, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _check_checksum(checksum: object, where: str) -> None:
    if not isinstance(checksum, str) or not _SHA256.fullmatch(checksum):
        raise FormatError(f"{where} has {checksum!r}; it must be a SHA-256 of 64 hexadecimal digits.")
