"""Files that are written completely or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, see :func:`written_aside`."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the name of a temporary file, and rename it to ``path`` if writing succeeds; creates the folder."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        yield aside
        aside.replace(final)
    finally:
        aside.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Delete what killed processes left of :func:`written_aside` in a folder, for files of these names."""
    for name in names:
        for aside in Path(folder).glob(f".{name}.*.tmp"):
            aside.unlink(missing_ok=True)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line of JSON to a file; creates it and its folder, and leaves it unchanged after an OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        text = f"{json.dumps(line)}\n".encode()
        try:
            while text:  # a disk that is nearly full takes only some of it
                text = text[file.write(text) :]
        except OSError:
            file.truncate(before)
            raise
