"""``hf-pdecay preview``: which weights a run would decay, and how many zeros it would reach."""

from __future__ import annotations

import argparse

from .command import Commands, add_config, add_json, add_max_steps, show


name = "preview"


def register(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        name,
        help="say which weights of a model a run would decay, by which rule, and how many zeros come of it",
        description="The param groups of a run with these settings, the zeros that its target comes to, and its "
        "pruning steps. Give the settings of the run as flags, or all in --optim_args. Weights are not loaded.",
    )
    add_config(parser)
    parser.add_argument("--optim", default="adamw_lp", help="adamw_lp or another of ours (adamw_lp)")
    parser.add_argument("--optim_args", help="as in TrainingArguments: p_norm=0.8,target_sparsity=0.9")
    parser.add_argument("--optim_target_modules", nargs="+", help="as in TrainingArguments")
    for setting in ("target_sparsity", "p_norm", "p_norm_begin", "lambda_p", "sparsity_begin", "sparsity_end"):
        parser.add_argument(f"--{setting}", type=float)
    for setting in ("lp_rules", "sparsity_schedule", "sparsity_budget"):
        parser.add_argument(f"--{setting}")
    add_max_steps(parser)
    parser.add_argument("--weight_decay", type=float, default=0.0, help="L2 decay of the run (0)")
    parser.add_argument("--tensors", action="store_true", help="list each tensor")
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the preview."""
    from dataclasses import replace

    from ..checks import check_choice
    from ..optim.named import OPTIMIZERS
    from ..trainer.settings import SETTINGS, DecaySettings
    from .run_preview import preview

    check_choice("optim", options.optim, OPTIMIZERS)
    targets = options.optim_target_modules
    settings = DecaySettings.from_optim_args(
        options.optim_args, targets[0] if targets and len(targets) == 1 else targets, options.optim
    )
    flags = {setting: value for setting in SETTINGS if (value := getattr(options, setting, None)) is not None}
    result = preview(
        options.model,
        replace(settings, **flags),
        max_steps=options.max_steps,
        weight_decay=options.weight_decay,
        all_tensors=options.tensors,
    )
    return show(result, options.json)
