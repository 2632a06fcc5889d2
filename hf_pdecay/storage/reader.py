"""Writes the plain folder of a compressed one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..terminal import progress
from .card import remove_note
from .compressed_file import CompressedFile
from .container import FormatError, header_bytes, layout, write_header
from .folder import CONFIG, INDEX, WEIGHTS, read_json, write_json
from .hub import local_folder
from .manifest import is_compressed
from .report import StorageReport
from .source import read_source


def decompress(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> StorageReport:
    """Write the plain folder of a compressed model or of a delta, which loads anywhere.

    Args:
        model: A folder that :func:`compress`, :func:`save_compressed` or :func:`write_delta` wrote, or its name on the
            Hub.
        out: The folder to write. It appears when it is whole.
        base: The base of a delta: a folder, or a name on the Hub; None takes the one that the delta names.
        overwrite: Replace ``out`` if it is a model's folder.

    Returns:
        Bytes before and after compression, by encoding.

    Raises:
        ValueError: If the model is not compressed or is damaged (as a ``FormatError``), or does not fit on the disk.
    """
    source = read_source(model, out, overwrite)
    folder = source.folder
    if not any(map(is_compressed, source.headers.values())):
        raise FormatError(f"The weights of {str(folder)!r} are not compressed.")
    beneath = None if base is None else local_folder(base)
    files = {name: CompressedFile(folder / name, base_folder=beneath) for name in source.headers}
    if beneath is not None and not any(file.base for file in files.values()):
        raise FormatError(f"Invalid base: {str(folder)!r} is not a delta, and has no base.")
    report = StorageReport(headers=sum(len(file.header.raw) + 8 for file in files.values()))
    for file in files.values():
        for name, entry in file.header.entries.items():
            head = file.head(name)
            report.add("dense" if head is None else head.kind, entry.size if head is None else head.dense, entry.size)
    with source.rewritten() as aside:
        free = shutil.disk_usage(aside).free
        if report.before > free:
            for file in files.values():
                for name in file.keys():  # a damaged size is told as damage
                    file.compare(name)
            raise ValueError(f"The plain model has {report.before} bytes, and only {free} are free on the disk of out.")
        report.left_out = source.copy_along(aside)
        remove_note(aside)
        for name, file in files.items():
            _write_plain(folder / name, file, aside / name)
        if WEIGHTS not in files:
            write_json(aside / INDEX, read_json(folder / INDEX), sort_keys=True)
        shutil.copyfile(folder / CONFIG, aside / CONFIG)
    return report


def _write_plain(file: Path, compressed: CompressedFile, out: Path) -> None:
    forms = {name: compressed.form(name) for name in compressed.offset_keys()}
    plain = {name: forms[name] for name in layout(forms)}
    with open(out, "wb") as handle:
        write_header(handle, header_bytes(plain, compressed.metadata()))
        for name in progress(plain, f"Decompressing {file.name}", len(plain)):
            handle.write(compressed.plain(name).data)
            compressed.release(name)
