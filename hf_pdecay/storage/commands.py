"""The commands ``hf-pdecay compress`` and ``hf-pdecay decompress``."""

from __future__ import annotations

import argparse
import sys

from .hub import push_to_hub
from .reader import decompress
from .report import StorageReport
from .writer import compress


def run_compress(options: argparse.Namespace) -> int:
    """Compress a model as asked for, print the table, and upload it if asked for."""
    report = compress(
        options.model,
        options.out,
        zstd=options.zstd,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    _print(report)
    if options.push_to_hub is not None:
        sys.stdout.write(f"{push_to_hub(options.out, options.push_to_hub)}\n")
    return 0


def run_decompress(options: argparse.Namespace) -> int:
    """Give a plain model back, and print the table."""
    _print(decompress(options.model, options.out, overwrite=options.overwrite))
    return 0


def _print(report: StorageReport) -> None:
    from rich.console import Console

    Console(markup=False, emoji=False).print(report)
    if report.left_out:
        sys.stdout.write(f"Left out, weights in other formats: {', '.join(report.left_out)}\n")
