"""Compressing a model's folder: shard by shard and tensor by tensor, so that it need not fit into memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .card import add_note
from .container import Entry, FormatError, Header, header_bytes, write_file
from .folder import (
    CONFIG,
    INDEX,
    WEIGHTS,
    check_apart,
    check_target,
    copy_along,
    read_config,
    read_json,
    read_weights,
    scratch_folder,
    write_json,
    written_folder,
)
from .format import DENSE, Bytes, blob_shape, decode, encode
from .hub import local_folder
from .manifest import MANIFEST, make_manifest, make_settings, sha256
from .report import StorageReport


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def compress(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    zstd: bool = False,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
) -> StorageReport:
    """Compress the weights of a model's folder, and copy what else is in it.

    After ``import hf_pdecay``, ``from_pretrained(out)`` gives the same model back, to the bit. Each tensor is read,
    encoded, decoded again for comparison, and written before the next one is.

    Args:
        model: A folder with ``config.json`` and safetensors, or a name on the Hub, which is downloaded.
        out: The folder to write. It appears when it is whole.
        zstd: Also compress by zstd, for which zstandard is needed, here and where the model is loaded.
        max_shard_size: Bytes of a file of weights, or a string such as ``"5GB"``; by default there are the files that
            the model has.
        overwrite: Replace ``out`` if it is a model's folder.

    Returns:
        Bytes before and after, by encoding.

    Raises:
        ValueError: If the model is not one whose weights are plain safetensors (as a ``FormatError``), or an argument
            is wrong.
    """
    limit = parse_size(max_shard_size)
    folder = local_folder(model)
    config = read_config(folder)
    settings = config.get("quantization_config")
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise FormatError(
            f"{str(folder)!r} is {'compressed' if method == MANIFEST else 'quantized'} already "
            f"(quant_method {method!r}); name a plain model."
        )
    headers = read_weights(folder)
    check_apart(folder, out)
    report = StorageReport()
    with written_folder(out, overwrite) as aside:
        report.left_out = copy_along(folder, aside, headers)
        add_note(aside)
        shards = _Shards(aside, limit, report, zstd, next(iter(headers.values())).metadata)
        try:
            for name, header in headers.items():
                for tensor, entry, data in _tensors(folder / name, header):
                    shards.add(tensor, entry, data)
                if limit is None:
                    shards.close(name)
            placed, checksums = shards.finish()
        finally:
            shards.handle.close()
        if len(checksums) > 1 or WEIGHTS not in checksums:
            metadata = read_json(folder / INDEX).get("metadata") if WEIGHTS not in headers else None
            metadata = metadata if isinstance(metadata, dict) else {"total_size": report.before}
            write_json(aside / INDEX, {"metadata": metadata, "weight_map": placed}, sort_keys=True)
        dtype = None if "dtype" in config or "torch_dtype" in config else _dtype_of(next(iter(headers.values())))
        config |= {"dtype": dtype} if dtype else {}
        write_json(aside / CONFIG, config | {"quantization_config": make_settings(checksums, dtype is not None)})
    return report


def save_compressed(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    processing_class: Any = None,
    zstd: bool = False,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    **kwargs: Any,
) -> StorageReport:
    """Save a model as ``save_pretrained`` does, with compressed weights.

    The plain model is on disk beside ``folder`` in the meantime. Of several processes one calls it; where they hold a
    model in shards, save that by the Trainer first and :func:`compress` the folder.

    Args:
        model: A model of transformers, or anything with its ``save_pretrained``.
        folder: Where to write. It appears when it is whole.
        processing_class: A tokenizer or processor to save with it.
        zstd: See :func:`compress`.
        max_shard_size: See :func:`compress`.
        overwrite: See :func:`compress`.
        **kwargs: Of ``save_pretrained``.

    Returns:
        Bytes before and after, by encoding.
    """
    parse_size(max_shard_size)
    check_target(folder, overwrite)
    with scratch_folder(folder) as plain:
        model.save_pretrained(str(plain), **kwargs)
        if processing_class is not None:
            processing_class.save_pretrained(str(plain))
        return compress(plain, folder, zstd=zstd, max_shard_size=max_shard_size, overwrite=overwrite)


def parse_size(size: int | str | None) -> int | None:
    """Return a number of bytes from one or from a string such as ``"5GB"``; None stays None.

    Raises:
        ValueError: If it is none.
    """
    if size is None or (isinstance(size, int) and size > 0):
        return size
    match = re.fullmatch(r"(\d+)\s*([KMGT]I?B)", size.upper()) if isinstance(size, str) else None
    if match is None or int(match[1]) == 0:
        raise ValueError(
            f"Invalid max_shard_size: max_shard_size={size!r}; it must be a number of bytes above 0 or a string such "
            "as '5GB'."
        )
    return int(match[1]) * _UNITS[match[2]]


def _tensors(file: Path, header: Header) -> Iterator[tuple[str, Entry, Bytes]]:
    """The tensors of a file, read one at a time, in the order of their bytes."""
    with open(file, "rb") as handle:
        for tensor, entry in header.entries.items():
            handle.seek(entry.begin)
            data = np.fromfile(handle, dtype=np.uint8, count=entry.size)
            if data.nbytes != entry.size:
                raise FormatError(f"{file.name} has become shorter while it was read.")
            yield tensor, entry, data


def _dtype_of(header: Header) -> str | None:
    """The dtype that transformers takes for a model's whose config names none: that of its first floating tensor."""
    found = (_FLOATS.get(header.entries[name].dtype) for name in sorted(header.entries))
    return next((each for each in found if each is not None), None)


class _Shards:
    """Files of weights that are written one after the other, each when it is full or is closed."""

    def __init__(
        self, folder: Path, limit: int | None, report: StorageReport, zstd: bool, metadata: dict[str, str]
    ) -> None:
        self.folder, self.limit, self.report, self.zstd = folder, limit, report, zstd
        self.metadata = {"format": "pt"} | metadata
        self.closed: list[tuple[str, dict[str, str], str]] = []
        self._begin()

    def _begin(self) -> None:
        self.data = self.folder / ".data"
        self.handle = open(self.data, "wb")  # noqa: SIM115
        self.size = 0
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.checksums: dict[str, str] = {}

    def add(self, name: str, entry: Entry, data: Bytes) -> None:
        """Encode a tensor and append it."""
        encoding, blob = encode(data, entry.dtype, entry.shape, self.zstd)
        if blob is not None:
            back, _ = decode(blob, data.nbytes, repr(name))
            if not np.array_equal(back, data):
                raise RuntimeError(f"{name!r} does not come back to the bit from its encoding; please report it.")
            del back
        stored = data if blob is None else blob
        if self.limit is not None and self.size and self.size + stored.nbytes > self.limit:
            self.close(f".shard-{len(self.closed)}")
        self.handle.write(stored.data)
        self.size += stored.nbytes
        self.tensors[name] = (entry.dtype, entry.shape) if blob is None else ("U8", blob_shape(blob, entry.shape))
        self.checksums[name] = sha256(stored.data)
        self.report.add(DENSE if blob is None else encoding, data.nbytes, stored.nbytes)

    def close(self, name: str) -> None:
        """Put the file together under a name."""
        self.handle.close()
        raw = header_bytes(self.tensors, self.metadata | {MANIFEST: make_manifest(self.checksums)})
        write_file(self.folder / name, raw, self.data)
        self.report.headers += len(raw) + 8
        self.closed.append((name, dict.fromkeys(self.tensors, name), sha256(raw)))
        self.data.unlink()
        self._begin()

    def finish(self) -> tuple[dict[str, str], dict[str, str]]:
        """Give the files their names; returns where each tensor is and the checksum of each file's header."""
        if self.tensors or not self.closed:
            self.close(f".shard-{len(self.closed)}")
        self.handle.close()
        self.data.unlink()
        placed: dict[str, str] = {}
        checksums: dict[str, str] = {}
        for place, (name, tensors, checksum) in enumerate(self.closed):
            final = name
            if self.limit is not None:
                number = f"model-{place + 1:05d}-of-{len(self.closed):05d}.safetensors"
                final = WEIGHTS if len(self.closed) == 1 else number
                (self.folder / name).rename(self.folder / final)
            placed |= dict.fromkeys(tensors, final)
            checksums[final] = checksum
        return placed, checksums
