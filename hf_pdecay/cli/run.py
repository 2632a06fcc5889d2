"""``hf-pdecay run``: runs a script that does not know hf_pdecay, with the optimizers registered."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from ..trainer.training_flags import SETTINGS, take_settings
from .command import add_settings, given_settings


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.usage = "hf-pdecay run [SETTINGS] SCRIPT ARGS…\n       hf-pdecay run [SETTINGS] -m MODULE ARGS…"
    parser.description = (
        "Runs a script as Python would, with optim='adamw_lp' known to TrainingArguments, HfArgumentParser and every "
        "Trainer. Settings of the decay stand before the script, among its arguments, in its file of options, or in "
        "its --optim_args p_norm=0.8,target_sparsity=0.9; except with the last, adamw_lp is the default optimizer. "
        "On several processes, of GPUs or a CPU: accelerate launch --multi_gpu --num_processes 2 -m hf_pdecay run "
        "SCRIPT ARGS…"
    )
    add_settings(parser)
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="a module and its arguments")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a script and its arguments")


def run(options: argparse.Namespace) -> Callable[[], int]:
    """Return a function that runs a script or module as ``__main__``, with its own argv, exit code and tracebacks."""
    words: list[str] = options.script if options.module is None else options.module
    given = given_settings(options)
    if not words:
        raise ValueError("Name a script or module: hf-pdecay run SCRIPT ARGS…, or hf-pdecay run -m MODULE ARGS….")
    first = words[0]
    if options.module is not None:
        import runpy

        _first_on_path(os.getcwd())
        _check_module(first)
        return lambda: _run(lambda: runpy.run_module(first, run_name="__main__", alter_sys=True), words, given)
    if not Path(first).is_file():
        reason = "is a folder" if Path(first).is_dir() else "does not exist"
        raise ValueError(f"Invalid SCRIPT: {first!r} {reason}; name a Python script, or a module after -m.")

    def start() -> None:
        _first_on_path(os.path.dirname(os.path.realpath(first)))
        _run_script(os.path.abspath(first))

    return lambda: _run(start, words, given)


def _run(start: Callable[[], object], argv: list[str], given: dict[str, str]) -> int:
    from ..trainer.register import register as register_optimizers
    from ..trainer.settings import GIVEN

    register_optimizers(remind=True)
    GIVEN.update(given)
    GIVEN.unparsed = argv[1:]
    _take_settings()
    sys.argv[:] = argv
    try:
        start()
        _tell_unread(argv[0])
    except BaseException as error:
        if isinstance(error, ValueError) and _is_ours(error):
            sys.stderr.write(f"hf-pdecay run: {error}\n")
            return 2
        if not isinstance(error, SystemExit):
            _show_their_frames_only(error.__traceback__)
        raise
    return 0


def _tell_unread(script: str) -> None:
    """Say so if a script has ended without arguments of a run, so that nothing has read the settings."""
    from ..trainer.settings import GIVEN

    unread = GIVEN | take_settings(GIVEN.unparsed)[0]
    if unread and not GIVEN.was_read and os.environ.get("RANK", "0") == "0":
        flags = " ".join(f"--{name}={string}" for name, string in unread.items())
        sys.stderr.write(f"hf-pdecay run: {script} made no TrainingArguments, so nothing has read {flags}.\n")


def _is_ours(error: BaseException) -> bool:
    """Whether an error was raised by this package, as one on a setting is."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return Path(frames[-1]).is_relative_to(Path(__file__).parents[1])


def _take_settings() -> None:
    """Take the settings of the decay out of what a script's parser does not know, in argv and in files of options."""
    import transformers.hf_argparser  # noqa: F401 - a subclass

    argparse.ArgumentParser.parse_known_args = _from_words(argparse.ArgumentParser.parse_known_args)  # type: ignore[method-assign]

    def adopt(cls: Any) -> None:
        for name, taking in (("parse_dict", _from_file), ("set_defaults_with_config", _from_config)):
            if name in vars(cls):
                setattr(cls, name, taking(getattr(cls, name)))

    # TRL has an HfArgumentParser of its own, and its module is imported later.
    argparse.ArgumentParser.__init_subclass__ = classmethod(adopt)  # type: ignore[assignment]
    known = argparse.ArgumentParser.__subclasses__()
    while known:
        cls = known.pop()
        adopt(cls)
        known += cls.__subclasses__()


def _from_words(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Take the settings of the decay out of the words that a script's parser does not know."""
    from ..trainer.settings import GIVEN

    @functools.wraps(stock)
    def parse_known_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None, **more: Any) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        whole = args is None or (bool(words) and set(words) <= {*sys.argv})
        if not _passes_on(self):  # else the words may be for the script that it starts
            taken, words = take_settings(words, _flags(self))
            GIVEN.update(taken)
        options, unknown = stock(self, words, namespace, **more)
        if whole:
            GIVEN.unparsed = [*unknown]
        return options, unknown

    return parse_known_args


def _from_file(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def parse_dict(self: Any, args: dict[str, Any], *rest: Any, **kwargs: Any) -> Any:
        known = {field.name for kind in self.dataclass_types for field in dataclasses.fields(kind)}
        return stock(self, _without_ours(args, known), *rest, **kwargs)

    return parse_dict


def _from_config(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def set_defaults_with_config(self: Any, **config: Any) -> Any:
        return stock(self, **_without_ours(config, {action.dest for action in self._actions}))

    return set_defaults_with_config


def _subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [command for group in groups for command in group.choices.values()]


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    """The flags that a parser and its subparsers know."""
    return {*parser._option_string_actions}.union(*map(_flags, _subparsers(parser)))


def _passes_on(parser: argparse.ArgumentParser) -> bool:
    """Whether a parser takes all that is left as the words of another command."""
    remainder = any(action.nargs == argparse.REMAINDER for action in parser._actions)
    return remainder or any(map(_passes_on, _subparsers(parser)))


def _without_ours(options: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Take the settings of the decay out of a file's options, unless the parser knows them; the command line wins."""
    from ..trainer.settings import GIVEN

    ours = {name: value for name, value in options.items() if name in SETTINGS and name not in known}
    for name, value in ours.items():
        if value is not None:
            GIVEN.setdefault(name, json.dumps(value) if isinstance(value, Mapping) else str(value))
    return {name: value for name, value in options.items() if name not in ours}


def _run_script(path: str) -> None:
    """Run a script as Python itself does: in a ``__main__`` that stays, because exit handlers may need it."""
    main = ModuleType("__main__")
    # Without a spec, spawned processes import the script by its file.
    main.__dict__.update(__file__=path, __builtins__=__builtins__, __spec__=None, __cached__=None, __package__=None)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec")
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def _show_their_frames_only(trace: TracebackType | None) -> None:
    """Make the traceback that ends the process begin in the script."""
    import runpy

    ours = (__file__, runpy.__file__, "<frozen runpy>")
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    hook = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        hook(kind, error.with_traceback(trace), trace)

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
