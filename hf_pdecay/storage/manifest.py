"""The manifest of a compressed file, in its header: format version and checksums."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from .container import BLOCK, FormatError, Header, header_bytes


# The key of the manifest in a file's `__metadata__`.
MANIFEST = BLOCK
FORMAT_VERSION = 3
_READ = (2, 3)  # version 2 has no codes

_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS = ("format_version", "header", "sha256")
# Stands for the checksum of the header while that is computed.
_UNKNOWN = "0" * 64


def is_compressed(header: Header) -> bool:
    """Whether a file is one that :func:`compress` has written."""
    return MANIFEST in header.metadata


def compressed_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], checksums: Mapping[str, str]
) -> bytes:
    """Return the header of a compressed file, given the SHA-256 of the bytes of each entry."""
    manifest = dict(zip(_KEYS, (FORMAT_VERSION, _UNKNOWN, dict(checksums)), strict=True))
    text = json.dumps(manifest, separators=(",", ":"))
    raw = header_bytes(tensors, {MANIFEST: text} | dict(metadata))
    return raw.replace(_UNKNOWN.encode(), sha256(raw).encode(), 1)


def header_checksum(raw: bytes, stated: str) -> str:
    """Return the SHA-256 of a header without the checksum that it states of itself."""
    return sha256(raw.replace(stated.encode(), _UNKNOWN.encode(), 1))


def read_manifest(header: Header, name: str) -> tuple[str, dict[str, str]]:
    """Return the checksums of a file's header and of its entries.

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
    if manifest.keys() != set(_KEYS):
        raise FormatError(f"{where} does not have exactly {', '.join(_KEYS)}.")
    checksums = manifest["sha256"]
    if not isinstance(checksums, dict) or checksums.keys() != header.entries.keys():
        raise FormatError(f"{where} does not list the tensors of the file.")
    for tensor, checksum in checksums.items():
        _check_checksum(checksum, f"{where} for {tensor}")
    _check_checksum(manifest["header"], f"{where} for its header")
    return manifest["header"], checksums


def sha256(data: Any) -> str:
    """Return the SHA-256 of bytes, or of an array of bytes, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _check_checksum(checksum: object, where: str) -> None:
    if not isinstance(checksum, str) or not _SHA256.fullmatch(checksum):
        raise FormatError(f"{where} has {checksum!r}; it must be a SHA-256 of 64 hexadecimal digits.")
