"""C++ functions that are compiled on first use: torch's Inductor finds the compiler and keeps the result on disk."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import getpass
import hashlib
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

from ...files import write_text
from ...terminal import get_logger


logger = get_logger(__name__)

# Inductor asks for traps and errno to be kept, drops the sign of zeros, and has GCC leave loops as they are.
_FLAGS = ("-fno-trapping-math", "-fno-math-errno", "-fsigned-zeros")
_GCC_FLAGS = ("-ftree-loop-vectorize",)


@functools.cache
def load(
    sources: tuple[Path, ...], who: str, what: str, *, compiling: bool = True
) -> tuple[ctypes.CDLL | None, str | None]:
    """Load C++ files, compiling them as one if necessary; return the library and None, or None and the reason why not.

    ``who`` names the caller and ``what`` the functions compute, for the log message. Without ``compiling``, only a
    library that was compiled before is loaded.
    """
    started = time.time()
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    record = _record(text)
    if record is not None:
        try:
            return ctypes.CDLL(record.read_text(encoding="utf-8")), None
        except OSError:  # none yet, or what it names was deleted
            pass
    if not compiling:
        return None, "it is not compiled yet"
    try:
        # Inductor's parts below have no public names. Whatever they raise, a run goes on with plain torch operations.
        from torch._inductor.codecache import CppCodeCache
        from torch._inductor.cpp_builder import is_gcc

        flags = _FLAGS + (_GCC_FLAGS if is_gcc() else ())
        library: ctypes.CDLL = CppCodeCache.load_async(text, extra_flags=flags)()
    except Exception as error:
        lines = str(error).strip().splitlines()
        return None, f"its C++ source could not be compiled ({type(error).__name__}: {lines[0] if lines else ''})"
    if record is not None:
        with contextlib.suppress(OSError):
            write_text(record, library._name)
    seconds = time.time() - started
    if os.path.getmtime(library._name) >= started:
        folder = Path(library._name).parent
        logger.warning("%s compiled its %s in %.1f s. It is kept in %s.", who, what, seconds, folder)
    else:
        logger.info("%s loaded its compiled %s in %.1f s.", who, what, seconds)
    return library, None


def _record(text: str) -> Path | None:
    """The file that names the compiled library, beside Inductor's, or None.

    Inductor finds its library again only after it has tried the processor's instructions in new processes, which takes
    seconds. The record holds for one release of torch, one compiler and one processor.
    """
    try:
        import torch

        if not _processor():
            return None
        config = getattr(sys.modules.get("torch._inductor.config"), "cpp", None)
        settings = str(getattr(config, "simdlen", None)), os.environ.get("CXX", "")
        facts = (text, *_FLAGS, *_GCC_FLAGS, *settings, torch.__version__, _processor())
        # Inductor's own function for its folder comes with imports that take a second.
        default = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
        folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default)
        return folder / "hf_pdecay" / hashlib.sha256("\0".join(facts).encode()).hexdigest()
    except (ImportError, KeyError, OSError):  # a user without a name
        return None


@functools.cache
def _processor() -> str:
    """The name of the processor and its instructions, or an empty string where Linux does not say it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.findall(r"^(?:flags|Features|model name|CPU part)\b.*", lines, re.MULTILINE)
    return "".join(sorted({platform.machine(), *found})) if found else ""
