"""The report of a model's zeros, or of its unchanged weights: its records, its file and its table."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_text
from ..tables import NameTable
from ..terminal import print_rich
from .defaults import NEAR_ZERO_THRESHOLD


if TYPE_CHECKING:
    import pandas
    from rich.console import Console, ConsoleOptions, RenderResult

_TABLE_ROWS = 40
# What the entries of a report of changes are called in files.
_UNCHANGED = {
    "sparsity": "unchanged_share",
    "model_sparsity": "model_unchanged_share",
    "zeros": "unchanged",
    "near_zeros": "nearly_unchanged",
}


@dataclass(frozen=True)
class TensorSparsity:
    """Counts of one tensor.

    Args:
        name: Name of the parameter in the model.
        shape: Its shape.
        parameters: Number of weights.
        zeros: Number of exact zeros.
        near_zeros: Number of weights that are not zero but below the report's threshold in magnitude.
        norm: Euclidean norm.
        decayed: Whether p-norm decay acts on it.
        still: Number of its weights that a target left alone, as they had no gradient or were frozen.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    zeros: int
    near_zeros: int
    norm: float
    decayed: bool
    still: int = 0

    @property
    def sparsity(self) -> float:
        """Fraction of exact zeros, in [0, 1]."""
        return self.zeros / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Totals:
    """Sums over several tensors."""

    tensors: int
    parameters: int
    zeros: int
    near_zeros: int

    @property
    def sparsity(self) -> float:
        """Fraction of exact zeros, in [0, 1]; 0 without weights."""
        return self.zeros / self.parameters if self.parameters else 0.0

    @classmethod
    def of(cls, tensors: Iterable[TensorSparsity]) -> Totals:
        """Add up the counts of tensors."""
        tensors = list(tensors)
        counts = ("parameters", "zeros", "near_zeros")
        return cls(len(tensors), *(sum(getattr(tensor, count) for tensor in tensors) for count in counts))


@dataclass(frozen=True)
class UnitSparsity:
    """How many units of a kind are dead; for N:M, how many blocks have at most N weights that are not zero.

    Args:
        kind: ``"row"``, ``"column"``, ``"neuron"``, ``"head"``, ``"rank"`` or N:M.
        count: Number of units.
        dead: Number of units whose weights are all exactly zero; for N:M the number of blocks that fit.
    """

    kind: str
    count: int
    dead: int

    @property
    def sparsity(self) -> float:
        """Fraction of dead units, in [0, 1]."""
        return self.dead / self.count if self.count else 0.0

    @property
    def label(self) -> str:
        """The kind in the plural."""
        return f"{self.kind} blocks" if ":" in self.kind else f"{self.kind}s"

    def __str__(self) -> str:
        """Return a phrase such as "neurons: 50.0% of 2,048 dead"."""
        return self.in_words("dead")

    def in_words(self, dead: str) -> str:
        """Return a phrase that calls a dead unit by a word."""
        return f"{self.label}: {self.sparsity:.1%} of {self.count:,} {'fit' if ':' in self.kind else dead}"


@dataclass(frozen=True)
class SparsityReport:
    """Zeros of a model, tensor by tensor and in total; prints as a table.

    Args:
        tensors: One entry for each floating-point parameter in the model's order; a shared parameter has one.
        near_zero_threshold: Magnitude below which a non-zero weight counts as near zero.
        units: One entry for each kind of unit that decays as one.
        of_changes: Whether changes are counted: then zeros are the weights that are equal to the base, near-zeros are
            changes below the threshold, norms are those of the changes, and what decays does so to its base.
        delta: The report of changes of a run in which weights decay to their base; the report itself is of its zeros.
    """

    tensors: list[TensorSparsity] = field(default_factory=list)
    near_zero_threshold: float = NEAR_ZERO_THRESHOLD
    units: list[UnitSparsity] = field(default_factory=list)
    of_changes: bool = False
    delta: SparsityReport | None = None

    @property
    def main(self) -> SparsityReport:
        """The report that the target of a run is about: that of changes where there is one."""
        return self.delta or self

    @property
    def decayed(self) -> Totals:
        """Totals over the tensors on which p-norm decay acts."""
        return Totals.of(tensor for tensor in self.tensors if tensor.decayed)

    @property
    def model(self) -> Totals:
        """Totals over the whole model."""
        return Totals.of(self.tensors)

    @property
    def still(self) -> int:
        """Number of weights that a target left alone, as they had no gradient or were frozen.

        A tensor whose weights are all still does not count as decayed.
        """
        return sum(tensor.still for tensor in self.tensors)

    @property
    def sparsity(self) -> float:
        """Fraction of exact zeros in the decayed weights, in [0, 1]."""
        return self.decayed.sparsity

    @property
    def model_sparsity(self) -> float:
        """Fraction of exact zeros in the whole model, in [0, 1]."""
        return self.model.sparsity

    @property
    def dead_tensors(self) -> list[str]:
        """Names of the decayed tensors that are wholly zero."""
        return [tensor.name for tensor in self.tensors if tensor.decayed and 0 < tensor.parameters == tensor.zeros]

    def by_block(self) -> dict[str, Totals]:
        """Totals of the decayed weights by block: a layer of a stack (``transformer.h.0``), or a module outside it."""
        blocks: dict[str, list[TensorSparsity]] = {}
        for tensor in self.tensors:
            if tensor.decayed:
                match = re.match(r"(.*?\.\d+)(?:\.|$)", tensor.name)
                block = match[1] if match else tensor.name.rpartition(".")[0] or tensor.name
                blocks.setdefault(block, []).append(tensor)
        return {block: Totals.of(tensors) for block, tensors in blocks.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types, totals included; ``delta`` has the unchanged weights."""
        values = {
            "near_zero_threshold": self.near_zero_threshold,
            "sparsity": self.sparsity,
            "model_sparsity": self.model_sparsity,
            "decayed": asdict(self.decayed),
            "model": asdict(self.model),
            "still": self.still,
            **({"units": list(map(asdict, self.units))} if self.units else {}),
            "tensors": [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in self.tensors],
            **({} if self.delta is None else {"delta": self.delta.to_dict()}),
        }
        return _renamed(values, _UNCHANGED) if self.of_changes else values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SparsityReport:
        """Rebuild a report from :meth:`to_dict`; totals are counted anew.

        Raises:
            ValueError: If an entry is missing or of the wrong type.
        """
        changes = _UNCHANGED["sparsity"] in values
        if changes:
            values = _renamed(values, {new: old for old, new in _UNCHANGED.items()})
        try:
            delta = cls.from_dict(values["delta"]) if "delta" in values else None
            tensors = [TensorSparsity(**{**entry, "shape": tuple(entry["shape"])}) for entry in values["tensors"]]
            units = [UnitSparsity(**entry) for entry in values.get("units", [])]
            return cls(tensors, float(values["near_zero_threshold"]), units, changes, delta)
        except (KeyError, TypeError) as error:
            raise ValueError(f"This is not a sparsity report: {error!r} is missing or invalid.") from error

    def to_json(self, indent: int | None = 2) -> str:
        """Return the report as a JSON string."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> SparsityReport:
        """Rebuild a report from a JSON string.

        Raises:
            ValueError: If the string is not JSON or not a report.
        """
        return cls.from_dict(json.loads(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON; the file appears whole or not at all."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparsityReport:
        """Read a report that :meth:`save` wrote.

        Raises:
            ValueError: If the file holds no report.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"{str(path)!r} cannot be read as a sparsity report ({reason}).") from error

    def to_pandas(self) -> pandas.DataFrame:
        """Return a frame with a row for each tensor."""
        import pandas

        columns = ["name", "shape", "parameters", "zeros", "near_zeros", "sparsity", "norm", "decayed"]
        rows = [{**asdict(tensor), "sparsity": tensor.sparsity} for tensor in self.tensors]
        return pandas.DataFrame(rows, columns=columns)

    def to_table(self) -> NameTable:
        """Return a table that prints by rich: a row for each decayed tensor (or block, if many), and totals."""
        decayed = [tensor for tensor in self.tensors if tensor.decayed]
        by_block = len(decayed) > _TABLE_ROWS
        heading = "block" if by_block else "tensor"
        title, *columns = (
            ("Unchanged weights", "unchanged", "share", "nearly")
            if self.of_changes
            else ("Exact zeros", "zeros", "sparsity", "near 0")
        )
        table = NameTable(title, (heading, "weights", *columns))
        rows = self.by_block() if by_block else {tensor.name: tensor for tensor in decayed}
        for name, counts in rows.items():
            table.add_row(name, *_cells(counts))
        table.add_total("decayed weights", *_cells(self.decayed))
        table.add_total("whole model", *_cells(self.model))
        units = [each.in_words("unchanged" if self.of_changes else "dead") for each in self.units]
        notes = [*units, *([f"{self.still:,} weights left alone by the target"] if self.still else [])]
        table.caption = "; ".join(notes) or None
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as :meth:`to_table`, the unchanged weights first."""
        if self.delta is not None:
            yield self.delta.to_table()
        if self.delta is None or self.decayed.tensors:
            yield self.to_table()

    def __str__(self) -> str:
        """Return the table as plain text."""
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            print_rich(self, console)
        return capture.get().rstrip()


def _renamed(values: Any, names: Mapping[str, str]) -> Any:
    """Return plain JSON types with other names of their entries."""
    if isinstance(values, dict):
        return {names.get(key, key): _renamed(value, names) for key, value in values.items()}
    return [_renamed(value, names) for value in values] if isinstance(values, list) else values


def _cells(counts: TensorSparsity | Totals) -> tuple[str, ...]:
    return f"{counts.parameters:,}", f"{counts.zeros:,}", f"{counts.sparsity:.2%}", f"{counts.near_zeros:,}"
