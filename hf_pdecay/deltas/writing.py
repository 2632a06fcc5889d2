"""Writing the delta of a fine-tuned model, tensor by tensor."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryFile

from ..storage.card import add_note
from ..storage.container import BLOCK, FormatError
from ..storage.encoding import HEAD_LIMIT, parse
from ..storage.folder import CONFIG, WEIGHTS, check_apart, check_out, copy_along, written_folder
from ..storage.manifest import Base, sha256
from ..storage.model_tensors import ModelTensors
from ..storage.report import StorageReport
from ..storage.source import read_model, read_source
from ..storage.writer import Shards, encoded
from ..storage.zstd_planes import is_installed
from ..terminal import progress
from .report import DeltaReport, report_delta


# What a run leaves in its folder and loading a model does not need.
_OF_RUN = ("training_args.bin", "trainer_state.json", "runs")


def write_delta(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base_name: str | None = None,
    zstd: bool | None = None,
    overwrite: bool = False,
) -> DeltaReport:
    """Write the weights of a fine-tuned model that differ from its base, and copy its other files.

    After ``import hf_pdecay``, ``from_pretrained(out)`` loads a model that is bit-identical to the fine-tuned one, as
    long as the base is where the delta says. Weights are compared bit by bit. A tensor that the base has not, or not in
    this dtype and shape, such as a new head, is stored whole.

    Args:
        base: The model from which fine-tuning started: a folder in safetensors, plain, compressed or a delta, or a name
            on the Hub.
        tuned: The fine-tuned model: the same.
        out: The folder to write. It appears when it is whole.
        base_name: What the delta calls its base: a name on the Hub, or a folder, from ``out`` or absolute. By default
            the Hub's name and revision of a base from there, else the way from ``out`` to its folder.
        zstd: Whether to compress by zstd too, which needs zstandard here and where the delta is used; None does so if
            it is installed.
        overwrite: Replace ``out`` if it is a model's folder.

    Returns:
        What differs, by tensor.

    Raises:
        ValueError: If a model is not in safetensors (as a ``FormatError``), the two have no tensor of the same name,
            dtype and shape, or an argument is invalid.
    """
    check_out(out, overwrite)
    before = read_model(base)
    source = read_source(tuned, out, overwrite)
    check_apart(before.folder, out)
    old, new = ModelTensors(before.folder), ModelTensors(source.folder)
    _check_shared(old, new)
    name, revision = _said_of(before.folder, Path(out)) if base_name is None else (base_name, None)
    with source.rewritten() as aside:
        source.copy_along(aside)
        return _write_folder(old, new, aside, Base(name, revision, {}), is_installed() if zstd is None else zstd)


def write_delta_within(base: Path, tuned: Path, name: str) -> DeltaReport:
    """Write the delta of a model that a run has saved, like :func:`write_delta`, into a subfolder of its folder.

    Args:
        base: The folder of the base.
        tuned: The folder of the model.
        name: That of the subfolder; one that is there is replaced.

    Raises:
        ValueError: If a model is not in safetensors, or the two share no tensor (as a ``FormatError``), or another
            folder than a model's is there.
    """
    before, source = ModelTensors(base), read_model(tuned)
    after = ModelTensors(source.folder)
    _check_shared(before, after)
    said = Base(*_said_of(base, tuned / name), {})
    with written_folder(tuned / name, overwrite=True) as aside:
        copy_along(tuned, aside, (*source.headers, name, *_OF_RUN))
        return _write_folder(before, after, aside, said, is_installed())


def _write_folder(old: ModelTensors, new: ModelTensors, aside: Path, base: Base, zstd: bool) -> DeltaReport:
    """Complete the folder of a delta, to which the other files of the model have been copied."""
    add_note(aside, base.name)
    shutil.copyfile(new.folder / CONFIG, aside / CONFIG)
    _write(old, new, aside / WEIGHTS, base, zstd)
    return report_delta(aside)


def _check_shared(old: ModelTensors, new: ModelTensors) -> None:
    if not any(old.like(name, form) for name, form in new.forms.items()):
        raise FormatError(_nothing_shared(old, new))


def _write(old: ModelTensors, new: ModelTensors, file: Path, base: Base, zstd: bool) -> None:
    """Write the file of a delta; ``base`` gets the checksums of the tensors that it changes."""
    metadata = {"format": "pt"} | next(iter(new.headers.values())).metadata
    metadata.pop(BLOCK, None)
    with TemporaryFile(dir=file.parent) as waiting:
        shards = Shards(file.parent, waiting, metadata, StorageReport())
        for name, form in progress(new.forms.items(), "Comparing with the base", len(new.forms)):
            data = new.read(name)
            own = old.like(name, form)
            before = None if own is None else old.read(own)
            blob = encoded(name, *form, data, zstd=zstd, base=before)
            if blob is None:
                shards.add(name, *form, data)
                continue
            if before is not None and parse(blob[:HEAD_LIMIT], blob.nbytes, repr(name)).changes:
                base.sha256[name] = sha256(before.data)
            shards.add(name, BLOCK, (blob.nbytes,), blob)
        shards.close(file.name, base)


def _said_of(folder: Path, out: Path) -> tuple[str, str | None]:
    """Return what a delta says of a base: its name and revision on the Hub, or the way to its folder."""
    # A download lies in models--OWNER--NAME/snapshots/REVISION.
    cached = folder.resolve()
    if cached.parent.name == "snapshots" and cached.parent.parent.name.startswith("models--"):
        return cached.parent.parent.name.removeprefix("models--").replace("--", "/"), cached.name
    return Path(os.path.relpath(folder, out)).as_posix(), None


def _nothing_shared(old: ModelTensors, new: ModelTensors) -> str:
    """Say why two models have nothing that a delta could leave out."""
    what = f"{str(old.folder)!r} is not the base of {str(new.folder)!r}: no tensor has the same name, dtype and shape"
    for name, after in new.forms.items():
        if (own := old.own_name(name)) is not None:
            before = old.forms[own]
            return (
                f"{what}; {name} is {before[0]} {list(before[1])} in one and {after[0]} {list(after[1])} in the other."
            )
    return (
        f"{what}; {min(old.forms, default='nothing')} is in one and {min(new.forms, default='nothing')} in the other."
    )
