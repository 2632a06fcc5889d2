"""The command line: ``hf-pdecay COMMAND …``, or ``python -m hf_pdecay COMMAND …``.

A command is a function that adds its parser and one that does it, which imports what it needs: help comes at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .._version import __version__


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

# Exit codes of what cannot be done as it was asked for, as argparse has it, and of what the system or the Hub refuses.
_USAGE, _SYSTEM = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Its words; those of the process if None.

    Returns:
        The exit code: 0, or 2 for a wrong argument and 1 for what the system or the Hub refuses, about which a sentence
        goes to stderr.
    """
    parser = argparse.ArgumentParser(prog="hf-pdecay", description="Sparse models from ordinary training.")
    parser.add_argument("--version", action="version", version=f"hf-pdecay {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_preview(commands)
    _add_estimate(commands)
    _add_env(commands)
    _add_report(commands)
    _add_storage(commands)
    _add_shrink(commands)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = (
            "; the script and its arguments come first: hf-pdecay run SCRIPT ARGS…" if options.command == "run" else ""
        )
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    try:
        done: int | Callable[[], int] = options.run(options)
    except ValueError as error:
        sys.stderr.write(f"hf-pdecay {options.command}: {error}\n")
        return _USAGE
    except OSError as error:
        sys.stderr.write(f"hf-pdecay {options.command}: {error}\n")
        return _SYSTEM
    # What a user's script raises is not ours to word.
    return done() if callable(done) else done


def _add_run(commands: Commands) -> None:
    parser = commands.add_parser(
        "run",
        usage="hf-pdecay run SCRIPT ARGS…  |  hf-pdecay run -m MODULE ARGS…",
        help="run a script that knows nothing of hf_pdecay, with --optim adamw_lp known to it",
        description="Runs a script as Python would, with optim='adamw_lp' known to TrainingArguments, HfArgumentParser "
        "and every Trainer: --optim adamw_lp --optim_args p_norm=0.8,target_sparsity=0.9. On several processes: "
        "accelerate launch -m hf_pdecay run SCRIPT ARGS…",
    )
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="a module and its arguments")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a script and its arguments")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> Callable[[], int]:
    from .run import prepare

    return prepare(options.script, options.module)


def _add_preview(commands: Commands) -> None:
    parser = commands.add_parser(
        "preview",
        help="say which weights of a model a run would decay, by which rule, and how many zeros come of it",
        description="The param groups of a run with these settings, the zeros that its target comes to and the steps "
        "after which weights are cut. The settings are those of the run, each as a flag or all in --optim_args. No "
        "weights are loaded.",
    )
    parser.add_argument("model", metavar="CONFIG_OR_FOLDER", help="a folder with config.json, or a Hub name")
    parser.add_argument("--optim", default="adamw_lp", help="adamw_lp or another of ours (adamw_lp)")
    parser.add_argument("--optim_args", help="as in TrainingArguments: p_norm=0.8,target_sparsity=0.9")
    parser.add_argument("--optim_target_modules", nargs="+", help="as in TrainingArguments")
    for name in ("target_sparsity", "p_norm", "p_norm_begin", "lambda_p", "sparsity_begin", "sparsity_end"):
        parser.add_argument(f"--{name}", type=float)
    for name in ("lp_rules", "sparsity_schedule", "sparsity_budget"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--max_steps", type=int, default=1000, help="optimizer steps of the run, for its cuts (1000)")
    parser.add_argument("--weight_decay", type=float, default=0.0, help="L2 decay of the run (0)")
    parser.add_argument("--tensors", action="store_true", help="list each tensor")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.set_defaults(run=_preview)


def _preview(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from ..optim.named import OPTIMIZERS
    from ..trainer.settings import SETTINGS, DecaySettings
    from .preview import preview

    if options.optim not in OPTIMIZERS:
        raise ValueError(f"Invalid optim: optim={options.optim!r}; it must be one of {', '.join(OPTIMIZERS)}.")
    targets = options.optim_target_modules
    settings = DecaySettings.from_optim_args(
        options.optim_args, targets[0] if targets and len(targets) == 1 else targets, options.optim
    )
    flags = {name: value for name in SETTINGS if (value := getattr(options, name, None)) is not None}
    found = preview(
        options.model,
        replace(settings, **flags),
        max_steps=options.max_steps,
        weight_decay=options.weight_decay,
        all_tensors=options.tensors,
    )
    return _show(found, json.dumps(found.to_dict(), indent=2) if options.json else None)


def _add_estimate(commands: Commands) -> None:
    parser = commands.add_parser(
        "estimate",
        help="say what training a model takes, in memory and communication, without loading its weights",
        description="Bytes per parameter and per GPU for weights, gradients, moments and master weights under each "
        "layout, and what hf_pdecay adds in memory and communication. No weights are loaded.",
    )
    parser.add_argument("model", nargs="?", metavar="CONFIG_OR_FOLDER", help="a folder with config.json, or a Hub name")
    parser.add_argument("--parameters", type=float, metavar="N", help="number of parameters in place of a model: 8e9")
    parser.add_argument("--layout", default="all", help="single, ddp, fsdp2, zero2, zero3 or all (all)")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (8); single takes one")
    parser.add_argument("--mixed_precision", default="bf16", help="as in the accelerate config: bf16 or no (bf16)")
    parser.add_argument("--dtype", default="float32", help="of the weights as loaded: float32 or bfloat16 (float32)")
    parser.add_argument("--moments", help="float32, bfloat16 or 8bit; by default the dtype of the weights stepped")
    parser.add_argument("--max_steps", type=int, default=1000, help="optimizer steps of the run, for its cuts (1000)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.set_defaults(run=_estimate)


def _estimate(options: argparse.Namespace) -> int:
    from .estimate import Setup, estimate
    from .model_size import from_parameters, from_pretrained

    if (options.model is None) == (options.parameters is None):
        raise ValueError("Name a folder with config.json, or give --parameters N, such as 8e9: one of the two.")
    setup = Setup(options.gpus, options.mixed_precision, options.dtype, options.moments, options.max_steps)
    found = estimate(
        from_pretrained(options.model) if options.parameters is None else from_parameters(options.parameters),
        setup,
        options.layout,
    )
    return _show(found, json.dumps(found.to_dict(), indent=2) if options.json else None)


def _add_env(commands: Commands) -> None:
    parser = commands.add_parser(
        "env",
        help="print versions, devices and the backend of the step, ready to paste into a bug report",
        description="Prints versions, devices, the C++ compiler and the backend of the step. No network is used.",
    )
    parser.set_defaults(run=_env)


def _env(options: argparse.Namespace) -> int:
    from .env import describe

    sys.stdout.write("".join(f"- {name}: {what}\n" for name, what in describe().items()))
    return 0


def _add_report(commands: Commands) -> None:
    parser = commands.add_parser(
        "report",
        help="say how sparse a saved model is, or draw the Pareto front of a hyperparameter search",
        description="Exact zeros of a model or an adapter, counted from its files one tensor at a time; in a folder "
        "with search.jsonl the trials that no other beats in loss and sparsity, drawn as pareto.png.",
    )
    parser.add_argument("folder", metavar="MODEL_OR_RUN", help="a folder, or an optuna storage such as sqlite:///x.db")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from .report import report, to_json

    found = report(options.folder)
    return _show(found, to_json(found) if options.json else None)


def _show(found: Any, text: str | None) -> int:
    """Print a text, or what was found as tables if there is none, and return the exit code."""
    if text is not None:
        sys.stdout.write(text + "\n")
    else:
        from rich.console import Console

        Console(markup=False, emoji=False).print(found)
    return 0


def _add_storage(commands: Commands) -> None:
    for name, text in (
        ("compress", "write a model without its zeros; from_pretrained gives it back after import hf_pdecay"),
        ("decompress", "give the plain folder of a compressed model back"),
    ):
        parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        parser.add_argument("model", metavar="MODEL", help="a folder with config.json and safetensors, or a Hub name")
        parser.add_argument("out", metavar="OUT", help="the folder to write, which appears when it is whole")
        parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a model's folder")
        parser.set_defaults(run=_storage)
        if name == "compress":
            parser.add_argument("--zstd", action="store_true", help="compress by zstd too; needs zstandard")
            parser.add_argument("--max-shard-size", metavar="SIZE", help="of a file, such as 5GB (as the model has it)")
            parser.add_argument("--push-to-hub", metavar="REPO", help="upload OUT to this repository of the Hub")


def _storage(options: argparse.Namespace) -> int:
    from ..storage.commands import run_compress, run_decompress

    return run_compress(options) if options.command == "compress" else run_decompress(options)


def _add_shrink(commands: Commands) -> None:
    parser = commands.add_parser(
        "shrink",
        help="cut dead neurons and attention heads out of a model, which then loads anywhere as a smaller one",
        description="Cuts the neurons and attention heads that contribute nothing, as their weights are zero, out of a "
        "model. With as many left in each layer the config of the smaller model is an ordinary one, and it loads with "
        "nothing of hf_pdecay installed.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder with config.json and safetensors, or a Hub name")
    parser.add_argument("out", metavar="OUT", help="the folder to write, which appears when it is whole")
    parser.add_argument(
        "--layers",
        default="uniform",
        help="uniform: as many groups left in each layer, by an ordinary config (the default); ragged: in each layer "
        "what is alive, for loading after import hf_pdecay",
    )
    parser.add_argument(
        "--multiple-of", type=int, default=1, metavar="N", help="of which the number of neurons is one, as 64 (1)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a model's folder")
    parser.set_defaults(run=_shrink)


def _shrink(options: argparse.Namespace) -> int:
    from ..shrinking.commands import run_shrink

    return run_shrink(options)
