"""The command line: ``hf-pdecay COMMAND …``, or ``python -m hf_pdecay COMMAND …``.

Each command is a module of its name with ``register``, which adds its arguments to a parser, and ``run``, which imports
what it needs. Only the command that is asked for is imported; ``--help`` imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from .._version import __version__


_COMMANDS = {
    "run": "run a script that knows nothing of hf_pdecay, with --optim adamw_lp known to it",
    "preview": "say which weights of a model a run would decay, by which rule, and how many zeros that gives",
    "estimate": "say what training a model takes, in memory and communication, without loading its weights",
    "env": "print versions, devices and the backend of the step, ready to paste into a bug report",
    "report": "say how sparse a saved model is, or draw the Pareto front of a hyperparameter search",
    "compress": "write a model without its zeros; from_pretrained gives it back after import hf_pdecay",
    "decompress": "restore the plain folder of a compressed model",
    "shrink": "remove dead neurons and attention heads from a model, which then loads anywhere as a smaller one",
}

# Exit codes: for invalid arguments, as in argparse, and for errors of the system or the Hub.
_USAGE, _SYSTEM = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (None for that of the process); return the exit code, with errors on stderr."""
    parser = argparse.ArgumentParser(prog="hf-pdecay", description="Sparse models from ordinary training.")
    parser.add_argument("--version", action="version", version=f"hf-pdecay {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    words = sys.argv[1:] if argv is None else argv
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name == asked:
            module = import_module(f".{name}", __package__)
            module.register(command)
            command.set_defaults(run=module.run)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = "; a script's own arguments come after its name: hf-pdecay run SCRIPT ARGS…"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint if options.command == 'run' else ''}")
    try:
        done: int | Callable[[], int] = options.run(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"hf-pdecay {options.command}: {error}\n")
        return _USAGE if isinstance(error, ValueError) else _SYSTEM
    # A user's script runs outside of the try: its errors keep their own words.
    return done() if callable(done) else done
