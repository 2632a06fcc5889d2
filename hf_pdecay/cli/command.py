"""Arguments that several commands share, and how a command prints its result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any


def add_config(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """Add the argument for a model, if only its config is read."""
    parser.add_argument(
        "model", nargs=nargs, metavar="CONFIG_OR_FOLDER", help="a folder with config.json, or a Hub name"
    )


def add_folders(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a command that reads a model and writes another folder."""
    parser.add_argument("model", metavar="MODEL", help="a folder with config.json and safetensors, or a Hub name")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it appears when it is complete")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a model's folder")
    add_json(parser)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a command that runs calibration rows through a model, beside those for its data."""
    parser.add_argument("--rows", type=int, default=128, metavar="N", help="calibration rows (128)")
    parser.add_argument(
        "--row_length", type=int, metavar="TOKENS", help="tokens of a row (what the model takes, at most 2048)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16 or float16, to run and save the model in (that of its files)"
    )
    parser.add_argument("--device", help="where the model runs, such as cuda or cpu (a GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the rows (0)")


def given_calibration(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of :func:`add_calibration`, and ``overwrite``, by their names in Python."""
    names = ("rows", "row_length", "dtype", "device", "seed", "overwrite")
    return {name: getattr(options, name) for name in names}


def add_max_steps(parser: argparse.ArgumentParser) -> None:
    """Add ``--max_steps``."""
    parser.add_argument(
        "--max_steps", type=int, default=1000, help="optimizer steps of the run, for its pruning steps (1000)"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting of the decay, for :func:`given_settings`."""
    from ..trainer.training_flags import SETTINGS

    for field in SETTINGS.values():
        default = "none" if field.default is None else field.default
        parser.add_argument(f"--{field.name}", metavar="VALUE", help=f"{field.metadata['help']} ({default})")


def spelled(words: Sequence[str], *, until_script: bool) -> list[str]:
    """Return the words of a command with its settings first, as :func:`add_settings` has their flags."""
    from ..trainer.training_flags import take_settings

    given, rest = take_settings(words, until_script=until_script)
    return [*(f"--{name}={string}" for name, string in given.items()), *rest]


def given_settings(options: argparse.Namespace) -> dict[str, str]:
    """Return the settings of the decay that were given as flags, as strings."""
    from ..trainer.training_flags import SETTINGS

    return {name: string for name in SETTINGS if (string := getattr(options, name)) is not None}


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, for :func:`show`; ``main`` knows it by this name alone."""
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")


def show(result: Any, options: argparse.Namespace) -> int:
    """Print a result by rich, or its ``to_dict`` as JSON with null for NaN and infinity; return the exit code 0.

    With ``--json`` the JSON is all that stands on stdout, because ``main`` has sent the rest to stderr.
    """
    if options.json:
        finite = json.loads(json.dumps(result.to_dict()), parse_constant=lambda _: None)
        options.stdout.write(json.dumps(finite, indent=2) + "\n")
    else:
        from ..terminal import print_rich

        print_rich(result)
    return 0
