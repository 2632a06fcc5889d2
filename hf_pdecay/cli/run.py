"""``hf-pdecay run``: runs a script that does not know hf_pdecay, with the optimizers registered."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.usage = "hf-pdecay run SCRIPT ARGS…  |  hf-pdecay run -m MODULE ARGS…"
    parser.description = (
        "Runs a script as Python would, with optim='adamw_lp' known to TrainingArguments, HfArgumentParser "
        "and every Trainer: --optim adamw_lp --optim_args p_norm=0.8,target_sparsity=0.9. On several processes: "
        "accelerate launch -m hf_pdecay run SCRIPT ARGS…"
    )
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="a module and its arguments")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a script and its arguments")


def run(options: argparse.Namespace) -> Callable[[], int]:
    """Return a function that runs a script or module as ``__main__``, with its own argv, exit code and tracebacks."""
    words: list[str] = options.script if options.module is None else options.module
    if not words:
        raise ValueError("Name a script or module: hf-pdecay run SCRIPT ARGS…, or hf-pdecay run -m MODULE ARGS….")
    first = words[0]
    if options.module is not None:
        import runpy

        _first_on_path(os.getcwd())
        _check_module(first)
        return lambda: _run(lambda: runpy.run_module(first, run_name="__main__", alter_sys=True), words)
    if not Path(first).is_file():
        reason = "is a folder" if Path(first).is_dir() else "does not exist"
        raise ValueError(f"Invalid SCRIPT: {first!r} {reason}; name a Python script, or a module after -m.")

    def start() -> None:
        _first_on_path(os.path.dirname(os.path.realpath(first)))
        _run_script(os.path.abspath(first))

    return lambda: _run(start, words)


def _run(start: Callable[[], object], argv: list[str]) -> int:
    from ..trainer.register import register as register_optimizers

    register_optimizers(remind=True)
    sys.argv[:] = argv
    try:
        start()
    except BaseException as error:
        if not isinstance(error, SystemExit):
            _show_their_frames_only(error.__traceback__)
        raise
    return 0


def _run_script(path: str) -> None:
    """Run a script as Python itself does: in a ``__main__`` that stays, because exit handlers may need it."""
    main = ModuleType("__main__")
    # Without a spec, spawned processes import the script by its file.
    main.__dict__.update(__file__=path, __builtins__=__builtins__, __spec__=None, __cached__=None, __package__=None)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec")
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def _show_their_frames_only(traceback: TracebackType | None) -> None:
    """Make the traceback that ends the process begin in the script."""
    import runpy

    ours = (__file__, runpy.__file__, "<frozen runpy>")
    while traceback is not None and traceback.tb_frame.f_code.co_filename in ours:
        traceback = traceback.tb_next
    hook = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        hook(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = show


def _first_on_path(folder: str) -> None:
    """Put the folder where the interpreter puts that of a script which it runs."""
    if sys.version_info < (3, 11) or not sys.flags.safe_path:
        sys.path[0] = folder


def _check_module(name: str) -> None:
    import importlib.util

    for module in (name, f"{name}.__main__"):
        reason = "is not found" if module == name else "has no __main__, so it cannot be run"
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError) as error:  # of a parent, or of a module that has no spec
            raise ValueError(f"Invalid MODULE: the module {name!r} {reason} ({error}).") from error
        if spec is None:
            raise ValueError(f"Invalid MODULE: the module {name!r} {reason}; name one that python -m can run.")
        if spec.submodule_search_locations is None:
            return
