"""The file ``sparsity.jsonl``: one line of JSON for each log event of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .file_names import HISTORY_FILE


def read_history(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of ``sparsity.jsonl`` in a folder, without an incomplete last line, which a crash may leave."""
    path = Path(output_dir) / HISTORY_FILE
    if not path.is_file():
        return []
    # After the last newline there is nothing, or an incomplete line.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
