"""What shrinking came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class LayerCount:
    """The groups of a layer.

    Args:
        name: The layer's module.
        kind: ``"neuron"``, ``"head"`` or, in an adapter, ``"rank"``; with grouped queries a head is one of keys and
            values.
        groups: How many there were.
        dead: How many of them contributed nothing.
        kept: How many are left.
    """

    name: str
    kind: str
    groups: int
    dead: int
    kept: int


@dataclass
class ShrinkReport:
    """What is left of a model; prints as a table.

    Attributes:
        layers: One entry for the neurons or heads of each layer.
        parameters: Number of weights before and after.
        bytes: Bytes of the files of weights before and after; None for a model in memory.
        config: What the config says now.
        notes: Sentences about what was not cut.
        left_out: Files with weights in other formats, which were not copied.
    """

    layers: list[LayerCount] = field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def removed(self, kind: str) -> int:
        """Return how many groups of a kind were cut."""
        return sum(each.groups - each.kept for each in self.layers if each.kind == kind)

    @property
    def shrunk(self) -> bool:
        """Whether anything was cut."""
        return any(each.kept < each.groups for each in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {
            "layers": [vars(each).copy() for each in self.layers],
            "parameters": list(self.parameters),
            "bytes": None if self.bytes is None else list(self.bytes),
            "config": dict(self.config),
            "notes": list(self.notes),
            "left_out": list(self.left_out),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table and sentences."""
        from rich.table import Table

        kinds = dict.fromkeys(f"{each.kind}s" for each in self.layers)
        table = Table(title=" and ".join(kinds).capitalize())
        table.add_column("layer", overflow="fold")
        table.add_column("of")
        for heading in ("before", "dead", "removed", "kept"):
            table.add_column(heading, justify="right")
        for each in self.layers:
            removed = each.groups - each.kept
            table.add_row(
                each.name, f"{each.kind}s", f"{each.groups:,}", f"{each.dead:,}", f"{removed:,}", f"{each.kept:,}"
            )
        yield table
        yield _change("parameters", *self.parameters)
        if self.bytes is not None:
            yield _change("bytes of weights", *self.bytes)
        if self.config:
            yield f"config: {', '.join(f'{key} {value}' for key, value in self.config.items())}"
        yield from self.notes
        if self.left_out:
            yield f"Left out, weights in other formats: {', '.join(self.left_out)}"


def _change(what: str, before: int, after: int) -> str:
    return f"{what}: {before:,} → {after:,} ({after / before:.1%})"
