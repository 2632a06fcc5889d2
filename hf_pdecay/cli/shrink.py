"""``hf-pdecay shrink``: removes dead neurons, heads and ranks from a model."""

from __future__ import annotations

import argparse

from .command import add_folders, show


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Removes the neurons and attention heads that contribute nothing because their weights are zero. "
        "If every layer keeps the same number, the smaller model has an ordinary config and loads without hf_pdecay."
    )
    add_folders(parser)
    parser.add_argument(
        "--layers",
        default="uniform",
        help="uniform: every layer keeps the same number of units, with an ordinary config (the default); "
        "ragged: every layer keeps what is alive, and the model loads after import hf_pdecay",
    )
    parser.add_argument(
        "--multiple-of", type=int, default=1, metavar="N", help="keep a multiple of N neurons, such as 64 (1)"
    )


def run(options: argparse.Namespace) -> int:
    """Shrink a model and print what was removed."""
    from ..shrinking.folder import shrink_folder

    report = shrink_folder(
        options.model, options.out, layers=options.layers, multiple_of=options.multiple_of, overwrite=options.overwrite
    )
    return show(report, options)
