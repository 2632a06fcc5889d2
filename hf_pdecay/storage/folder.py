"""Folders of models: which files hold the weights, what comes along, and writing a folder whole or not at all."""

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

from .container import FormatError, Header, read_header, settle


CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*\.safetensors")
# Weights of the model itself that from_pretrained could take, in this and in other libraries' formats.
_OTHER_WEIGHTS = re.compile(
    r"(pytorch_model.*\.(bin|index\.json)|model.*\.safetensors(\.index\.json)?|(tf|flax)_model.*|rust_model\.ot|model\.ckpt.*"
    r"|adapter_model\.bin)"
)
_PICKLED = re.compile(r"pytorch_model.*\.bin")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_JSON_LIMIT = 1 << 28


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        FormatError: If it is too large or none.
    """
    try:
        if file.stat().st_size > _JSON_LIMIT:
            raise FormatError(f"{file.name} has {file.stat().st_size} bytes, which no such file has.")
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{file.name} cannot be read as JSON ({error}).") from None
    if not isinstance(found, dict):
        raise FormatError(f"{file.name} holds no object.")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a model's folder.

    Raises:
        FormatError: If there is none, or it is a link that leads out of the folder.
    """
    if not os.path.lexists(folder / CONFIG):
        raise FormatError(f"{str(folder)!r} {_what_instead(folder)}")
    return read_json(inside(folder / CONFIG, folder))


def _what_instead(folder: Path) -> str:
    """Say what a folder without a config is, and which one to name."""
    if os.path.lexists(folder / ADAPTER_CONFIG):
        return (
            f"has {ADAPTER_CONFIG} and no {CONFIG}: it is an adapter, and this takes whole models. Merge it into its "
            "base model first, by hf_pdecay.merge_keep_zeros as docs/adapters.md has it, and save that."
        )
    # A Trainer writes the second file last.
    needed = CONFIG, "trainer_state.json"
    named = [each for each in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(each.name)]
    checkpoints = [each for each in named if all((each / name).is_file() for name in needed)]
    if checkpoints:
        newest = max(checkpoints, key=lambda each: int(each.name.rpartition("-")[2]))
        return f"has no {CONFIG}, only checkpoints of a run; the newest whole one is {str(newest)!r}."
    return f"has no {CONFIG}; name the folder of a model."


def write_json(file: Path, value: dict[str, Any], sort_keys: bool = False) -> None:
    """Write a JSON file as transformers does, and see to it that it is on disk."""
    with open(file, "wb") as handle:
        handle.write((json.dumps(value, indent=2, sort_keys=sort_keys) + "\n").encode())
        settle(handle)


def check_shard_name(name: object, where: str) -> str:
    """Return the name of a file of weights if it is a plain one, which cannot lead out of its folder.

    Raises:
        FormatError: If it is not.
    """
    if not isinstance(name, str) or not _SHARD.fullmatch(name):
        raise FormatError(f"{where} names the file {name!r}; it must be a plain name that ends in .safetensors.")
    return name


def inside(file: Path, folder: Path) -> Path:
    """Return a file of a folder after it has been seen that it is a regular one and no link leads out of the folder.

    The Hub's cache keeps a model as links to files beside it, which are followed.

    Raises:
        FormatError: If it is missing, something else than a file, or a link that leads out.
    """
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError):
        raise FormatError(f"{file.name} is missing from {str(folder)!r}.") from None
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise FormatError(f"{file.name} in {str(folder)!r} is a link that leads out of the folder; it is not followed.")
    if target.is_dir():
        raise FormatError(
            f"{file.name} in {str(folder)!r} is a folder or a link to one where a file is due; take it away, or put "
            "the folder in the place of the link."
        )
    if not target.is_file():
        raise FormatError(f"{file.name} in {str(folder)!r} is not a regular file.")
    return file


def read_weights(folder: Path) -> dict[str, Header]:
    """Return the headers of a model's files of weights, by name, in the order of their names.

    Raises:
        FormatError: If there are none that are safetensors, or files and index do not go together.
    """
    if (folder / WEIGHTS).exists():
        return {WEIGHTS: read_header(inside(folder / WEIGHTS, folder))}
    if not (folder / INDEX).exists():
        pickled = (
            sorted(each.name for each in folder.iterdir() if _PICKLED.fullmatch(each.name)) if folder.is_dir() else []
        )
        if pickled:
            raise FormatError(
                f"{str(folder)!r} has its weights in {pickled[0]}, a pickle, which could run code; it is not opened. "
                "Convert it to safetensors first: load the model, and save_pretrained it."
            )
        raise FormatError(f"{str(folder)!r} has neither {WEIGHTS} nor {INDEX}; name the folder of a model.")
    placed = read_json(inside(folder / INDEX, folder)).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise FormatError(f"{INDEX} has no weight_map.")
    names = sorted({check_shard_name(name, INDEX) for name in placed.values()})
    headers = {name: read_header(inside(folder / name, folder)) for name in names}
    check_index(placed, headers)
    return headers


def check_index(placed: dict[str, str], headers: dict[str, Header]) -> None:
    """Raise FormatError if an index does not name each tensor of the files once, at its place."""
    found = [(tensor, name) for name, header in headers.items() for tensor in header.entries]
    differing = sorted(set(found) ^ set(placed.items()))
    if differing or len(found) != len(placed):
        tensor, name = (differing or found)[0]
        raise FormatError(f"{INDEX} and the files differ in where {tensor!r} is: {name} is named or has it alone.")


def copy_along(folder: Path, out: Path, weights: Iterable[str]) -> list[str]:
    """Copy what is not weights of the model: config, tokenizer, card and so on, subfolders too.

    Left out are hidden files, checkpoints of a run, and weights of the model in other formats.

    Args:
        folder: Of the model.
        out: Where to.
        weights: Names of the files that hold its weights.

    Returns:
        The names of the weights in other formats that were left out.

    Raises:
        FormatError: If something is no regular file, or is a link that leads out of the folder.
    """
    left_out, skipped = [], {CONFIG, INDEX, *weights}
    for each in sorted(folder.iterdir()):
        if each.name.startswith(".") or each.name in skipped or (_CHECKPOINT.fullmatch(each.name) and each.is_dir()):
            continue
        if _OTHER_WEIGHTS.fullmatch(each.name):
            left_out.append(each.name)
        elif each.is_dir() and not each.is_symlink():
            for below in sorted(each.rglob("*")):
                if any(part.startswith(".") for part in below.relative_to(each).parts):
                    continue
                if below.is_symlink() or not below.is_dir():
                    _copy(inside(below, folder), out / below.relative_to(folder))
        else:
            _copy(inside(each, folder), out / each.name)
    return left_out


@contextmanager
def written_folder(out: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """Give a folder to write into, and rename it to ``out`` if the writing succeeds: it appears whole or not at all.

    Args:
        out: The folder. Its parents are made.
        overwrite: Replace a model's folder that is there.

    Raises:
        ValueError: If ``out`` is there and may not be replaced.
    """
    _remove_leftovers(Path(os.path.abspath(out)))
    target = check_target(out, overwrite)
    aside, old = _made_beside(target, "new"), _beside(target, "old")
    try:
        yield aside
        _settle_folders(aside)
        if target.exists():
            target.rename(old)
        try:
            aside.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        _settle_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def settle_files(folder: Path) -> None:
    """Wait until the bytes of a folder's files are on the disk."""
    for each in folder.rglob("*"):
        if each.is_file():
            with open(each, "rb") as handle:
                os.fsync(handle.fileno())


@contextmanager
def scratch_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a folder beside another one for the meantime."""
    target = Path(os.path.abspath(out))
    _remove_leftovers(target)
    scratch = _made_beside(target, "plain")
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_target(out: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the absolute path of a folder that may be written.

    Raises:
        ValueError: If it is there and may not be replaced.
    """
    target = Path(os.path.abspath(out))
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"Invalid out: {str(out)!r} is there and is no folder; name a new one.")
    filled = target.exists() and any(target.iterdir())
    if filled and not overwrite:
        raise ValueError(
            f"Invalid out: {str(out)!r} is there and not empty; name a new folder, or give overwrite (--overwrite)."
        )
    if filled and not any((target / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        raise ValueError(f"Invalid out: {str(out)!r} has no {CONFIG}, so it is no model's folder and is not replaced.")
    return target


def check_apart(folder: Path, out: str | os.PathLike[str]) -> None:
    """Raise ValueError if what is to be written lies in what is read, or the other way round."""
    source, target = folder.resolve(), Path(out).resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise ValueError(f"Invalid out: {str(out)!r} and {str(folder)!r} are one folder or lie in each other.")


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{kind}.tmp")


def _made_beside(target: Path, kind: str) -> Path:
    """Make a folder beside one that is to be written.

    Raises:
        ValueError: If nothing can be written there.
    """
    aside = _beside(target, kind)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
    except OSError as error:
        raise ValueError(
            f"Invalid out: {str(target)!r} cannot be written ({error}); name a folder where you may write."
        ) from error
    return aside


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as reading, open(target, "wb") as handle:
        shutil.copyfileobj(reading, handle, 1 << 20)
        settle(handle)


def _remove_leftovers(target: Path) -> None:
    """Delete what processes that were killed had written aside, and put back a folder that one had moved away."""
    for each in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        match = re.fullmatch(r"\.(\d+)\.(new|old|plain)\.tmp", each.name[len(target.name) + 1 :])
        if match is None or _is_alive(int(match[1])):
            continue
        if match[2] == "old" and not target.exists():
            each.rename(target)
        else:
            shutil.rmtree(each, ignore_errors=True)


def _is_alive(process: int) -> bool:
    import psutil  # which comes with accelerate

    return psutil.pid_exists(process)


def _settle_folders(folder: Path) -> None:
    for each in [*folder.rglob("*"), folder]:
        if each.is_dir():
            _settle_folder(each)


def _settle_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system lets one."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
