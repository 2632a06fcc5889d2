"""``hf-pdecay preview``: which weights a run would decay, and how many zeros it would reach."""

from __future__ import annotations

import argparse

from .command import add_config, add_json, add_max_steps, add_settings, given_settings, show


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "The param groups of a run with these settings, the zeros that its target comes to, and its "
        "pruning steps. Give the settings of the run as flags, or all in --optim_args. Weights are not loaded."
    )
    add_config(parser)
    parser.add_argument("--optim", default="adamw_lp", help="adamw_lp or another of ours (adamw_lp)")
    parser.add_argument("--optim_args", help="as in TrainingArguments: p_norm=0.8,target_sparsity=0.9")
    parser.add_argument("--optim_target_modules", nargs="+", metavar="PATTERN", help="as in TrainingArguments")
    add_settings(parser)
    add_max_steps(parser)
    parser.add_argument("--weight_decay", type=float, default=0.0, help="L2 decay of the run (0)")
    parser.add_argument("--tensors", action="store_true", help="list each tensor")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the preview."""
    from ..checks import check_choice
    from ..optim.optimizer_names import OPTIMIZERS
    from ..trainer.settings import DecaySettings
    from .run_preview import preview

    check_choice("optim", options.optim, OPTIMIZERS)
    targets = options.optim_target_modules
    settings = DecaySettings.from_optim_args(
        options.optim_args,
        targets[0] if targets and len(targets) == 1 else targets,
        options.optim,
        **given_settings(options),
    )
    steps, weight_decay = options.max_steps, options.weight_decay
    result = preview(options.model, settings, max_steps=steps, weight_decay=weight_decay, all_tensors=options.tensors)
    return show(result, options)
