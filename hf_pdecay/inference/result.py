"""What became of each linear layer when a model was made sparse for inference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

MOST_SPARSITY = 0.99  # the highest at which a layer that stayed dense is tried
# For some numbers of rows, the fraction of zeros from which layers in float32 are faster sparse on a processor with
# AVX-512: docs/inference.md.
LIKELY_FROM = {1: 0.4, 16: 0.4, 256: 0.5}

_WIDTH = 80


@dataclass(frozen=True)
class Choice:
    """A linear layer, and whether it was swapped.

    Attributes:
        name: Its name in the model.
        shape: (out_features, in_features).
        sparsity: Fraction of its weights that are zero.
        speedup: Time of the dense layer over that of the sparse one, or None if it was not measured.
        swapped: Whether it is sparse now.
        reason: Why not, or an empty string.
        form: ``"bitmask"``, ``"csr"`` or ``"2:4"``; ``"dense"`` for dense int8 values, and where it was not swapped.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    speedup: float | None
    swapped: bool
    reason: str = ""
    form: str = "dense"


class Choices(list[Choice]):
    """A list with a :class:`Choice` for each linear layer; it prints as a table.

    Attributes:
        rows: Number of rows that layers were measured with.
        min_sparsity: Sparsity from which layers were swapped without measuring; None if they were measured.
        swapped_from: If nothing was swapped, the sparsity from which layers of a shape would be; None for a shape at
            whose every sparsity up to 99% the dense layer is faster. Shapes that no sparsity can swap are left out.
        seconds: Of a call of the whole model for one sequence of ``rows`` tokens, before and after; None if nothing was
            swapped, or the model does not take such a sequence.
    """

    def __init__(
        self,
        choices: Iterable[Choice] = (),
        *,
        rows: int = 16,
        min_sparsity: float | None = None,
        swapped_from: Mapping[tuple[int, int], float | None] | None = None,
        seconds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(choices)
        self.rows = rows
        self.min_sparsity = min_sparsity
        self.swapped_from = dict(swapped_from or {})
        self.seconds = seconds

    @property
    def swapped(self) -> int:
        """The number of layers that are sparse now."""
        return sum(choice.swapped for choice in self)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        layers = [asdict(choice) | {"shape": list(choice.shape)} for choice in self]
        shapes = [{"shape": list(shape), "sparsity": sparsity} for shape, sparsity in self.swapped_from.items()]
        return {
            "rows": self.rows,
            "min_sparsity": self.min_sparsity,
            "swapped": self.swapped,
            "layers": layers,
            "swapped_from": shapes,
            "seconds": None if self.seconds is None else dict(zip(("before", "after"), self.seconds, strict=True)),
        }

    def sentences(self) -> list[str]:
        """Return what was swapped, or from which sparsity it would be, then why layers stay dense."""
        reasons = Counter(choice.reason for choice in self if not choice.swapped)
        return [
            self._first(),
            *self._time(),
            *(f"Dense, {_counted(count)}: {reason}." for reason, count in reasons.items()),
        ]

    def _first(self) -> str:
        if self.swapped:
            return f"{self.swapped} of {len(self)} linear layers are sparse now."
        if not self:
            return "Nothing was swapped: the model has no dense linear layers."
        if not self.swapped_from:
            return "Nothing was swapped."
        if self.min_sparsity is not None:
            most = f"{max(choice.sparsity for choice in self):.1%}"
            return f"Nothing was swapped: min_sparsity={self.min_sparsity:g}, and no layer has more than {most} zeros."
        shapes = ", ".join(
            f"{_sizes(shape)} {f'none up to {MOST_SPARSITY:.0%}' if sparsity is None else f'{sparsity:.0%}'}"
            for shape, sparsity in self.swapped_from.items()
        )
        return f"Nothing was swapped. With rows={self.rows}, layers would be faster sparse from: {shapes}."

    def _time(self) -> list[str]:
        if self.seconds is None:
            return []
        before, after = (1e3 * seconds for seconds in self.seconds)
        tokens = "1 token" if self.rows == 1 else f"{self.rows} tokens"
        return [f"The model takes {after:.3g} ms for {tokens}, {before:.3g} ms before: {before / after:.2f} times."]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table and sentences."""
        from rich.measure import Measurement

        if self:
            table = self._table(own_line=False)
            fits = Measurement.get(console, options.update(max_width=1 << 16), table).maximum <= options.max_width
            yield table if fits else self._table(own_line=True)
        yield from self.sentences()

    def _table(self, own_line: bool) -> Table:
        """A row for each layer; its figures are below its name if they have no room beside it."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        headings = ("shape", "zeros", "times", "now")
        table.add_column("\n".join(["layer", "  ".join(headings)]) if own_line else "layer", overflow="fold")
        for heading in () if own_line else headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for choice in self:
            speedup = "-" if choice.speedup is None else f"{choice.speedup:.2f}"
            figures = _sizes(choice.shape), f"{choice.sparsity:.1%}", speedup, choice.form
            if own_line:
                table.add_row(Text("\n".join([choice.name, "  ".join(figures)])))
            else:
                table.add_row(Text(choice.name), *figures)
        return table

    def __str__(self) -> str:
        """Return the table and the sentences as plain text."""
        from rich.console import Console

        console = Console(width=_WIDTH, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _sizes(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]}"


def _counted(layers: int) -> str:
    return "1 layer" if layers == 1 else f"{layers} layers"
