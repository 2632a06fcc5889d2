"""Tables of names and numbers that fit the terminal and never break a name."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .terminal import wrap


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

_GAP = 2  # between columns without a frame
_FRAME = 3  # of a column with one, and one more


@dataclass
class NameTable:
    """A table by rich: a column of names, then numbers; framed if the terminal is wide enough.

    On a narrower one columns stand without a frame, and a name that leaves no room has a line of its own above its
    numbers. If the numbers alone are too wide, each has its heading beside it.

    Args:
        title: What stands above.
        headings: Of all columns.
        caption: What stands below, wrapped.
    """

    title: str
    headings: Sequence[str]
    caption: str | None = None
    rows: list[tuple[str, ...]] = field(default_factory=list)
    totals: list[tuple[str, ...]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        """Add a row."""
        self.rows.append(cells)

    def add_total(self, *cells: str) -> None:
        """Add a row below all others, under a line."""
        self.totals.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render for the width of the console."""
        from rich.text import Text

        width = options.max_width
        columns = list(zip(self.headings, *self.rows, *self.totals, strict=True))
        if sum(_width(column) + _FRAME for column in columns) + 1 <= width:
            yield self._framed()
            yield from self._below(width)
            return
        # A heading may take a line for each word.
        numbers = [max(_width(heading.split()), _width(cells)) for heading, *cells in columns[1:]]
        beside = sum(numbers) + _GAP * len(numbers)
        left = min(_width(columns[0]), width - beside)
        yield Text(self.title, style="italic", justify="center")
        lines = [*self._head(left, numbers), "─" * (left + beside)] if left >= _width(self.headings[:1]) else []
        for name, *cells in self.rows:
            lines += self._lines(name, cells, left, numbers, width)
        lines += ["─" * (left + beside if left > 0 else width)] * bool(self.totals)
        for name, *cells in self.totals:
            lines += self._lines(name, cells, left, numbers, width)
        yield Text("\n".join(lines))
        yield from self._below(width)

    def _below(self, width: int) -> Iterator[Text]:
        from rich.text import Text

        if self.caption:
            yield Text(wrap(self.caption, width), style="italic")

    def _framed(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title)
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(Text, row))
        table.add_section()
        for row in self.totals:
            table.add_row(*map(Text, row), style="bold")
        return table

    def _head(self, left: int, numbers: Sequence[int]) -> list[str]:
        heads = [
            textwrap.wrap(heading, max(size, 1), break_long_words=False) or [""]
            for heading, size in zip(self.headings, (left, *numbers), strict=True)
        ]
        depth = max(map(len, heads))
        padded = ([""] * (depth - len(words)) + words for words in heads)
        return [_line(name, cells, left, numbers) for name, *cells in zip(*padded, strict=True)]

    def _lines(self, name: str, cells: Sequence[str], left: int, numbers: Sequence[int], width: int) -> list[str]:
        if left < _width(self.headings[:1]):  # the numbers are too wide for columns
            pairs = zip(self.headings[1:], cells, strict=True)
            together = ", ".join(f"{heading}\u00a0{cell}" for heading, cell in pairs if cell)
            return [name, wrap(together, width, indent=" " * _GAP).replace("\u00a0", " ")]
        if cell_width(name) <= left:
            return [_line(name, cells, left, numbers)]
        return [name, _line("", cells, left, numbers)]


def cell_width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    from rich.cells import cell_len

    return cell_len(text)


def _width(cells: Iterable[str]) -> int:
    return max(map(cell_width, cells), default=0)


def _line(name: str, cells: Sequence[str], left: int, numbers: Sequence[int]) -> str:
    padded = (" " * (_GAP + size - cell_width(cell)) + cell for cell, size in zip(cells, numbers, strict=True))
    return name + " " * (left - cell_width(name)) + "".join(padded)
