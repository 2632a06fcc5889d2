"""Reading compressed folders: checking them before memory is taken, and giving plain folders back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from ..names import natural_key
from .card import remove_note
from .container import Entry, FormatError, Header, header_bytes, layout, read_header, settle, write_header
from .folder import (
    CONFIG,
    INDEX,
    WEIGHTS,
    check_apart,
    copy_along,
    read_config,
    read_json,
    read_weights,
    write_json,
    written_folder,
)
from .format import HEAD_LIMIT, Bytes, blob_shape, check, decode, parse
from .hub import local_folder
from .manifest import MANIFEST, check_settings, read_manifest, sha256
from .report import StorageReport


# Set to 0 it switches the comparison of checksums off; what a block says of itself is checked all the same.
CHECKSUMS_VARIABLE = "HF_PDECAY_VERIFY_CHECKSUMS"


def checksums_wanted() -> bool:
    """Whether checksums are to be compared when a model is loaded or decompressed.

    Raises:
        ValueError: If the variable is set to something else than 0 or 1.
    """
    value = os.environ.get(CHECKSUMS_VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"Invalid {CHECKSUMS_VARIABLE}: it is {value!r}; it must be 0 or 1.")
    return value == "1"


def check_file(file: Path, header_checksum: str, checksums: bool) -> Header:
    """Check a compressed file of weights: header, manifest, each tensor's block and, if wanted, checksums.

    Takes a few chunks of memory, whatever the file says of its tensors.

    Raises:
        FormatError: If it is damaged or forged.
    """
    header = read_header(file)
    manifest = read_manifest(header, file.name)
    if checksums and sha256(header.raw) != header_checksum:
        raise FormatError(
            f"{file.name} is not the file that {CONFIG} tells of: the checksum of its header differs. Fetch the model "
            "again."
        )
    for name, entry in header.entries.items():
        part = _mapped(file, entry)
        what = f"{name!r} in {file.name}"
        if checksums and sha256(part) != manifest[name]:
            raise FormatError(f"{what} is damaged: its checksum differs from the manifest's. Fetch the model again.")
        if is_blob(entry):
            head = check(part, what)
            if entry.shape != blob_shape(part, head.shape):
                raise FormatError(f"{what} is damaged or forged: its block is stored in a wrong shape.")
    return header


def is_blob(entry: Entry) -> bool:
    """Whether an entry of a compressed file is a block; a tensor of bytes is always stored as one."""
    return entry.dtype == "U8"


def memory_limit() -> int:
    """Bytes that are free on this machine, beyond which no tensor is made."""
    import psutil  # which comes with accelerate

    return int(psutil.virtual_memory().available)


def decompress(model: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False) -> StorageReport:
    """Give the plain folder of a compressed model back: it loads anywhere.

    Args:
        model: A folder that :func:`compress` or :func:`save_compressed` wrote, or its name on the Hub.
        out: The folder to write. It appears when it is whole.
        overwrite: Replace ``out`` if it is a model's folder.

    Returns:
        Bytes before and after compression, by encoding.

    Raises:
        ValueError: If the model is not a compressed one or is damaged (as a ``FormatError``), or does not fit.
    """
    folder = local_folder(model)
    config = read_config(folder)
    settings = config.pop("quantization_config", None)
    shards = check_settings(settings)
    if isinstance(settings, dict) and settings.get("dtype_added"):
        config.pop("dtype", None)
    found = read_weights(folder)
    if found.keys() != shards.keys():
        name = sorted(found.keys() ^ shards.keys())[0]
        raise FormatError(f"{CONFIG} and the folder differ in which files of weights there are: {name}.")
    check_apart(folder, out)
    headers = {name: check_file(folder / name, shards[name], checksums_wanted()) for name in found}
    report = StorageReport(headers=sum(len(header.raw) + 8 for header in headers.values()))
    plans = {name: _plain_tensors(folder / name, header, report) for name, header in headers.items()}
    with written_folder(out, overwrite) as aside:
        _check_fits(report, aside)
        report.left_out = copy_along(folder, aside, headers)
        remove_note(aside)
        for name, header in headers.items():
            _write_plain(folder / name, header, plans[name], aside / name)
        if WEIGHTS not in found:
            write_json(aside / INDEX, read_json(folder / INDEX), sort_keys=True)
        write_json(aside / CONFIG, config)
    return report


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a compressed folder, as they were before, one at a time, file by file in the model's order.

    Raises:
        FormatError: If a file is damaged or forged.
    """
    import torch
    from safetensors import safe_open

    from .tensors import to_tensor

    shards = check_settings(read_config(folder).get("quantization_config"))
    for name in read_weights(folder):
        header = check_file(folder / name, shards[name], checksums_wanted()) if name in shards else None
        if header is None:
            raise FormatError(f"{CONFIG} and the folder differ in which files of weights there are: {name}.")
        with safe_open(folder / name, framework="pt") as file:
            for tensor, entry in sorted(header.entries.items(), key=lambda item: natural_key(item[0])):
                if is_blob(entry):
                    block = torch.from_numpy(np.array(_mapped(folder / name, entry)))
                    yield tensor, to_tensor(block, memory_limit(), f"{tensor!r} in {name}")
                else:
                    yield tensor, file.get_tensor(tensor)


def _plain_tensors(file: Path, header: Header, report: StorageReport) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and shape of each tensor of a file, in the order in which they are to be written."""
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


def _check_fits(report: StorageReport, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if report.before > free:
        raise ValueError(f"The plain model has {report.before} bytes, and {free} are free where it is to be written.")


def _write_plain(file: Path, header: Header, plain: Mapping[str, tuple[str, tuple[int, ...]]], target: Path) -> None:
    metadata = {key: value for key, value in header.metadata.items() if key != MANIFEST}
    with open(target, "wb") as handle:
        write_header(handle, header_bytes(dict(plain), metadata))
        for name in plain:
            entry = header.entries[name]
            part = _mapped(file, entry)
            if is_blob(entry):
                part, _ = decode(part, memory_limit(), f"{name!r} in {file.name}")
            handle.write(part.data)
        settle(handle)


def _mapped(file: Path, entry: Entry) -> Bytes:
    """The bytes of an entry, which are read when they are looked at."""
    if not entry.size:
        return np.zeros(0, dtype=np.uint8)
    return np.memmap(file, dtype=np.uint8, mode="r", offset=entry.begin, shape=(entry.size,))
