"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file aside and rename it, so that it appears whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the name of a file to write to, and rename it to ``path`` if the writing succeeds; makes the folder."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield aside
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete what had been written aside in a folder by processes that were killed before they could rename it."""
    for name in ("sparsity.json", "sparsity.jsonl", "sparsity.png", "README.md"):
        for aside in Path(folder).glob(f".{name}.*.tmp"):
            aside.unlink(missing_ok=True)
