"""The command line: ``hf-pdecay COMMAND …``, or ``python -m hf_pdecay COMMAND …``.

Each command is a module with a ``name``, ``register``, which adds its parser, and ``run``, which imports what it needs:
``--help`` imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from .._version import __version__
from . import compress, decompress, env, estimate, preview, report, run, shrink


_COMMANDS = (run, preview, estimate, env, report, compress, decompress, shrink)

# Exit codes: for invalid arguments, as in argparse, and for errors of the system or the Hub.
_USAGE, _SYSTEM = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Its words; those of the process if None.

    Returns:
        The exit code: 0 on success, 2 for invalid arguments, 1 for system or Hub errors; the message goes to stderr.
    """
    parser = argparse.ArgumentParser(prog="hf-pdecay", description="Sparse models from ordinary training.")
    parser.add_argument("--version", action="version", version=f"hf-pdecay {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.register(commands)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = "; the script and its arguments come first: hf-pdecay run SCRIPT ARGS…"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint if options.command == run.name else ''}")
    try:
        done: int | Callable[[], int] = options.run(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"hf-pdecay {options.command}: {error}\n")
        return _USAGE if isinstance(error, ValueError) else _SYSTEM
    # A user's script runs outside of the try: its errors keep their own words.
    return done() if callable(done) else done
