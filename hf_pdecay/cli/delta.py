"""``hf-pdecay delta``: the weights in which a fine-tuned model differs from its base."""

from __future__ import annotations

import argparse

from .command import add_json, show


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Writes the weights of a fine-tuned model that are not those of its base. After import hf_pdecay, "
        "from_pretrained gives the fine-tuned model back, bit-identical."
    )
    parser.add_argument("base", metavar="BASE", help="the model before fine-tuning: a folder or a Hub name")
    parser.add_argument("tuned", metavar="TUNED", help="the fine-tuned model")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it appears when it is complete")
    parser.add_argument(
        "--base_name", metavar="NAME", help="what OUT calls its base, such as its Hub name (the way from OUT to BASE)"
    )
    parser.add_argument(
        "--zstd",
        action=argparse.BooleanOptionalAction,
        help="compress by zstd too; needs zstandard, here and where the delta is used (if it is installed)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a model's folder")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload OUT to this repository of the Hub")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Write a delta, print what it changes, and upload the folder if asked to."""
    from ..deltas.writing import write_delta

    report = write_delta(
        *(options.base, options.tuned, options.out),
        base_name=options.base_name,
        zstd=options.zstd,
        overwrite=options.overwrite,
    )
    show(report, options)
    if options.push_to_hub is not None:
        from ..storage.hub import push_to_hub

        push_to_hub(options.out, options.push_to_hub, commit_message="Upload a delta")
    return 0
