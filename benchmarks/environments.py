"""Virtual environments with pinned packages, for tools that do not share ours."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path


CPU_BUILDS = "https://download.pytorch.org/whl/cpu"


def python_with(packages: Sequence[str]) -> Path:
    """Return the interpreter of an environment with these packages, made once in the folder for temporary files.

    On Linux torch is its build for CPUs, without the gigabytes of CUDA: from the indexes of pip's settings if they have
    it, else from PyTorch's own.

    Args:
        packages: As pip takes them, with versions.
    """
    names = [f"{name}+cpu" if _is_torch(name) and sys.platform == "linux" else name for name in packages]
    key = hashlib.sha256("\n".join([sys.version, *names]).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"hf_pdecay_{key}"
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not (folder / "complete").is_file():
        print(f"Installing {', '.join(names)} ...", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        words = [str(python), "-m", "pip", "install", "-q", *names]
        if subprocess.run(words, capture_output=True).returncode:
            subprocess.run([*words, "--extra-index-url", CPU_BUILDS], check=True)
        (folder / "complete").touch()
    return python


def _is_torch(package: str) -> bool:
    return package.startswith("torch==")
