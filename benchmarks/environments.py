"""Virtual environments with pinned packages, for tools that do not share ours."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path


def python_with(packages: Sequence[str]) -> Path:
    """Return the interpreter of an environment with these packages, made once in the folder for temporary files.

    Args:
        packages: As pip takes them, with versions. pip must find a torch for this machine.
    """
    key = hashlib.sha256("\n".join([sys.version, *packages]).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"hf_pdecay_{key}"
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not (folder / "complete").is_file():
        print(f"Installing {', '.join(packages)} ...", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        (folder / "complete").touch()
    return python
