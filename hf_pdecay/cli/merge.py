"""``hf-pdecay merge``: a base with the changes of several deltas."""

from __future__ import annotations

import argparse

from .command import add_json, show


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Writes the plain folder of a base with the changes of several deltas, and says how many weights they share."
    )
    parser.add_argument("base", metavar="BASE", help="the base of all deltas: a folder or a Hub name")
    parser.add_argument("deltas", metavar="DELTA", nargs="+", help="folders of deltas, at least two")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it appears when it is complete")
    parser.add_argument(
        "--shared",
        default="refuse",
        help="refuse, or average, weights to which deltas give different values (refuse)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a model's folder")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Merge deltas and print what they share."""
    from ..deltas.merging import merge_deltas

    overwrite, shared = options.overwrite, options.shared
    return show(merge_deltas(options.base, options.deltas, options.out, shared=shared, overwrite=overwrite), options)
