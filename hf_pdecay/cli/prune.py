"""``hf-pdecay prune``: prunes a trained model without training it."""

from __future__ import annotations

import argparse

from .command import add_calibration, add_folders, given_calibration, show


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Prunes a trained model in minutes, without training: the matrices of its blocks get exactly the zeros asked "
        "for, chosen by what some text gives them as inputs. Training with --keep_zeros true can go on from OUT."
    )
    add_folders(parser)
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--sparsity", type=float, metavar="FRACTION", help="of zeros in each matrix, such as 0.5")
    amount.add_argument("--pattern", metavar="N:M", help="at most N of M consecutive inputs stay, such as 2:4")
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="text like that of the model's use: .txt or .jsonl, maybe .gz"
    )
    parser.add_argument(
        "--method",
        default="fisher",
        help="fisher: weights go where the model's predictions move least, by gradients, and the others make up for "
        "them (the default); sparsegpt: where each matrix's outputs move least, without gradients; wanda: the others "
        "stay as they are; magnitude: the smallest weights go",
    )
    add_calibration(parser)


def run(options: argparse.Namespace) -> int:
    """Prune a model and print what was pruned."""
    from ..one_shot.folder import prune_folder

    report = prune_folder(
        *(options.model, options.out, options.data),
        method=options.method,
        sparsity=options.sparsity,
        pattern=options.pattern,
        **given_calibration(options),
    )
    return show(report, options)
