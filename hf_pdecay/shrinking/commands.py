"""The command ``hf-pdecay shrink``."""

from __future__ import annotations

import argparse
import sys

from .folder import shrink_folder


def run_shrink(options: argparse.Namespace) -> int:
    """Shrink a model as asked for, and print what was cut."""
    from rich.console import Console

    report = shrink_folder(
        options.model,
        options.out,
        layers=options.layers,
        multiple_of=options.multiple_of,
        overwrite=options.overwrite,
    )
    Console(markup=False, emoji=False).print(report)
    if report.left_out:
        sys.stdout.write(f"Left out, weights in other formats: {', '.join(report.left_out)}\n")
    return 0
