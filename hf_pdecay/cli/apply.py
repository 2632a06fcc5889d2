"""``hf-pdecay apply``: the plain folder of a base with the changes of a delta."""

from __future__ import annotations

import argparse

from .command import add_json, show


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = "Writes the plain folder of a fine-tuned model from its base and its delta."
    parser.add_argument("base", metavar="BASE", help="the model before fine-tuning: a folder or a Hub name")
    parser.add_argument("delta", metavar="DELTA", help="a folder that hf-pdecay delta has written, or its Hub name")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it appears when it is complete")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a model's folder")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Apply a delta and print the report."""
    from ..storage.reader import decompress

    return show(decompress(options.delta, options.out, base=options.base, overwrite=options.overwrite), options)
