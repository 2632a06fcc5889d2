"""Counting zeros: a model → :class:`SparsityReport`."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..files import write_text
from ..layers.matrices import decayable_parameter_names
from ..names import clean_name
from ..optim.backends import has_triton
from ..optim.distributed import Groups, all_sum
from ..optim.shards import full_numel, full_shape, held, is_sharded
from .dead_units import UnitSparsity


if TYPE_CHECKING:
    import pandas
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

NEAR_ZERO_THRESHOLD = 1e-13

# Where a run leaves its report, in the folder of the model.

CHUNK = 1 << 24
_TABLE_ROWS = 40


@dataclass(frozen=True)
class TensorSparsity:
    """What was counted in one tensor.

    Args:
        name: Name of the parameter in the model.
        shape: Its shape.
        parameters: Number of weights.
        zeros: How many of them are exactly zero.
        near_zeros: How many are not zero but below the report's threshold in magnitude.
        norm: Euclidean norm.
        decayed: Whether p-norm decay acts on it.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    zeros: int
    near_zeros: int
    norm: float
    decayed: bool

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
        """Fraction of exact zeros, in [0, 1]; 0 where there are no weights."""
        return self.zeros / self.parameters if self.parameters else 0.0

    @classmethod
    def of(cls, tensors: Iterable[TensorSparsity]) -> Totals:
        """Add up."""
        tensors = list(tensors)
        return cls(
            tensors=len(tensors),
            parameters=sum(each.parameters for each in tensors),
            zeros=sum(each.zeros for each in tensors),
            near_zeros=sum(each.near_zeros for each in tensors),
        )


@dataclass(frozen=True)
class SparsityReport:
    """Zeros of a model, tensor by tensor and in total; prints as a table.

    Args:
        tensors: One entry a floating-point parameter in the model's order; a shared parameter has one.
        near_zero_threshold: Magnitude below which a non-zero weight counts as near zero.
        groups: Of each kind of groups that decay as one how many are dead.
    """

    tensors: list[TensorSparsity] = field(default_factory=list)
    near_zero_threshold: float = NEAR_ZERO_THRESHOLD
    groups: list[UnitSparsity] = field(default_factory=list)

    @property
    def decayed(self) -> Totals:
        """Totals over the tensors on which p-norm decay acts."""
        return Totals.of(each for each in self.tensors if each.decayed)

    @property
    def model(self) -> Totals:
        """Totals over the whole model."""
        return Totals.of(self.tensors)

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
        return [each.name for each in self.tensors if each.decayed and 0 < each.parameters == each.zeros]

    def by_block(self) -> dict[str, Totals]:
        """Totals of the decayed weights by block.

        A block is what a parameter's name has up to its first number (``transformer.h.0``), so a layer of a stack is
        one; parameters outside of any stack go by their module's name.
        """
        blocks: dict[str, list[TensorSparsity]] = {}
        for each in self.tensors:
            if each.decayed:
                match = re.match(r"(.*?\.\d+)(?:\.|$)", each.name)
                blocks.setdefault(match[1] if match else each.name.rpartition(".")[0] or each.name, []).append(each)
        return {block: Totals.of(tensors) for block, tensors in blocks.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types, totals included."""
        return {
            "near_zero_threshold": self.near_zero_threshold,
            "sparsity": self.sparsity,
            "model_sparsity": self.model_sparsity,
            "decayed": asdict(self.decayed),
            "model": asdict(self.model),
            **({"groups": [asdict(each) for each in self.groups]} if self.groups else {}),
            "tensors": [{**asdict(each), "shape": list(each.shape)} for each in self.tensors],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SparsityReport:
        """Rebuild a report from :meth:`to_dict`; totals are counted anew.

        Raises:
            ValueError: If a part is missing or of the wrong type.
        """
        try:
            tensors = [TensorSparsity(**{**each, "shape": tuple(each["shape"])}) for each in values["tensors"]]
            groups = [UnitSparsity(**each) for each in values.get("groups", [])]
            return cls(tensors, float(values["near_zero_threshold"]), groups)
        except (KeyError, TypeError) as error:
            raise ValueError(f"This is no sparsity report: {error!r} is missing or wrong in it.") from error

    def to_json(self, indent: int | None = 2) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> SparsityReport:
        """Rebuild a report from JSON text.

        Raises:
            ValueError: If the text is not JSON or not a report.
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
            raise ValueError(
                f"{str(path)!r} cannot be read as a sparsity report ({str(error).rstrip('.')})."
            ) from error

    def to_pandas(self) -> pandas.DataFrame:
        """Return a frame with a row a tensor."""
        import pandas

        columns = ["name", "shape", "parameters", "zeros", "near_zeros", "sparsity", "norm", "decayed"]
        rows = [{**asdict(each), "sparsity": each.sparsity} for each in self.tensors]
        return pandas.DataFrame(rows, columns=columns)

    def to_table(self) -> Table:
        """Return a rich table: a row a decayed tensor (a row a block where there are many), then the totals."""
        from rich.table import Table

        chosen = [each for each in self.tensors if each.decayed]
        by_block = len(chosen) > _TABLE_ROWS
        table = Table(title="Exact zeros")
        table.add_column("block" if by_block else "tensor", overflow="fold")
        for heading in ("weights", "zeros", "sparsity", "near 0"):
            table.add_column(heading, justify="right")
        rows = self.by_block() if by_block else {each.name: each for each in chosen}
        for name, counted in rows.items():
            table.add_row(name, *_cells(counted))
        table.add_section()
        table.add_row("decayed weights", *_cells(self.decayed), style="bold")
        table.add_row("whole model", *_cells(self.model))
        if self.groups:
            table.caption = "; ".join(map(str, self.groups))
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as :meth:`to_table`."""
        yield self.to_table()

    def __str__(self) -> str:
        """Return the table as plain text."""
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self.to_table())
        return capture.get().rstrip()


def _cells(counted: TensorSparsity | Totals) -> tuple[str, ...]:
    return (
        f"{counted.parameters:,}",
        f"{counted.zeros:,}",
        f"{counted.sparsity:.2%}",
        f"{counted.near_zeros:,}",
    )


def measure_sparsity(
    model: nn.Module,
    *,
    decayed: Collection[str] | None = None,
    near_zero_threshold: float = NEAR_ZERO_THRESHOLD,
    groups: Mapping[str, tuple[int, Tensor]] | None = None,
) -> SparsityReport:
    """Count the zeros of a model.

    Args:
        model: Any module, wrapped or not. Parameters that are not floating-point (packed quantised ones) are left out,
            and a shared parameter is counted once. Where processes hold shards of it, all of them must call; each
            counts its own, and all get the report of the whole.
        decayed: Names of the parameters on which p-norm decay acts; those that decay by default if None.
        near_zero_threshold: Magnitude below which a non-zero weight counts as near zero.
        groups: What :func:`.structure.count_units` returned, if groups of weights decay as one.

    Returns:
        The report. Counting waits for each device once.
    """
    return measure_with_extra(model, decayed=decayed, near_zero_threshold=near_zero_threshold, groups=groups)[0]


def measure_with_extra(
    model: nn.Module,
    *,
    decayed: Collection[str] | None = None,
    near_zero_threshold: float = NEAR_ZERO_THRESHOLD,
    extra: Sequence[int | Tensor] = (),
    groups: Mapping[str, tuple[int, Tensor]] | None = None,
) -> tuple[SparsityReport, list[int]]:
    """:func:`measure_sparsity` that brings a few integers from the device along in the same transfer.

    Args:
        model: See :func:`measure_sparsity`.
        decayed: See :func:`measure_sparsity`.
        near_zero_threshold: See :func:`measure_sparsity`.
        extra: Integers, or 0-dim integer tensors on any device.
        groups: See :func:`measure_sparsity`.

    Returns:
        The report and the values of ``extra``.
    """
    chosen = {clean_name(name) for name in (decayable_parameter_names(model) if decayed is None else decayed)}
    named = list(_distinct_parameters(model))
    with torch.no_grad():
        counts = _counts([held(param).weight for _, param in named], near_zero_threshold)
        _add_shards([param for _, param in named], counts)
    dead = {kind: count for kind, (_, count) in (groups or {}).items()}
    extra = [*dead.values(), *extra]
    rows = _to_host([*counts, *(value.reshape(1) for value in extra if isinstance(value, Tensor))])
    from_device = iter(rows[len(counts) :])
    numbers = [next(from_device)[0] if isinstance(value, Tensor) else int(value) for value in extra]
    report = SparsityReport(
        [
            TensorSparsity(
                name=name,
                shape=tuple(full_shape(param)),
                parameters=full_numel(param),
                zeros=zeros,
                near_zeros=max(below - zeros, 0),
                norm=math.sqrt(_float_from_bits(square)),
                decayed=name in chosen,
            )
            for (name, param), (zeros, below, square) in zip(named, rows, strict=False)
        ],
        near_zero_threshold,
        [
            UnitSparsity(kind, total, number)
            for (kind, (total, _)), number in zip((groups or {}).items(), numbers, strict=False)
        ],
    )
    return report, numbers[len(dead) :]


def _distinct_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Floating-point parameters, each piece of memory once even where two parameters share it."""
    seen = set()
    for name, param in model.named_parameters():
        if not param.is_floating_point():
            continue
        if not is_sharded(param) and param.numel() and param.device.type != "meta":
            storage = param.untyped_storage().data_ptr(), param.storage_offset(), tuple(param.shape), param.stride()
            if storage in seen:
                continue
            seen.add(storage)
        yield clean_name(name), param


def _counts(tensors: Sequence[Tensor], near_zero_threshold: float) -> list[Tensor]:
    """Exact zeros, weights below the threshold and the bits of the norm's square of each, on its device, in int64."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(number)
    found: dict[int, Tensor] = {}
    for (device, dtype), numbers in alike.items():
        if not has_triton(device):
            continue
        from ..optim.gpu.count import count_zeros, countable  # imports triton, which takes its time

        some = [number for number in numbers if countable(tensors[number])]
        if some:
            weights = [tensors[number] for number in some]
            norms = torch._foreach_norm(weights, 2, dtype=torch.promote_types(dtype, torch.float32))
            squares = torch.stack(norms).double().square().view(torch.int64)
            rows = torch.cat([count_zeros(weights, near_zero_threshold), squares.unsqueeze(1)], 1)
            found |= dict(zip(some, rows.unbind(0), strict=True))
    return [found[n] if n in found else _count(each, near_zero_threshold) for n, each in enumerate(tensors)]


def _count(weights: Tensor, near_zero_threshold: float) -> Tensor:
    """What :func:`_counts` returns of one tensor, by plain operations."""
    zeros = weights.numel() - torch.count_nonzero(weights)
    below = torch.zeros((), dtype=torch.int64, device=weights.device)
    for piece in weights.reshape(-1).split(CHUNK):
        below += (piece.abs() < near_zero_threshold).sum()
    norm = torch.linalg.vector_norm(weights, dtype=torch.promote_types(weights.dtype, torch.float32))
    return torch.stack([zeros, below, norm.double().square().view(torch.int64)])


def count_tensor(tensor: Tensor, near_zero_threshold: float = NEAR_ZERO_THRESHOLD) -> tuple[int, int, int, float]:
    """Return number of weights, exact zeros, near-zeros and Euclidean norm of one whole tensor."""
    zeros, below, square = _to_host(_counts([held(tensor).weight], near_zero_threshold))[0]
    return tensor.numel(), zeros, max(below - zeros, 0), math.sqrt(_float_from_bits(square))


def _add_shards(params: Sequence[Tensor], counts: list[Tensor]) -> None:
    """Add up the counts of parameters over the processes that hold shards of them, in place in the list."""
    places: dict[Groups, list[int]] = {}
    for place, param in enumerate(params):
        if is_sharded(param):
            places.setdefault(held(param).groups, []).append(place)
    for groups, some in places.items():
        device = counts[some[0]].device
        own = torch.stack([counts[place].to(device) for place in some], 1)
        # A float64 holds whole numbers up to 2^53, which is more than there are weights.
        summed = all_sum(torch.cat([own[:2].double(), own[2:].view(torch.float64)]), groups)
        rows = torch.cat([summed[:2].to(torch.int64), summed[2:].view(torch.int64)])
        for place, row in zip(some, rows.unbind(1), strict=True):
            counts[place] = row


def _float_from_bits(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def _to_host(rows: list[Tensor]) -> list[list[int]]:
    """Values of small integer tensors, with one transfer a device."""
    by_device: dict[torch.device, list[int]] = {}
    for number, row in enumerate(rows):
        by_device.setdefault(row.device, []).append(number)
    values: list[list[int]] = [[] for _ in rows]
    for numbers in by_device.values():
        flat = torch.cat([rows[number] for number in numbers]).tolist()
        for number in numbers:
            values[number], flat = flat[: len(rows[number])], flat[len(rows[number]) :]
    return values
