"""What quantising in one go has done: its records and its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..tables import NameTable
from .report import BlockReport, some


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass
class BlockQuantization:
    """What was quantised in a block.

    Args:
        name: The block's module.
        tensors: Names of the quantised parameters.
        weights: Number of weights in them.
        zeros: Number of these that were zero before; all stay zero.
        new_zeros: Number of other weights that were rounded to zero.
        weight_error: Norm of the change of the weights by the norm of the weights.
        output_error: Mean over all tokens of the relative error of the block's outputs, for the same inputs; None
            without calibration rows.
    """

    name: str
    tensors: tuple[str, ...]
    weights: int = 0
    zeros: int = 0
    new_zeros: int = 0
    weight_error: float = 0.0
    output_error: float | None = None


@dataclass
class QuantizationReport(BlockReport[BlockQuantization]):
    """What was quantised, and what was left alone; prints as a table.

    Attributes:
        bits: Width of the codes.
        block: Consecutive inputs that share a scale.
        rows: Number of calibration rows, and of tokens in each; None for rounding to nearest.
        blocks: One entry for each block.
        coded: Names of the matrices that had codes of these widths and blocks already, and stay as they were.
        left: Names of parameters that a target would prune, and that were left alone, with their weights.
        unseen: Names of the matrices that no row has reached, which were rounded to nearest.
        notes: Other sentences.
        left_out: Files of weights in other formats, which were not copied.
    """

    bits: float
    block: int
    rows: tuple[int, int] | None = None
    coded: list[str] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """``"gptq"``, or ``"rtn"`` for rounding to nearest."""
        return "rtn" if self.rows is None else "gptq"

    @property
    def new_zeros(self) -> int:
        """Number of other weights that were rounded to zero."""
        return sum(block.new_zeros for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        totals = {"weights": self.weights, "zeros": self.zeros, "new_zeros": self.new_zeros}
        return {"method": self.method, **asdict(self), **totals}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table and sentences."""
        seen = self.rows is not None
        headings = ("block", "weights", "zeros kept", "new zeros", "weight error", *["output error"] * seen)
        how = "GPTQ that keeps zeros" if seen else "rounding to nearest"
        table = NameTable(f"Quantised to {self.bits:g} bits by {how}", headings)
        for block in self.blocks:
            error = "" if block.output_error is None else f"{block.output_error:.2%}"
            table.add_row(block.name, *_cells(block), f"{block.weight_error:.2%}", *[error] * seen)
        table.add_total("in all", *_cells(self), "", *[""] * seen)
        yield table
        yield (
            f"Each weight is a code times the scale of {self.block} consecutive inputs, exactly, in the dtype of the "
            f"model: {self.bits + 16 / self.block:.3g} bits a weight with scales of 16 bits, before zeros are left out."
        )
        if self.coded:
            yield f"Had such codes already, and kept them: {some(self.coded)}."
        if self.left:
            yield f"Left alone: {some(list(self.left))} ({sum(self.left.values()):,} weights): not matrices."
        yield from self._ends(self.rows, "quantised", "rounded to nearest")


def _cells(counts: BlockQuantization | QuantizationReport) -> tuple[str, str, str]:
    return f"{counts.weights:,}", f"{counts.zeros:,}", f"{counts.new_zeros:,}"
