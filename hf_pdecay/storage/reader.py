"""Reading compressed folders: checking them before memory is taken, and writing the plain folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..names import natural_key
from .card import remove_note
from .container import Entry, FormatError, Header, header_bytes, layout, read_header, write_header
from .encoding import HEAD_LIMIT, Bytes, blob_shape, check, decode, parse
from .folder import CONFIG, INDEX, WEIGHTS, read_config, read_json, read_weights, write_json
from .manifest import MANIFEST, check_settings, read_manifest, sha256
from .report import StorageReport
from .source import read_source


# 0 switches the comparison of checksums off; everything else is still checked.
CHECKSUMS_VARIABLE = "HF_PDECAY_VERIFY_CHECKSUMS"


def checksums_wanted() -> bool:
    """Whether checksums are compared when a model is loaded or decompressed; ValueError for an invalid variable."""
    value = os.environ.get(CHECKSUMS_VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"Invalid {CHECKSUMS_VARIABLE}: it is {value!r}; it must be 0 or 1.")
    return value == "1"


def check_file(file: Path, header_checksum: str, checksums: bool) -> Header:
    """Check a compressed file of weights: header, manifest, each tensor's block and, if wanted, checksums.

    Takes a few chunks of memory, whatever the file says about its tensors. Raises FormatError if it is damaged or
    forged.
    """
    header = read_header(file)
    manifest = read_manifest(header, file.name)
    if checksums and sha256(header.raw) != header_checksum:
        raise FormatError(
            f"{file.name} is not the file that {CONFIG} names: the checksum of its header differs. Download the model "
            "again."
        )
    for name, entry in header.entries.items():
        stored = _mapped(file, entry)
        what = f"{name!r} in {file.name}"
        if checksums and sha256(stored) != manifest[name]:
            raise FormatError(f"{what} is damaged: its checksum differs from the manifest's. Download the model again.")
        if is_blob(entry):
            head = check(stored, what)
            if entry.shape != blob_shape(stored, head.shape):
                raise FormatError(f"{what} is damaged or forged: its block is stored in a wrong shape.")
    return header


def is_blob(entry: Entry) -> bool:
    """Whether an entry of a compressed file is a block; a tensor of bytes is always stored as one."""
    return entry.dtype == "U8"


def memory_limit() -> int:
    """Free bytes of this machine's memory; larger tensors are refused."""
    import psutil  # which comes with accelerate

    return int(psutil.virtual_memory().available)


def decompress(model: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False) -> StorageReport:
    """Write the plain folder of a compressed model, which loads anywhere.

    Args:
        model: A folder that :func:`compress` or :func:`save_compressed` wrote, or its name on the Hub.
        out: The folder to write. It appears when it is whole.
        overwrite: Replace ``out`` if it is a model's folder.

    Returns:
        Bytes before and after compression, by encoding.

    Raises:
        ValueError: If the model is not compressed or is damaged (as a ``FormatError``), or does not fit on the disk.
    """
    source = read_source(model, out, overwrite)
    folder, config = source.folder, dict(source.config)
    settings: Any = config.pop("quantization_config", None)
    headers = _checked(folder, settings, source.headers)
    if settings.get("dtype_added"):
        config.pop("dtype", None)
    report = StorageReport(headers=sum(len(header.raw) + 8 for header in headers.values()))
    plain = {name: _plain_tensors(folder / name, header, report) for name, header in headers.items()}
    with source.rewritten() as aside:
        free = shutil.disk_usage(aside).free
        if report.before > free:
            raise ValueError(f"The plain model has {report.before} bytes, and only {free} are free on the disk of out.")
        report.left_out = source.copy_along(aside)
        remove_note(aside)
        for name, header in headers.items():
            _write_plain(folder / name, header, plain[name], aside / name)
        if WEIGHTS not in headers:
            write_json(aside / INDEX, read_json(folder / INDEX), sort_keys=True)
        write_json(aside / CONFIG, config)
    return report


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the decoded tensors of a compressed folder one at a time, file by file in the model's order."""
    import torch
    from safetensors import safe_open

    from .tensors import to_tensor

    headers = _checked(folder, read_config(folder).get("quantization_config"), read_weights(folder))
    for name, header in headers.items():
        with safe_open(folder / name, framework="pt") as file:
            for tensor, entry in sorted(header.entries.items(), key=lambda item: natural_key(item[0])):
                if is_blob(entry):
                    block = torch.from_numpy(np.array(_mapped(folder / name, entry)))
                    yield tensor, to_tensor(block, memory_limit(), f"{tensor!r} in {name}")
                else:
                    yield tensor, file.get_tensor(tensor)


def _checked(folder: Path, settings: object, headers: Mapping[str, Header]) -> dict[str, Header]:
    """Check all files of weights against ``quantization_config``, and return their headers."""
    shards = check_settings(settings)
    if headers.keys() != shards.keys():
        name = min(headers.keys() ^ shards.keys())
        raise FormatError(f"{CONFIG} and the folder differ in their files of weights: only one of them has {name}.")
    return {name: check_file(folder / name, shards[name], checksums_wanted()) for name in headers}


def _plain_tensors(file: Path, header: Header, report: StorageReport) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and shape of each tensor of a file, in the order in which they are written."""
    plain: dict[str, tuple[str, tuple[int, ...]]] = {}
    with open(file, "rb") as handle:
        for name, entry in header.entries.items():
            if is_blob(entry):
                handle.seek(entry.begin)
                head = parse(handle.read(min(HEAD_LIMIT, entry.size)), entry.size, f"{name!r} in {file.name}")
                plain[name] = (head.dtype, head.shape)
                report.add(head.encoding, head.dense, entry.size)
            else:
                plain[name] = (entry.dtype, entry.shape)
                report.add(0, entry.size, entry.size)
    return {name: plain[name] for name in layout(plain)}


def _write_plain(file: Path, header: Header, plain: Mapping[str, tuple[str, tuple[int, ...]]], out: Path) -> None:
    metadata = {key: value for key, value in header.metadata.items() if key != MANIFEST}
    with open(out, "wb") as handle:
        write_header(handle, header_bytes(dict(plain), metadata))
        for name in plain:
            entry = header.entries[name]
            data = _mapped(file, entry)
            if is_blob(entry):
                data, _ = decode(data, memory_limit(), f"{name!r} in {file.name}")
            handle.write(data.data)


def _mapped(file: Path, entry: Entry) -> Bytes:
    if not entry.size:
        return np.zeros(0, dtype=np.uint8)
    return np.memmap(file, dtype=np.uint8, mode="r", offset=entry.begin, shape=(entry.size,))
