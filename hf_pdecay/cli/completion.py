"""``hf-pdecay completion``: a script by which a shell completes the commands and their flags."""

from __future__ import annotations

import argparse


SHELLS = ("bash", "zsh", "fish", "tcsh")


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Prints a script by which a shell completes the commands and their flags. For bash: "
        'eval "$(hf-pdecay completion bash)" in ~/.bashrc.'
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")


def run(options: argparse.Namespace) -> int:
    """Print the script; ValueError if shtab, which writes it, is missing."""
    try:
        import shtab
    except ImportError:
        raise ValueError("It needs shtab: pip install shtab, or the extra 'completion' of hf-pdecay.") from None
    from .main import build_parser

    options.stdout.write(shtab.complete(build_parser(), options.shell) + "\n")
    return 0
