"""``quantization_config`` of a compressed model, and the manifests of its files: format version and checksums."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from .container import FormatError, Header
from .folder import check_shard_name


# The name in `quantization_config` by which transformers knows compressed models.
METHOD = "hf_pdecay"
# The key of the manifest in a file's `__metadata__`.
MANIFEST = "hf_pdecay"
FORMAT_VERSION = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")


def make_settings(shards: Mapping[str, str], dtype_added: bool) -> dict[str, Any]:
    """Return the value of ``quantization_config``, given the SHA-256 of the header of each file of weights."""
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "shards": dict(shards),
        # Added to the config because compressed weights do not show the dtype.
        **({"dtype_added": True} if dtype_added else {}),
    }


def check_settings(settings: object) -> dict[str, str]:
    """Check ``quantization_config``, and return the files' checksums; raise FormatError if it is invalid."""
    where = "quantization_config in config.json"
    if settings is None:
        raise FormatError("config.json has no quantization_config: the model is not compressed.")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != METHOD:
        raise FormatError(f"{where} is not that of a model compressed by hf_pdecay.")
    unknown = sorted(set(settings) - {"quant_method", "format_version", "shards", "dtype_added"})
    if unknown:
        raise FormatError(f"{where} has {unknown[0]!r}, which this format lacks; it is forged or of a later version.")
    if (version := settings.get("format_version")) != FORMAT_VERSION:
        raise FormatError(f"{where} has format_version {version!r}; this hf_pdecay reads {FORMAT_VERSION}.")
    shards = settings.get("shards")
    if not isinstance(shards, Mapping) or not shards:
        raise FormatError(f"{where} names no files in shards.")
    for name, checksum in shards.items():
        check_shard_name(name, where)
        _check_checksum(checksum, f"{where} for {name}")
    return dict(shards)


def make_manifest(checksums: Mapping[str, str]) -> str:
    """Return the manifest of a file of weights: SHA-256 of the bytes of each entry, by the tensor's name."""
    return json.dumps({"format_version": FORMAT_VERSION, "sha256": dict(checksums)}, separators=(",", ":"))


def read_manifest(header: Header, name: str) -> dict[str, str]:
    """Return the checksums of a file's entries; raise FormatError if it has no manifest, or one of other tensors."""
    where = f"The manifest in {name}"
    if MANIFEST not in header.metadata:
        raise FormatError(
            f"{name} has no manifest of hf_pdecay in its __metadata__: its weights are plain. If a new model was made "
            "from the config of a compressed one, delete quantization_config from its config.json."
        )
    try:
        manifest = json.loads(header.metadata[MANIFEST])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} cannot be read as JSON ({error}).") from None
    if not isinstance(manifest, dict) or manifest.keys() != {"format_version", "sha256"}:
        raise FormatError(f"{where} does not have exactly format_version and sha256.")
    if manifest["format_version"] != FORMAT_VERSION:
        raise FormatError(f"{where} has version {manifest['format_version']!r}; this hf_pdecay reads {FORMAT_VERSION}.")
    checksums = manifest["sha256"]
    if not isinstance(checksums, dict) or checksums.keys() != header.entries.keys():
        raise FormatError(f"{where} does not list the tensors of the file.")
    for tensor, checksum in checksums.items():
        _check_checksum(checksum, f"{where} for {tensor}")
    return checksums


def sha256(data: Any) -> str:
    """Return the SHA-256 of bytes, or of an array of bytes, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _check_checksum(checksum: object, where: str) -> None:
    if not isinstance(checksum, str) or not _SHA256.fullmatch(checksum):
        raise FormatError(f"{where} has {checksum!r}; it must be a SHA-256 of 64 hexadecimal digits.")
