"""``hf-pdecay check``: which zeros of a model are kept by what was done to it."""

from __future__ import annotations

import argparse

from .command import add_json, show


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Compares the places of zeros in two models, tensor by tensor: which zeros a quantiser or another tool filled "
        "in, which new ones it made, and where NaN or infinity appeared. The exit code is 1 if a zero was filled in or "
        "NaN or infinity appeared, else 0, and 2 for models that cannot be compared."
    )
    parser.add_argument("before", metavar="BEFORE", help="a folder or file in safetensors, plain or compressed")
    parser.add_argument(
        "after",
        metavar="AFTER",
        help="the same, or what transformers loads: a folder with a quantization_config, or a .gguf file",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the comparison; return 1 if a zero was filled in or NaN or infinity appeared."""
    from .zero_check import check_zeros

    comparison = check_zeros(options.before, options.after)
    show(comparison, options)
    return int(comparison.is_damaged)
