"""Result of shrinking a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..tables import NameTable


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class LayerCount:
    """The units of a layer.

    Args:
        name: The layer's module.
        kind: ``"neuron"``, ``"head"`` (with grouped queries, of keys and values) or, in an adapter, ``"rank"``.
        units: Number of units before.
        dead: Number of dead ones among them.
        kept: Number of units left.
    """

    name: str
    kind: str
    units: int
    dead: int
    kept: int


@dataclass
class ShrinkReport:
    """What a model has lost and kept; prints as a table.

    Attributes:
        layers: One entry for the units of each layer.
        parameters: Number of weights before and after.
        bytes: Bytes of the files of weights before and after; None for a model in memory.
        config: The new values of the config.
        notes: Sentences about what was not removed.
        left_out: Files of weights in other formats, which were not copied.
    """

    layers: list[LayerCount] = field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def removed(self, kind: str) -> int:
        """Return the number of removed units of a kind."""
        return sum(layer.units - layer.kept for layer in self.layers if layer.kind == kind)

    @property
    def shrunk(self) -> bool:
        """Whether anything was removed."""
        return any(layer.kept < layer.units for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        sizes = None if self.bytes is None else list(self.bytes)
        return asdict(self) | {"parameters": list(self.parameters), "bytes": sizes}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table and sentences."""
        kinds = dict.fromkeys(f"{layer.kind}s" for layer in self.layers)
        table = NameTable(" and ".join(kinds).capitalize(), ("layer", "of", "before", "dead", "removed", "kept"))
        for layer in self.layers:
            counts = (layer.units, layer.dead, layer.units - layer.kept, layer.kept)
            table.add_row(layer.name, f"{layer.kind}s", *(f"{count:,}" for count in counts))
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
