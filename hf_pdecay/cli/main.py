"""The command line: ``hf-pdecay COMMAND …``, or ``python -m hf_pdecay COMMAND …``.

Each command is a module of its name with ``register``, which adds its arguments to a parser, and ``run``, which imports
what it needs. Only the command that is asked for is imported; ``--help`` imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib import import_module
from typing import TextIO

from .._version import __version__
from ..terminal import encodable, wrap
from .command import spelled


_COMMANDS = {
    "run": "run a script that knows nothing of hf_pdecay, with --optim adamw_lp known to it",
    "preview": "say which weights of a model a run would decay, by which rule, and how many zeros that gives",
    "estimate": "say what training a model takes, in memory and communication, without loading its weights",
    "env": "print versions, devices and the backend of the step, ready to paste into a bug report",
    "report": "say how sparse a saved model is, or draw the Pareto front of a hyperparameter search",
    "check": "say which zeros of a model a quantiser or another tool filled in; exit code 1 if any",
    "compress": "write a model without its zeros; from_pretrained gives it back after import hf_pdecay",
    "decompress": "restore the plain folder of a compressed model",
    "delta": "write only the weights in which a fine-tuned model differs from its base",
    "apply": "write the plain folder of a base with the changes of a delta",
    "merge": "write the plain folder of a base with the changes of several deltas",
    "prune": "prune a trained model in minutes without training: by gradients, SparseGPT, Wanda or magnitude",
    "quantize": "round the weights of a trained model to 8, 4 or 2 bits, by GPTQ or to nearest, and keep every zero",
    "shrink": "remove dead neurons and attention heads from a model, which then loads anywhere as a smaller one",
    "completion": "print a script by which bash, zsh, fish or tcsh completes commands and flags",
}

_EXAMPLES = {
    "run": "hf-pdecay run --target_sparsity 0.9 train.py --model_name_or_path gpt2",
    "preview": "hf-pdecay preview gpt2 --target_sparsity 0.9 --max_steps 2000",
    "estimate": "hf-pdecay estimate --parameters 8e9 --layout fsdp2 --gpus 8",
    "env": "hf-pdecay env",
    "report": "hf-pdecay report output/checkpoint-2000",
    "check": "hf-pdecay check output quantized",
    "compress": "hf-pdecay compress output compressed --dtype bfloat16",
    "decompress": "hf-pdecay decompress compressed plain",
    "delta": "hf-pdecay delta base output delta",
    "apply": "hf-pdecay apply base delta plain",
    "merge": "hf-pdecay merge base delta other_delta merged --shared average",
    "prune": "hf-pdecay prune gpt2 pruned --sparsity 0.5 --data text.jsonl",
    "quantize": "hf-pdecay quantize pruned quantized --bits 4 --data text.jsonl",
    "shrink": "hf-pdecay shrink output smaller --multiple-of 64",
    "completion": "hf-pdecay completion bash",
}

_WITH_SETTINGS = ("run", "preview")

# Exit codes: for invalid arguments, as in argparse; for errors of the system or the Hub; and for Ctrl-C, as in shells.
_USAGE, _SYSTEM, _INTERRUPTED = 2, 1, 130


class _Formatter(argparse.HelpFormatter):
    """Wraps between words, so that flags stay whole, and leaves indented lines, such as an example, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(line if line.startswith(" ") else wrap(line, width) for line in text.splitlines())

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(" ".join(text.split()), width).splitlines()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (None for that of the process); return the exit code, with errors on stderr."""
    words = sys.argv[1:] if argv is None else argv
    with encodable(sys.stdout), encodable(sys.stderr):
        done = _command(words)
    # A user's script runs outside of what handles our errors: its own keep their words.
    return done() if callable(done) else done


def _command(words: Sequence[str]) -> int | Callable[[], int]:
    """Run a command and handle the errors of its output; return as :func:`_run` does."""
    stdout = sys.stdout
    try:
        try:
            # What libraries print while they are imported or at work must not stand within the JSON.
            with contextlib.redirect_stdout(sys.stderr) if "--json" in words else contextlib.nullcontext():
                done = _run(words, stdout)
        finally:
            stdout.flush()
    except BrokenPipeError:
        # The reader has enough, as head has. What is left in the buffer must not fail when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        return _SYSTEM
    except KeyboardInterrupt:
        sys.stderr.write("hf-pdecay: interrupted\n")
        return _INTERRUPTED
    return done


def build_parser(asked: Collection[str] = tuple(_COMMANDS)) -> argparse.ArgumentParser:
    """Return the parser; only the commands in ``asked`` are imported and have their arguments."""
    parser = argparse.ArgumentParser(
        prog="hf-pdecay",
        description="Sparse models from ordinary training.",
        epilog="hf-pdecay COMMAND --help has the arguments of a command and an example.",
    )
    parser.add_argument("--version", action="version", version=f"hf-pdecay {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        epilog = f"example:\n  {_EXAMPLES[name]}"
        command = commands.add_parser(name, help=summary, epilog=epilog, formatter_class=_Formatter)
        if name in asked:
            module = import_module(f".{name}", __package__)
            module.register(command)
            command.set_defaults(run=module.run, parser=command)
    return parser


def _run(words: Sequence[str], stdout: TextIO) -> int | Callable[[], int]:
    """Run a command, whose JSON goes to ``stdout``; return the exit code, or what must run last."""
    asked = next((word for word in words if not word.startswith("-")), None)
    parser = build_parser([] if asked is None else [asked])
    if asked is not None and asked not in _COMMANDS:
        parser.error(f"unknown command {asked!r}{_meant(asked, _COMMANDS) or '; choose from ' + ', '.join(_COMMANDS)}")
    if asked in _WITH_SETTINGS and words[0] == asked:
        try:
            words = [asked, *spelled(words[1:], until_script=asked == "run")]
        except ValueError as error:
            sys.stderr.write(f"hf-pdecay {asked}: {error}\n")
            return _USAGE
    options, unknown = parser.parse_known_args(words)
    if unknown:
        flags = options.parser._option_string_actions if options.command else ["--version", "--help"]
        hint = "".join(dict.fromkeys(_meant(word.partition("=")[0], flags) for word in unknown if word[:1] == "-"))
        if options.command == "run":
            hint += "; a script's own arguments come after its name: hf-pdecay run SCRIPT ARGS…"
        asked_parser = options.parser if options.command else parser
        asked_parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if options.command is None:
        parser.print_help()
        return 0
    options.stdout = stdout
    try:
        done: int | Callable[[], int] = options.run(options)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        sys.stderr.write(f"hf-pdecay {options.command}: {error}\n")
        return _USAGE if isinstance(error, ValueError) else _SYSTEM
    return done


def _meant(word: str, known: Iterable[str]) -> str:
    """Ask whether a word that is like a given one was meant; empty if none is."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
