"""C++ functions that are compiled on first use: torch's Inductor finds the compiler and keeps the result on disk."""

from __future__ import annotations

import ctypes
import functools
import os
import time
from pathlib import Path

from ...terminal import get_logger


logger = get_logger(__name__)

# Inductor asks for traps and errno to be kept, drops the sign of zeros, and has GCC leave loops as they are.
_FLAGS = ("-fno-trapping-math", "-fno-math-errno", "-fsigned-zeros")
_GCC_FLAGS = ("-ftree-loop-vectorize",)


@functools.cache
def load(sources: tuple[Path, ...], who: str, what: str) -> tuple[ctypes.CDLL | None, str | None]:
    """Load C++ files, compiling them as one if necessary; return the library and None, or None and the reason why not.

    ``who`` names the caller and ``what`` the functions compute, for the log message.
    """
    started = time.time()
    try:
        # Inductor's parts below have no public names. Whatever they raise, a run goes on with plain torch operations.
        from torch._inductor.codecache import CppCodeCache
        from torch._inductor.cpp_builder import is_gcc

        text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
        flags = _FLAGS + (_GCC_FLAGS if is_gcc() else ())
        library: ctypes.CDLL = CppCodeCache.load_async(text, extra_flags=flags)()
    except Exception as error:
        lines = str(error).strip().splitlines()
        return None, f"its C++ source could not be compiled ({type(error).__name__}: {lines[0] if lines else ''})"
    seconds = time.time() - started
    if os.path.getmtime(library._name) >= started:
        folder = Path(library._name).parent
        logger.warning("%s compiled its %s in %.1f s. It is kept in %s.", who, what, seconds, folder)
    else:
        logger.info("%s loaded its compiled %s in %.1f s.", who, what, seconds)
    return library, None
