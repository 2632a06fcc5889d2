"""``hf-pdecay compress``: stores a model without its zeros."""

from __future__ import annotations

import argparse
import sys

from .command import add_folders, show


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = "Writes a model without its zeros. After import hf_pdecay, from_pretrained gives it back."
    add_folders(parser)
    parser.add_argument(
        "--dtype", help="round the weights to bfloat16 or float16 first (they keep their dtype); zeros stay zeros"
    )
    parser.add_argument(
        "--zstd",
        action=argparse.BooleanOptionalAction,
        help="compress by zstd too; needs zstandard, here and where the model is loaded (if it is installed)",
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of a file, such as 5GB (as the model has it)")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload OUT to this repository of the Hub")


def run(options: argparse.Namespace) -> int:
    """Compress a model, print the report, and upload the folder if asked to."""
    from ..storage.writer import compress

    model, out, shard_size = options.model, options.out, options.max_shard_size
    report = compress(
        *(model, out),
        dtype=options.dtype,
        zstd=options.zstd,
        max_shard_size=shard_size,
        overwrite=options.overwrite,
    )
    show(report, options)
    if options.push_to_hub is not None:
        from ..storage.hub import push_to_hub

        sys.stdout.write(f"{push_to_hub(options.out, options.push_to_hub)}\n")
    return 0
