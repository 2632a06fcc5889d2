"""``hf-pdecay decompress``: restores the plain folder of a compressed model."""

from __future__ import annotations

import argparse

from .command import add_folders, show


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = "Restores the plain folder of a compressed model."
    add_folders(parser)


def run(options: argparse.Namespace) -> int:
    """Decompress a model and print the report."""
    from ..storage.reader import decompress

    return show(decompress(options.model, options.out, overwrite=options.overwrite), options)
