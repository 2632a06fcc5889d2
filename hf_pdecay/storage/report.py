"""Result of a compression."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..tables import NameTable


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass
class EncodingTotal:
    """The tensors that are stored in one encoding: their number, and their bytes before and after compression."""

    tensors: int = 0
    before: int = 0
    after: int = 0


@dataclass
class StorageReport:
    """Bytes of a model's weights before and after, by encoding.

    Attributes:
        encodings: Totals for ``"dense"``, ``"bitmask"``, ``"index"`` and ``"codes"``, if there are any.
        headers: Bytes of the headers of the compressed files, with manifests.
        left_out: Files of weights in other formats, which were not copied.
        vanished: Values that were not zero, and are after rounding to a narrower dtype.
        zstd_saves: About how many bytes zstd would save, if it was not used because it is not installed.
    """

    encodings: dict[str, EncodingTotal] = field(default_factory=dict)
    headers: int = 0
    left_out: list[str] = field(default_factory=list)
    vanished: int = 0
    zstd_saves: int = 0

    def add(self, encoding: str, before: int, after: int) -> None:
        """Count a tensor."""
        total = self.encodings.setdefault(encoding, EncodingTotal())
        total.tensors += 1
        total.before += before
        total.after += after

    @property
    def before(self) -> int:
        """Bytes of all tensors in the plain model."""
        return sum(total.before for total in self.encodings.values())

    @property
    def after(self) -> int:
        """Bytes of the compressed files of weights, headers included."""
        return self.headers + sum(total.after for total in self.encodings.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {"before": self.before, "after": self.after, "headers": self.headers, **asdict(self)}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table, and the files that were left out."""
        from rich.text import Text

        table = NameTable("Bytes of the weights", ("encoding", "tensors", "before", "after", "share"))
        for name, total in sorted(self.encodings.items()):
            counts = (total.tensors, total.before, total.after)
            table.add_row(name, *(f"{count:,}" for count in counts), _share(total.after, total.before))
        table.add_row("headers", "", "", f"{self.headers:,}", _share(self.headers, self.before))
        tensors = sum(total.tensors for total in self.encodings.values())
        table.add_total("all", f"{tensors:,}", f"{self.before:,}", f"{self.after:,}", _share(self.after, self.before))
        yield table
        if self.vanished:
            yield f"{self.vanished:,} values were too small for the dtype and have become zero."
        if self.zstd_saves:
            share = _share(self.after - self.zstd_saves, self.before)
            yield Text(f"With zstandard installed it would be about {share}: pip install 'hf-pdecay[zstd]'.")
        if self.left_out:
            yield f"Left out, weights in other formats: {', '.join(self.left_out)}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
