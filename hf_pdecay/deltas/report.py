"""What a delta changes, counted from its file alone."""

from __future__ import annotations

import heapq
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import written_aside
from ..names import natural_key
from ..storage.compressed_file import CompressedFile, is_compressed_file
from ..storage.container import FormatError
from ..storage.folder import WEIGHTS
from ..storage.manifest import Base, is_compressed
from ..storage.source import read_model
from ..tables import NameTable
from .units import UnitChange, changes_by_unit


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

_TABLE_ROWS = 40
_UNIT_ROWS = 8
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class TensorChange:
    """What a delta changes in one tensor.

    Args:
        name: Its name in the file.
        shape: Its shape.
        changed: Number of weights that are not those of the base; all of them if the tensor is stored whole.
        rows: Number of rows (along the first dimension) with a change; 0 for tensors of fewer than 2 dimensions.
        columns: Number of columns (along all other dimensions) with a change; the same.
        whole: Whether the tensor is stored whole: the base has none of this dtype and shape, or most of it changed.
        stored: Bytes in the file.
        dense: Bytes of the tensor.
    """

    name: str
    shape: tuple[int, ...]
    changed: int
    rows: int
    columns: int
    whole: bool
    stored: int
    dense: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def share(self) -> float:
        """Fraction of the weights that are changed, in [0, 1]."""
        return self.changed / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class DeltaReport:
    """What a delta changes; prints as a table.

    Args:
        base: The name of the base, as the delta has it.
        revision: Its revision on the Hub, if the delta names one.
        tensors: One entry for each tensor, in natural order of the names.
        size: Bytes of the file.
        units: One entry for each layer of neurons or heads; none if the architecture is not known.
    """

    base: str
    revision: str | None
    tensors: list[TensorChange] = field(default_factory=list)
    size: int = 0
    units: list[UnitChange] = field(default_factory=list)

    @property
    def weights(self) -> int:
        """Number of weights of the model."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def changed(self) -> int:
        """Number of weights that are not those of the base."""
        return sum(tensor.changed for tensor in self.tensors)

    @property
    def dense(self) -> int:
        """Bytes of the model's tensors."""
        return sum(tensor.dense for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types, totals included."""
        totals = {"weights": self.weights, "changed": self.changed, "bytes": self.size, "model_bytes": self.dense}
        tensors = [asdict(tensor) for tensor in self.tensors]
        units = [asdict(layer) for layer in self.units]
        return {"base": self.base, "revision": self.revision, **totals, "tensors": tensors, "units": units}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table of the tensors that change most, and sentences."""
        changed = sorted((each for each in self.tensors if each.changed), key=lambda each: -each.share)
        table = NameTable("Changes", ("tensor", "weights", "changed", "share", "rows", "columns"))
        for tensor in sorted(changed[:_TABLE_ROWS], key=lambda each: natural_key(each.name)):
            lines = [f"{tensor.rows:,}", f"{tensor.columns:,}"] if len(tensor.shape) > 1 else ["", ""]
            table.add_row(tensor.name, f"{tensor.weights:,}", f"{tensor.changed:,}", f"{tensor.share:.2%}", *lines)
        share = self.changed / max(self.weights, 1)
        label = f"all {len(self.tensors):,} tensors"
        table.add_total(label, f"{self.weights:,}", f"{self.changed:,}", f"{share:.2%}", "", "")
        yield table
        if len(changed) > _TABLE_ROWS:
            yield f"{len(changed) - _TABLE_ROWS:,} more tensors change less; --json has them all."
        yield from self._units()
        whole = [tensor for tensor in self.tensors if tensor.whole]
        if whole:
            yield f"{len(whole):,} tensors are stored whole, such as {whole[0].name}."
        revision = f" (revision {self.revision})" if self.revision else ""
        yield (
            f"{self.changed:,} of {self.weights:,} weights ({share:.2%}) are not those of {self.base}{revision}. The "
            f"file has {self.size / 1e6:,.2f} MB, {self.size / max(self.dense, 1):.2%} of the model's "
            f"{self.dense / 1e6:,.1f}."
        )

    def _units(self) -> Iterator[RenderableType]:
        """The neurons and heads that change most, and how many change at all."""
        for kind in dict.fromkeys(layer.kind for layer in self.units):
            layers = [layer for layer in self.units if layer.kind == kind]
            counts = [
                (number / layer.size, layer, index, number)
                for layer in layers
                for index, number in enumerate(layer.changed)
                if number
            ]
            total = sum(len(layer.changed) for layer in layers)
            if counts:
                most = heapq.nlargest(_UNIT_ROWS, counts, key=lambda row: row[0])
                table = NameTable(
                    f"{kind.capitalize()}s that change most", ("layer", kind, "weights", "changed", "share")
                )
                for share, layer, index, number in most:
                    table.add_row(layer.layer, f"{index:,}", f"{layer.size:,}", f"{number:,}", f"{share:.2%}")
                yield table
            yield f"{len(counts):,} of {total:,} {kind}s have a change."


def is_delta(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has a delta."""
    file = Path(folder) / WEIGHTS
    return file.is_file() and is_compressed_file(file) and CompressedFile(file).base is not None


def read_delta(delta: str | os.PathLike[str], folder: Path | None = None) -> tuple[Path, CompressedFile, Base]:
    """Return the folder of a delta, its file, and what it says of its base.

    Args:
        delta: The delta's folder, or its name on the Hub.
        folder: That of its base; None takes the one that it names.

    Raises:
        FormatError: If the folder holds another kind of model, or is damaged.
    """
    model = read_model(delta)
    header = model.headers.get(WEIGHTS)
    if header is not None and is_compressed(header):
        file = CompressedFile(model.folder / WEIGHTS, base_folder=folder)
        if file.base is not None:
            return model.folder, file, file.base
    raise FormatError(f"{str(delta)!r} is not a delta; name a folder that `hf-pdecay delta` has written.")


def report_delta(delta: str | os.PathLike[str]) -> DeltaReport:
    """Return what a delta changes, without looking at its base.

    Args:
        delta: A folder that :func:`~hf_pdecay.write_delta` has written, or its name on the Hub.

    Raises:
        ValueError: If it is not a delta, or is damaged (as a ``FormatError``).
    """
    folder, file, base = read_delta(delta)
    tensors = [_change(file, name) for name in sorted(file.header.entries, key=natural_key)]
    size = len(file.header.raw) + 8 + sum(entry.size for entry in file.header.entries.values())
    return DeltaReport(base.name, base.revision, tensors, size, changes_by_unit(folder, file))


def _change(file: CompressedFile, name: str) -> TensorChange:
    """What the file of a delta says of a tensor."""
    head, stored = file.head(name), file.header.entries[name].size
    _, shape = file.form(name)
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)
    if head is None or not head.changes:
        dense = stored if head is None else head.dense
        return TensorChange(name, shape, math.prod(shape), rows, columns, True, stored, dense)
    if columns and head.values:
        places, _ = file.changes(name)
        rows, columns = np.unique(places // columns).size, np.unique(places % columns).size
    else:
        rows = columns = 0
    return TensorChange(name, shape, head.values, rows, columns, False, stored, head.dense)


def plot_delta(report: DeltaReport, path: str | os.PathLike[str]) -> None:
    """Draw the share of changed weights as a heat map: a row for each layer, a column for each kind of tensor.

    Args:
        report: What a delta changes.
        path: Where the PNG goes.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    cells: dict[tuple[int, str], float] = {}
    for tensor in report.tensors:
        number = _LAYER.search(tensor.name)
        kind = tensor.name if number is None else f"{tensor.name[: number.start()]}.*.{tensor.name[number.end() :]}"
        cells[-1 if number is None else int(number[1]), kind] = tensor.share
    layers = sorted({layer for layer, _ in cells})
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    shares = np.array([[cells.get((layer, kind), math.nan) for kind in kinds] for layer in layers])
    least = min((share for share in cells.values() if share), default=1e-3)
    figure = Figure(figsize=(2.5 + 0.45 * len(kinds), 4 + 0.22 * len(layers)), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["viridis"].with_extremes(bad="white", under="#dddddd")
    norm = LogNorm(min(least, 0.5), 1)
    image = axes.imshow(shares, norm=norm, cmap=colors, aspect="auto", interpolation="nearest")
    prefix = os.path.commonprefix([kind for kind in kinds if ".*." in kind])
    axes.set_xticks(range(len(kinds)), [kind.removeprefix(prefix) for kind in kinds], rotation=60, ha="right")
    axes.set_yticks(range(len(layers)), ["others" if layer < 0 else str(layer) for layer in layers])
    axes.set_ylabel("layer")
    share = report.changed / max(report.weights, 1)
    axes.set_title(f"{share:.2%} of {report.weights:,} weights changed, by tensor (grey: none)", fontsize=10)
    figure.colorbar(image, label="share changed")
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
