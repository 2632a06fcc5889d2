"""Folders of models: reading their files, copying what is not weights, and writing a folder whole or not at all."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..sparsity.file_names import CHECKPOINT, STATE_FILE
from .container import FormatError, Header, read_header


CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*\.safetensors")
# Weights of the model itself that from_pretrained could load, in other formats of this and of other libraries.
_OTHER_WEIGHTS = re.compile(
    r"(pytorch_model.*\.(bin|index\.json)|model.*\.safetensors(\.index\.json)?|(tf|flax)_model.*|rust_model\.ot|model\.ckpt.*"
    r"|adapter_model\.bin)"
)
_PICKLED = re.compile(r"pytorch_model.*\.bin")
_JSON_LIMIT = 1 << 28


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file; raise FormatError if it is too large or does not hold an object."""
    size = file.stat().st_size
    if size > _JSON_LIMIT:
        raise FormatError(f"{file.name} has {size} bytes; more than {_JSON_LIMIT} are not read.")
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file.name} cannot be read as JSON ({error}).") from None
    if not isinstance(value, dict):
        raise FormatError(f"{file.name} does not hold a JSON object.")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a model's folder; raise FormatError if there is none or it is a link that leads out."""
    if not os.path.lexists(folder / CONFIG):
        raise FormatError(f"{str(folder)!r} {_what_instead(folder)}")
    return read_json(inside(folder / CONFIG, folder))


def _what_instead(folder: Path) -> str:
    """Say what a folder without a config is, and which folder to name."""
    if os.path.lexists(folder / ADAPTER_CONFIG):
        return (
            f"has {ADAPTER_CONFIG} but no {CONFIG}: it is an adapter, and a whole model is needed. Merge it into its "
            "base model by hf_pdecay.merge_keep_zeros, see docs/adapters.md, and save that."
        )
    # A Trainer writes the second file last.
    needed = CONFIG, STATE_FILE
    checkpoints = [
        path
        for path in folder.glob("checkpoint-*")
        if CHECKPOINT.fullmatch(path.name) and all((path / name).is_file() for name in needed)
    ]
    if checkpoints:
        newest = max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))
        return f"has no {CONFIG}, only checkpoints of a run; the newest whole one is {str(newest)!r}."
    return f"has no {CONFIG}; name the folder of a model."


def write_json(file: Path, value: dict[str, Any], sort_keys: bool = False) -> None:
    """Write a JSON file as transformers does."""
    file.write_bytes((json.dumps(value, indent=2, sort_keys=sort_keys) + "\n").encode())


def check_shard_name(name: object, where: str) -> str:
    """Return the name of a file of weights; raise FormatError if it could lead out of the folder."""
    if not isinstance(name, str) or not _SHARD.fullmatch(name):
        raise FormatError(f"{where} names the file {name!r}; it must be a plain name that ends in .safetensors.")
    return name


def inside(file: Path, folder: Path) -> Path:
    """Return a file of a folder; raise FormatError if it is not a regular file, or is a link that leads out.

    The Hub's cache keeps a model as links to files beside it; these are followed.
    """
    try:
        real = file.resolve(strict=True)
    except (OSError, RuntimeError):
        raise FormatError(f"{file.name} is missing from {str(folder)!r}.") from None
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise FormatError(f"{file.name} in {str(folder)!r} is a link that leads out of the folder; it is not followed.")
    if real.is_dir():
        raise FormatError(
            f"{file.name} in {str(folder)!r} is a folder or a link to one; it must be a file. Remove it, or replace "
            "the link by the folder."
        )
    if not real.is_file():
        raise FormatError(f"{file.name} in {str(folder)!r} is not a regular file.")
    return file


def read_weights(folder: Path) -> dict[str, Header]:
    """Return the headers of a model's files of weights, by sorted names.

    Raises FormatError if the folder has no weights in safetensors, or files and index differ.
    """
    if (folder / WEIGHTS).exists():
        return {WEIGHTS: read_header(inside(folder / WEIGHTS, folder))}
    if not (folder / INDEX).exists():
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        pickled = min(filter(_PICKLED.fullmatch, names), default=None)
        if pickled is not None:
            raise FormatError(
                f"{str(folder)!r} has its weights in {pickled}, a pickle, which could run code; it is not opened. "
                "Convert it to safetensors first: load the model, and save_pretrained it."
            )
        raise FormatError(f"{str(folder)!r} has neither {WEIGHTS} nor {INDEX}; name the folder of a model.")
    placed = read_weight_map(folder)
    headers = {name: read_header(inside(folder / name, folder)) for name in shard_names(placed)}
    stored = [(tensor, name) for name, header in headers.items() for tensor in header.entries]
    differing = sorted(set(stored) ^ set(placed.items()))
    if differing or len(stored) != len(placed):
        tensor, name = (differing or stored)[0]
        raise FormatError(f"{INDEX} and the files differ in where {tensor!r} is: only one of them has it in {name}.")
    return headers


def read_weight_map(folder: Path) -> dict[str, object]:
    """Return the file of each tensor by the index of a sharded model; raise FormatError if it is invalid."""
    placed = read_json(inside(folder / INDEX, folder)).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise FormatError(f"{INDEX} has no weight_map.")
    return placed


def shard_names(placed: dict[str, object]) -> list[str]:
    """Return the sorted file names of a weight map, see :func:`check_shard_name`."""
    return sorted({check_shard_name(name, INDEX) for name in placed.values()})


def copy_along(folder: Path, out: Path, weights: Iterable[str]) -> list[str]:
    """Copy all files but the model's weights, subfolders too; return the names of weights in other formats.

    Hidden files, the config, checkpoints of a run, and weights of the model in other formats are not copied. Raises
    FormatError if something is not a regular file, or is a link that leads out of the folder.
    """
    left_out, skipped = [], {CONFIG, INDEX, *weights}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in skipped or (CHECKPOINT.fullmatch(path.name) and path.is_dir()):
            continue
        if _OTHER_WEIGHTS.fullmatch(path.name):
            left_out.append(path.name)
            continue
        for file in sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else [path]:
            name = file.relative_to(folder)
            if any(part.startswith(".") for part in name.parts) or (file.is_dir() and not file.is_symlink()):
                continue
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(file, folder), out / name)
    return left_out


@contextmanager
def written_folder(out: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """Give a folder to write into, and rename it to ``out`` if the writing succeeds: it appears whole or not at all.

    Raises ValueError if ``out`` cannot be written, or exists and is not a model's folder that ``overwrite`` replaces.
    """
    _remove_leftovers(Path(os.path.abspath(out)))
    path = check_out(out, overwrite)
    aside, old = _made_beside(path, "new"), _beside(path, "old")
    try:
        yield aside
        for written in [*aside.rglob("*"), aside]:
            _settle(written)
        if path.exists():
            path.rename(old)
        try:
            aside.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        _settle(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def scratch_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder beside ``out``."""
    path = Path(os.path.abspath(out))
    _remove_leftovers(path)
    scratch = _made_beside(path, "plain")
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_out(out: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the absolute path of a folder to write; raise ValueError if it exists and may not be replaced."""
    path = Path(os.path.abspath(out))
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"Invalid out: {str(out)!r} is there and is not a folder; name a new one.")
    filled = path.exists() and any(path.iterdir())
    if filled and not overwrite:
        raise ValueError(
            f"Invalid out: {str(out)!r} is there and not empty; name a new folder, or give overwrite (--overwrite)."
        )
    if filled and not any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        raise ValueError(
            f"Invalid out: {str(out)!r} has no {CONFIG}, so it is not a model's folder and is not replaced."
        )
    return path


def check_apart(folder: Path, out: str | os.PathLike[str]) -> None:
    """Raise ValueError if one of two folders is the other or lies in it."""
    source, path = folder.resolve(), Path(out).resolve()
    if source.is_relative_to(path) or path.is_relative_to(source):
        raise ValueError(f"Invalid out: {str(out)!r} and {str(folder)!r} are one folder or lie in each other.")


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}.tmp")


def _made_beside(path: Path, kind: str) -> Path:
    """Make a folder beside the one to write; raise ValueError if nothing can be written there."""
    aside = _beside(path, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
    except OSError as error:
        raise ValueError(
            f"Invalid out: {str(path)!r} cannot be written ({error}); name a folder where you may write."
        ) from error
    return aside


def _remove_leftovers(path: Path) -> None:
    """Delete the temporary folders of killed processes, and put back a folder that one had moved away."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        match = re.fullmatch(r"\.(\d+)\.(new|old|plain)\.tmp", leftover.name[len(path.name) + 1 :])
        if match is None or _is_alive(int(match[1])):
            continue
        if match[2] == "old" and not path.exists():
            leftover.rename(path)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(process: int) -> bool:
    import psutil  # which comes with accelerate

    return psutil.pid_exists(process)


def _settle(path: Path) -> None:
    """Wait until the bytes of a file, or on POSIX the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
