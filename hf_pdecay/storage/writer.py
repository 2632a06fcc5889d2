"""Compressing a model's folder tensor by tensor, so that the model need not fit into memory."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from ..checks import check_choice
from ..sparsity.file_names import CODES_FILE
from ..terminal import progress
from .card import add_note
from .casting import CASTS, cast, cast_config
from .container import BLOCK, ITEMSIZES, Entry, FormatError, Header, write_header
from .encoding import HEAD_LIMIT, Blob, Bytes, decode, encode, encode_changes, parse
from .folder import CONFIG, INDEX, WEIGHTS, check_out, inside, read_json, scratch_folder, write_json
from .manifest import Base, compressed_header, sha256
from .report import StorageReport
from .source import Source, read_source
from .zstd_planes import is_installed, likely_bytes


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_CHUNK = 1 << 20


def compress(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    zstd: bool | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
) -> StorageReport:
    """Compress the weights of a model's folder, and copy its other files.

    After ``import hf_pdecay``, ``from_pretrained(out)`` loads a bit-identical model. Each tensor is read, encoded,
    decoded again for comparison, and written before the next one.

    With ``dtype`` the weights are rounded first: the loaded model is then that of the rounded weights. Zeros stay
    zeros, and values too small for the dtype become zero, which the report counts.

    Args:
        model: A folder with ``config.json`` and safetensors, or a name on the Hub, which is downloaded.
        out: The folder to write. It appears when it is whole.
        dtype: ``"bfloat16"`` or ``"float16"``, to which floating tensors are rounded; None keeps their dtypes.
        zstd: Whether to compress by zstd too, which needs zstandard here and where the model is loaded; None does so
            if it is installed here.
        max_shard_size: Bytes of a file of weights, or a string such as ``"5GB"``; None keeps the model's own files.
        overwrite: Replace ``out`` if it is a model's folder.

    Returns:
        Bytes before and after, by encoding.

    Raises:
        ValueError: If the weights are not plain safetensors (as a ``FormatError``), or an argument is invalid.
    """
    limit = parse_size(max_shard_size)
    if dtype is not None:
        check_choice("dtype", dtype, tuple(CASTS))
    source = read_source(model, out, overwrite)
    source.check_plain(ragged=True)
    wanted = is_installed() if zstd is None else zstd
    settings = _Settings(dtype, wanted, zstd is None and not wanted, _known_block(source.folder))
    report = StorageReport()
    with source.rewritten() as aside:
        report.left_out = source.copy_along(aside)
        add_note(aside)
        files, size = _write_shards(source, aside, limit, settings, report)
        if files.keys() != {WEIGHTS}:
            metadata = None if WEIGHTS in source.headers else read_json(source.folder / INDEX).get("metadata")
            metadata = metadata if isinstance(metadata, dict) and dtype is None else {"total_size": size}
            placed = {tensor: name for name, tensors in files.items() for tensor in tensors}
            write_json(aside / INDEX, {"metadata": metadata, "weight_map": placed}, sort_keys=True)
        if dtype is None:
            shutil.copyfile(source.folder / CONFIG, aside / CONFIG)
        else:
            write_json(aside / CONFIG, cast_config(source.config, dtype))
    return report


def save_compressed(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    processing_class: Any = None,
    zstd: bool | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    **kwargs: Any,
) -> StorageReport:
    """Save a model as ``save_pretrained`` does, with compressed weights.

    The plain model is on disk beside ``folder`` in the meantime. Call it in one process only; save a sharded model by
    the Trainer first, and :func:`compress` its folder.

    Args:
        model: A model of transformers, or anything with its ``save_pretrained``.
        folder: The folder to write. It appears when it is whole.
        processing_class: A tokenizer or processor to save with it.
        zstd: Whether to compress by zstd too; None does so if zstandard is installed.
        max_shard_size: Bytes of a file of weights, or a string such as ``"5GB"``.
        overwrite: Replace ``folder`` if it is a model's folder.
        **kwargs: Arguments of ``save_pretrained``.

    Returns:
        Bytes before and after, by encoding.

    Raises:
        ValueError: If an argument is invalid.
    """
    parse_size(max_shard_size)
    check_out(folder, overwrite)
    with scratch_folder(folder) as plain:
        model.save_pretrained(str(plain), **kwargs)
        if processing_class is not None:
            processing_class.save_pretrained(str(plain))
        return compress(plain, folder, zstd=zstd, max_shard_size=max_shard_size, overwrite=overwrite)


def parse_size(size: int | str | None) -> int | None:
    """Return a number of bytes from one or from a string such as ``"5GB"``; None stays None. ValueError if invalid."""
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
                raise FormatError(f"{file.name} became shorter while it was read.")
            yield tensor, entry, data


def _write_shards(
    source: Source, aside: Path, limit: int | None, settings: _Settings, report: StorageReport
) -> tuple[dict[str, list[str]], int]:
    """Write the files of weights; returns the tensors of each file, and the bytes of all tensors when decoded."""
    size = 0
    with TemporaryFile(dir=aside) as waiting:
        shards = Shards(aside, waiting, {"format": "pt"} | next(iter(source.headers.values())).metadata, report)
        for name, header in source.headers.items():
            tensors = _tensors(source.folder / name, header)
            for tensor, entry, raw in progress(tensors, f"Compressing {name}", len(header.entries)):
                data, vanished = raw, 0
                if settings.dtype is not None:
                    data, entry, vanished = cast(raw, tensor, entry, settings.dtype)  # noqa: PLW2901
                form = entry.dtype, entry.shape
                blob = encoded(tensor, *form, data, zstd=settings.zstd, block=settings.block)
                head = None if blob is None else parse(blob, blob.nbytes, tensor)
                stored = data if blob is None else blob
                size += data.nbytes
                report.vanished += vanished
                report.add("dense" if head is None else head.kind, raw.nbytes, stored.nbytes)
                if settings.missed:
                    report.zstd_saves += _saving(data, entry) if blob is None or head is None else _saving(blob, head)
                if limit is not None and waiting.tell() and waiting.tell() + stored.nbytes > limit:
                    shards.close(f".shard-{len(shards.files)}")
                if blob is None:
                    shards.add(tensor, entry.dtype, entry.shape, stored)
                else:
                    shards.add(tensor, BLOCK, (blob.nbytes,), stored)
            if limit is None:
                shards.close(name)
        if limit is None:
            return shards.files, size
        shards.close(f".shard-{len(shards.files)}")
    files, count = {}, len(shards.files)
    for number, (name, written) in enumerate(shards.files.items(), 1):
        final = WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        (aside / name).rename(aside / final)
        files[final] = written
    return files, size


class _Settings(NamedTuple):
    """How tensors are encoded.

    Attributes:
        dtype: To which they are rounded, or None.
        zstd: Whether by zstd too.
        missed: Whether zstd would be used if it were installed.
        block: Weights that share a scale, if the folder says so.
    """

    dtype: str | None
    zstd: bool
    missed: bool
    block: int | None


def _known_block(folder: Path) -> int | None:
    """Return how many weights share a scale in a model that ``hf-pdecay quantize`` wrote; None if nothing says so."""
    file = folder / CODES_FILE
    if not file.is_file():
        return None
    try:
        block = read_json(inside(file, folder)).get("block")
    except FormatError:  # of another program
        return None
    return block if type(block) is int and block > 0 else None


def _saving(stored: Bytes, form: Blob | Entry) -> int:
    """Return about how many bytes zstd would save."""
    if isinstance(form, Blob):
        return max(form.raw - likely_bytes(stored[form.begin :], form.sections), 0)
    return max(stored.nbytes - likely_bytes(stored, [(stored.nbytes, ITEMSIZES[form.dtype])]), 0)


def encoded(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    data: Bytes,
    *,
    zstd: bool,
    block: int | None = None,
    base: Bytes | None = None,
) -> Bytes | None:
    """Encode a tensor, and check that it decodes to the same bits; None: it is stored plainly.

    With the bytes of a ``base`` only what differs from it is stored, if that takes hardly more bytes.
    """
    changes = None if base is None else encode_changes(data, base, dtype, shape, zstd)
    blob = changes
    if changes is None or changes.nbytes > data.nbytes / 2:
        _, blob = encode(data, dtype, shape, zstd, block)
        # A small tensor is not said to be changed as a whole to save the bytes of a head.
        if changes is not None and changes.nbytes < (data if blob is None else blob).nbytes + HEAD_LIMIT:
            blob = changes
    if blob is None:
        return None
    if not np.array_equal(decode(blob, data.nbytes, repr(name), None if base is None else base.copy())[0], data):
        raise RuntimeError(f"{name!r} is not bit-identical after encoding and decoding; please report it.")
    return blob


class Shards:
    """Files of weights that are written one after the other; ``files`` has the tensors of each.

    The tensors' bytes of the current file wait in ``data``: its header comes before them and is only known after them.
    """

    def __init__(self, folder: Path, data: BinaryIO, metadata: dict[str, str], report: StorageReport) -> None:
        self._folder, self._data, self._metadata, self._report = folder, data, metadata, report
        self._tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._checksums: dict[str, str] = {}
        self.files: dict[str, list[str]] = {}

    def add(self, name: str, dtype: str, shape: tuple[int, ...], stored: Bytes) -> None:
        """Append a tensor to the current file."""
        self._data.write(stored.data)
        self._tensors[name] = dtype, shape
        self._checksums[name] = sha256(stored.data)

    def close(self, name: str, base: Base | None = None) -> None:
        """Write the current file under a name, and begin the next; ``base`` is that of a delta."""
        raw = compressed_header(self._tensors, self._metadata, self._checksums, base)
        self._data.seek(0)
        with open(self._folder / name, "wb") as file:
            write_header(file, raw)
            shutil.copyfileobj(self._data, file, _CHUNK)
        self._report.headers += len(raw) + 8
        self.files[name] = list(self._tensors)
        self._data.seek(0)
        self._data.truncate()
        self._tensors, self._checksums = {}, {}
