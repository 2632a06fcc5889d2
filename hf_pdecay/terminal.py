"""What is printed on a terminal: above progress bars, and with names whole."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import textwrap
from collections.abc import Iterable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeVar


if TYPE_CHECKING:
    from rich.console import Console


_T = TypeVar("_T")


@contextlib.contextmanager
def above_bars() -> Any:
    """Clear tqdm's progress bars while something is printed, and draw them again below it."""
    tqdm = sys.modules.get("tqdm")  # without an import there are no bars
    if tqdm is None or not hasattr(tqdm, "tqdm"):
        yield
        return
    with tqdm.tqdm.external_write_mode():
        yield


@contextlib.contextmanager
def encodable(file: Any) -> Any:
    """Write ``?`` to a text file for what its encoding does not have, such as λ where a console is not of UTF-8."""
    if not isinstance(file, io.TextIOWrapper):
        yield
        return
    before = file.errors
    # It flushes the file and asks for its place, which one that has become a pipe since may not have.
    with contextlib.suppress(OSError):
        file.reconfigure(errors="replace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.reconfigure(errors=before)


def progress(items: Iterable[_T], what: str, total: int, unit: str = "tensors") -> Iterable[_T]:
    """Iterate with a progress bar on stderr if that is a terminal and the work takes longer than a second."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    bar: Iterable[_T] = tqdm(items, desc=what, total=total, unit=f" {unit}", delay=1, leave=False, disable=None)
    return bar


def print_rich(result: Any, console: Console | None = None) -> None:
    """Print by rich, above progress bars; a name that is longer than a line goes beyond it, and is not broken."""
    from rich.console import Console

    console = console or Console(markup=False, emoji=False)
    parts = result.__rich_console__(console, console.options) if hasattr(result, "__rich_console__") else [result]
    with above_bars(), encodable(console.file):
        for part in parts:
            whole = wrap(part, console.width) if isinstance(part, str) else part
            console.print(whole, overflow="ignore", crop=False)


def wrap(text: str, width: int, indent: str = "") -> str:
    """Wrap a text between words; one that is longer than a line stays whole."""
    return textwrap.fill(
        *(text, width),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


class BarLogger(logging.LoggerAdapter):  # a subscript needs Python 3.11
    """A logger whose lines stand above progress bars, of the first process alone if a launcher started several."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Leave the message as it is."""
        return msg, kwargs

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        """Log above progress bars, in the first process."""
        if self.isEnabledFor(level) and os.environ.get("RANK", "0") == "0":
            with above_bars():
                self.logger.log(level, msg, *args, **kwargs)


def get_logger(name: str) -> BarLogger:
    """Return the logger of a module that logs during training."""
    return BarLogger(logging.getLogger(name), {})
