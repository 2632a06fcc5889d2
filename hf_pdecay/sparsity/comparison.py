"""Comparing the places of zeros before and after something has been done to a model: its records and its table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..tables import NameTable


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_CHUNK = 1 << 24  # weights that are compared at a time
_TABLE_ROWS = 40


@dataclass(frozen=True)
class TensorComparison:
    """What became of one tensor.

    Args:
        name: Its name in the file or model before.
        weights: Number of weights.
        zeros: Number of exact zeros before.
        filled: Number of these that are not zero after.
        added: Number of weights that are zero after, and were not before.
        non_finite: Number of weights that are NaN or infinite after, and were not before.
        largest: The largest finite magnitude at the place of a filled zero; 0 if there is none.
    """

    name: str
    weights: int
    zeros: int
    filled: int
    added: int
    non_finite: int
    largest: float = 0.0

    @property
    def is_damaged(self) -> bool:
        """Whether a zero was filled in, or NaN or infinity appeared."""
        return bool(self.filled or self.non_finite)


@dataclass(frozen=True)
class ZeroComparison:
    """Which zeros of a model were kept; prints as a table of the tensors in which something changed.

    Args:
        tensors: One entry for each tensor of floating-point numbers before, in the order of the model after.
        method: How the model after is quantized, as in its ``quantization_config``, or ``"gguf"``; None
            for plain weights.
    """

    tensors: list[TensorComparison] = field(default_factory=list)
    method: str | None = None

    @property
    def zeros(self) -> int:
        """Number of exact zeros before."""
        return sum(tensor.zeros for tensor in self.tensors)

    @property
    def filled(self) -> int:
        """Number of zeros that are not zero after."""
        return sum(tensor.filled for tensor in self.tensors)

    @property
    def added(self) -> int:
        """Number of weights that are zero after, and were not before."""
        return sum(tensor.added for tensor in self.tensors)

    @property
    def non_finite(self) -> int:
        """Number of weights that are NaN or infinite after, and were not before."""
        return sum(tensor.non_finite for tensor in self.tensors)

    @property
    def kept(self) -> float:
        """Fraction of the zeros that are still zero, in [0, 1]; 1 without zeros."""
        return 1 - self.filled / self.zeros if self.zeros else 1.0

    @property
    def is_damaged(self) -> bool:
        """Whether a zero was filled in, or NaN or infinity appeared."""
        return any(tensor.is_damaged for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain JSON types, totals included."""
        totals = {name: getattr(self, name) for name in ("zeros", "filled", "added", "non_finite", "kept")}
        return {"method": self.method, **totals, "tensors": [asdict(tensor) for tensor in self.tensors]}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table and sentences."""
        changed = [tensor for tensor in self.tensors if tensor.is_damaged or tensor.added]
        changed.sort(key=lambda tensor: not tensor.is_damaged)  # the damaged first, each in the model's order
        headings = ("tensor", "weights", "zeros before", "filled in", "new zeros", "NaN or inf")
        table = NameTable("Zeros" if self.method is None else f"Zeros, {self.method}", headings)
        for tensor in changed[:_TABLE_ROWS]:
            table.add_row(tensor.name, *_cells([tensor]))
        table.add_total(f"all {len(self.tensors):,} tensors", *_cells(self.tensors))
        yield table
        if len(changed) > _TABLE_ROWS:
            yield f"Something changed in {len(changed) - _TABLE_ROWS:,} more tensors; --json has them all."
        if self.filled:
            filled = [tensor for tensor in self.tensors if tensor.filled]
            worst = max(filled, key=lambda tensor: tensor.filled / tensor.zeros)
            largest = max(tensor.largest for tensor in filled)
            values = f" by values of up to {largest:.2g}" if largest else ""
            yield (
                f"{self.filled:,} of {self.zeros:,} zeros ({self.filled / self.zeros:.2%}) were filled in{values}, in "
                f"{len(filled):,} tensors; {worst.name} lost the largest share ({worst.filled / worst.zeros:.2%})."
            )
        elif self.zeros:
            yield f"All {self.zeros:,} zeros are kept."
        else:
            yield "There were no zeros before."
        if self.non_finite:
            bad = [tensor for tensor in self.tensors if tensor.non_finite]
            yield f"{self.non_finite:,} weights became NaN or infinite, the first of them in {bad[0].name}."


def compare_tensor(name: str, before: Tensor, after: Tensor) -> TensorComparison:
    """Compare the places of zeros in a tensor; -0.0 is a zero.

    Args:
        name: Name of the tensor before.
        before: Of any dtype of floating-point numbers.
        after: Of the same shape, in any such dtype, on the same device.
    """
    zeros = filled = added = non_finite = 0
    largest = 0.0
    pairs = zip(before.reshape(-1).split(_CHUNK), after.reshape(-1).split(_CHUNK), strict=True)
    for old, new in ((_computable(old), _computable(new)) for old, new in pairs):
        was, now = old == 0, new == 0
        zeros += int(was.sum())
        added += int((now & ~was).sum())
        finite = new.isfinite()
        non_finite += int((~finite & old.isfinite()).sum())
        places = was & ~now
        filled += int(places.sum())
        values = new[places & finite]
        if values.numel():
            largest = max(largest, float(values.abs().max()))
    return TensorComparison(name, before.numel(), zeros, filled, added, non_finite, largest)


def _computable(values: Tensor) -> Tensor:
    return values.float() if values.element_size() == 1 else values  # torch compares no float8


def _cells(tensors: Iterable[TensorComparison]) -> tuple[str, ...]:
    tensors = list(tensors)
    columns = ("weights", "zeros", "filled", "added", "non_finite")
    return tuple(f"{sum(getattr(tensor, column) for tensor in tensors):,}" for column in columns)
