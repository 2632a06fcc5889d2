"""``hf-pdecay decompress``: restores the plain folder of a compressed model."""

from __future__ import annotations

import argparse

from .command import Commands, add_folders, show


name = "decompress"


def register(commands: Commands) -> None:
    """Add the command to the parser."""
    text = "restore the plain folder of a compressed model"
    add_folders(parser := commands.add_parser(name, help=text, description=f"{text.capitalize()}."))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Decompress a model and print the report."""
    from ..storage.reader import decompress

    return show(decompress(options.model, options.out, overwrite=options.overwrite))
