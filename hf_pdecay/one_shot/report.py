"""What pruning in one go has done: its records and its table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ..tables import NameTable


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


class _Counted(Protocol):
    """What is counted in a block."""

    @property
    def weights(self) -> int: ...

    @property
    def zeros(self) -> int: ...


_Block = TypeVar("_Block", bound=_Counted)


@dataclass(kw_only=True)
class BlockReport(Generic[_Block]):
    """What reports on a model, block by block, have in common.

    Attributes:
        blocks: One entry for each block.
        unseen: Names of the matrices that no row has reached.
        notes: Other sentences.
        left_out: Files of weights in other formats, which were not copied.
    """

    blocks: list[_Block] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def weights(self) -> int:
        """Number of weights in all blocks."""
        return sum(block.weights for block in self.blocks)

    @property
    def zeros(self) -> int:
        """Number of zeros in all blocks, as each of them counts."""
        return sum(block.zeros for block in self.blocks)

    def _ends(self, rows: tuple[int, int] | None, changed: str, instead: str) -> Iterator[str]:
        """The last sentences; the blocks were ``changed``, and what no row has reached was done ``instead``."""
        if rows is not None:
            yield (
                f"Output error: the mean relative error of a block's outputs over {rows[0]:,} rows of {rows[1]:,} "
                f"tokens, for the inputs that the {changed} blocks before it give."
            )
        if self.unseen:
            yield f"No row has reached {some(self.unseen)}: {instead}. More rows may reach them."
        yield from self.notes
        if self.left_out:
            yield f"Left out, weights in other formats: {', '.join(self.left_out)}"


@dataclass(frozen=True)
class BlockPruning:
    """What was pruned in a block.

    Args:
        name: The block's module.
        tensors: Names of the pruned parameters.
        weights: Number of weights in them.
        zeros: Number of zeros among these.
        error: Mean over all tokens of the relative error of the block's outputs, for the same inputs.
    """

    name: str
    tensors: tuple[str, ...]
    weights: int
    zeros: int
    error: float


@dataclass
class OneShotReport(BlockReport[BlockPruning]):
    """What was pruned, and what stayed dense; prints as a table.

    Attributes:
        method: How weights were chosen.
        asked: The sparsity or the pattern.
        rows: Number of calibration rows, and of tokens in each.
        blocks: One entry for each block.
        dense: Names of parameters that a target would prune, and that stayed dense, with their weights.
        unseen: Names of the matrices that no row has reached, which were pruned by magnitude.
        notes: Other sentences.
        left_out: Files of weights in other formats, which were not copied.
    """

    method: str
    asked: float | str
    rows: tuple[int, int]
    dense: dict[str, int] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in what was pruned."""
        return self.zeros / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return asdict(self) | {"weights": self.weights, "zeros": self.zeros, "sparsity": self.sparsity}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table and sentences."""
        table = NameTable(
            f"Pruned to {self.asked} by {self.method}", ("block", "weights", "zeros", "sparsity", "output error")
        )
        for block in self.blocks:
            table.add_row(block.name, *_cells(block.weights, block.zeros), f"{block.error:.2%}")
        table.add_total("in all", *_cells(self.weights, self.zeros), "")
        yield table
        if self.dense:
            yield (
                f"Left dense: {some(list(self.dense))} ({sum(self.dense.values()):,} weights), which lie outside the "
                "blocks, or calibration cannot see them as matrices."
            )
        yield from self._ends(self.rows, "pruned", "pruned by magnitude")


def _cells(weights: int, zeros: int) -> tuple[str, str, str]:
    return f"{weights:,}", f"{zeros:,}", f"{zeros / weights:.2%}" if weights else ""


def some(names: list[str]) -> str:
    """Return the first names of several, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
