"""The file ``sparsity.jsonl``: one line of JSON for each log event of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


HISTORY_FILE = "sparsity.jsonl"

PICTURE_FILE = "sparsity.png"


def read_history(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of ``sparsity.jsonl`` in a folder; a last line cut short by a crash is left out."""
    path = Path(output_dir) / HISTORY_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # What follows the last newline is either nothing or a line that was not finished.
    return [json.loads(line) for line in lines[:-1]]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line of JSON to a file, whole or not at all; makes the file and its folder.

    Raises:
        OSError: If it cannot be written, as on a full disk; the file is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        text = f"{json.dumps(line)}\n".encode()
        try:
            while text:  # a disk that is nearly full takes a part
                text = text[file.write(text) :]
        except OSError:
            file.truncate(before)
            raise
