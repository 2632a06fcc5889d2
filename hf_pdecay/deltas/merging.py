"""Merging the deltas of several fine-tuned models of one base."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..checks import check_choice
from ..storage.card import remove_note
from ..storage.compressed_file import CompressedFile
from ..storage.container import DTYPES, FormatError, header_bytes, layout, write_header
from ..storage.folder import CONFIG, WEIGHTS, check_apart
from ..storage.hub import local_folder
from ..storage.model_tensors import ModelTensors
from ..storage.source import read_source
from ..tables import NameTable
from ..terminal import progress
from .report import read_delta


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_WAYS = ("refuse", "average")


@dataclass(frozen=True)
class MergeReport:
    """How many weights several deltas change; prints as a table.

    Args:
        weights: Number of weights of the merged model.
        changed: Number of weights that each delta changes, in the order in which they were given, by its folder.
        shared: Number of weights that more than one delta changes.
        differing: Number of these to which not all give the same value.
    """

    weights: int
    changed: dict[str, int] = field(default_factory=dict)
    shared: int = 0
    differing: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table and a sentence."""
        table = NameTable("Merged deltas", ("delta", "weights changed", "share"))
        for name, changed in self.changed.items():
            table.add_row(name, f"{changed:,}", f"{changed / max(self.weights, 1):.2%}")
        yield table
        yield (
            f"{self.shared:,} of {self.weights:,} weights are changed by more than one delta, {self.differing:,} to "
            "different values."
        )


def merge_deltas(
    base: str | os.PathLike[str],
    deltas: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    shared: str = "refuse",
    overwrite: bool = False,
) -> MergeReport:
    """Write the plain folder of a base with the changes of several deltas.

    A weight that one delta changes has its value; one that several change to the same value has that. Everything but
    the weights is copied from the first delta's folder.

    Args:
        base: The base of all deltas: a folder or a name on the Hub.
        deltas: Folders of deltas, at least two.
        out: The folder to write. It appears when it is whole.
        shared: What happens if deltas give a weight different values: ``"refuse"`` raises an error before anything is
            written, ``"average"`` takes their mean, in float64, rounded to the weight's dtype.
        overwrite: Replace ``out`` if it is a model's folder.

    Returns:
        How many weights each delta changes, and how many they share.

    Raises:
        ValueError: If an argument is invalid, deltas are of another base (as a ``FormatError``), give a weight
            different values and ``shared`` is ``"refuse"``, or have tensors of one name in different shapes.
    """
    check_choice("shared", shared, _WAYS)
    if len(deltas) < 2:
        raise ValueError(f"Invalid deltas: there are {len(deltas)}; at least 2 can be merged.")
    source = read_source(deltas[0], out, overwrite)
    folder = local_folder(base)
    check_apart(folder, out)
    files = {}
    for delta in deltas:
        path, file, _ = read_delta(delta, folder)
        if str(path) in files:
            raise ValueError(f"Invalid deltas: {str(path)!r} is there twice.")
        check_apart(path, out)
        files[str(path)] = file
    merging = _Merging(ModelTensors(folder), files)
    report, first = merging.count()
    if report.differing and shared == "refuse":
        raise ValueError(
            f"Invalid shared: shared='refuse', and {report.differing:,} of the {report.shared:,} weights that more "
            f"than one delta changes get different values, the first in {first}; 'average' takes their mean."
        )
    with source.rewritten() as aside:
        source.copy_along(aside)
        remove_note(aside)
        shutil.copyfile(source.folder / CONFIG, aside / CONFIG)
        merging.write(aside / WEIGHTS)
    return report


class _Combined(NamedTuple):
    """A tensor with the changes of several deltas."""

    bits: Any
    changed: dict[str, int]  # of each delta that has the tensor
    shared: int
    differing: int


class _Merging:
    """The tensors of a base with those of deltas.

    Args:
        base: The base's tensors.
        files: The files of the deltas, by their folders.
    """

    def __init__(self, base: ModelTensors, files: dict[str, CompressedFile]) -> None:
        self._base, self._files = base, files
        self._forms = dict(base.forms)
        self._own: dict[str, str] = {}  # names in the base
        own: dict[str, tuple[str, str, tuple[int, ...]]] = {}
        for folder, file in files.items():
            for name in file.keys():  # noqa: SIM118
                dtype, shape = form = file.form(name)
                if (theirs := base.like(name, form)) is not None:
                    self._own[name] = theirs
                    self._forms.pop(theirs, None)
                self._forms[name] = form
                other, *seen = own.setdefault(name, (folder, dtype, shape))
                if seen != [dtype, shape]:
                    raise FormatError(
                        f"{name} is {dtype} {list(shape)} in {folder!r} and {seen[0]} {list(seen[1])} in {other!r}: "
                        "these deltas cannot be merged."
                    )

    def count(self) -> tuple[MergeReport, str]:
        """Count what the deltas change; returns the first tensor to which they give different values too."""
        changed = dict.fromkeys(self._files, 0)
        shared = differing = 0
        first = ""
        for name in progress(self._forms, "Comparing the deltas", len(self._forms)):
            combined = self._combined(name)
            for folder, count in combined.changed.items():
                changed[folder] += count
            shared += combined.shared
            differing += combined.differing
            first = first or (name if combined.differing else "")
        weights = sum(math.prod(shape) for _, shape in self._forms.values())
        return MergeReport(weights, changed, shared, differing), first

    def write(self, file: Path) -> None:
        """Write the merged tensors."""
        forms = {name: self._forms[name] for name in layout(self._forms)}
        metadata = {"format": "pt"} | next(iter(self._files.values())).metadata()
        with open(file, "wb") as handle:
            write_header(handle, header_bytes(forms, metadata))
            for name in progress(forms, "Merging", len(forms)):
                handle.write(self._combined(name).bits.data)

    def _combined(self, name: str) -> _Combined:
        """Combine a tensor's changes: their value, or the mean of their values where they differ."""
        dtype, _ = form = self._forms[name]
        size, torch_name = DTYPES[dtype]
        kind = f"<u{size}"
        news = {folder: file.plain(name).view(kind) for folder, file in self._files.items() if name in file.keys()}  # noqa: SIM118
        own = self._own.get(name, name)
        old = self._base.read(own).view(kind) if self._base.forms.get(own) == form else None
        marks = {folder: np.ones(new.size, bool) if old is None else new != old for folder, new in news.items()}
        result = next(iter(news.values())).copy() if old is None else old
        for folder, new in news.items():
            np.copyto(result, new, where=marks[folder])
        times = np.zeros(result.size, np.int64)
        unequal = np.zeros(result.size, bool)
        for folder, new in news.items():
            times += marks[folder]
            unequal |= marks[folder] & (new != result)
        places = np.flatnonzero(unequal)
        if places.size:
            values = torch.zeros(len(news), places.size, dtype=torch.float64)
            for row, (folder, new) in zip(values, news.items(), strict=True):
                here = torch.from_numpy(new[places].view(np.uint8)).view(getattr(torch, torch_name))
                row.copy_(here.double().where(torch.from_numpy(marks[folder][places]), 0))
            mean = (values.sum(0) / torch.from_numpy(times[places])).to(getattr(torch, torch_name))
            result[places] = mean.view(torch.uint8).numpy().view(kind)
        changed = {folder: int(mark.sum()) for folder, mark in marks.items()}
        return _Combined(result, changed, int((times > 1).sum()), places.size)
