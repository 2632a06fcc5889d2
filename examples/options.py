"""Options of the example scripts: reading them, and checking them before any work begins."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments, check_checkpoint, check_optimizer_state, newest_whole


def arg(default: Any, **metadata: Any) -> Any:
    """Return a dataclass field that `HfArgumentParser` turns into an option."""
    return field(default=default, metadata=metadata)


class Parser(HfArgumentParser):
    """A parser that raises ValueError instead of printing two hundred options before the error."""

    def error(self, message: str) -> NoReturn:
        """Raise `message`."""
        raise ValueError(message)


def parse_options(
    argv: Sequence[str], groups: Sequence[Any], defaults: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> tuple[Any, ...]:
    """Parse a command line, which may start with a JSON or YAML file of options, into one object for each dataclass.

    `defaults` takes the given options and returns values for the others.
    """
    if argv and Path(argv[0]).suffix in (".json", ".yaml", ".yml"):
        argv = [*read_options(argv[0]), *argv[1:]]
    probe, absent = Parser(groups, allow_abbrev=False, add_help=False), object()
    probe.set_defaults(**{option.name: absent for group in groups for option in fields(group)})
    given = {name: value for name, value in vars(probe.parse_known_args(argv)[0]).items() if value is not absent}
    parser = Parser(groups, description=sys.modules[groups[0].__module__].__doc__, allow_abbrev=False)
    parser.set_defaults(**defaults(given))
    return parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)


def read_options(path: str) -> list[str]:
    """Read a JSON or YAML file of options as a command line."""
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # YAML contains JSON
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The file of options {path!r} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"The file of options {path!r} must hold a mapping from names of options to values")
    argv = []
    for name, value in given.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    return argv


def check_run(args: PDecayTrainingArguments) -> None:
    """Check values at which the Trainer would fail later; turn `--resume_from_checkpoint true` into a path."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    asked, folder = str(args.resume_from_checkpoint), str(args.output_dir)
    if Path(folder).exists() and not Path(folder).is_dir():
        raise OSError(f"--output_dir {folder!r} is a file; it must be a folder, or the name of a new one")
    if asked.lower() in ("none", "false", "no"):
        args.resume_from_checkpoint = None
    elif asked.lower() in ("true", "yes", "latest"):
        args.resume_from_checkpoint = newest_whole(folder)
        if args.resume_from_checkpoint is None:
            raise ValueError(f"--resume_from_checkpoint {asked}: --output_dir {folder!r} has no complete checkpoint")
    elif not Path(asked).is_dir():
        raise OSError(f"--resume_from_checkpoint {asked!r} is missing; it must be a folder, or true for the last one")
    elif not (Path(asked) / "trainer_state.json").is_file() or not any(Path(asked).glob("optimizer*")):
        inside = ", ".join(sorted(path.name for path in Path(asked).glob("checkpoint-*"))) or "none"
        raise ValueError(
            f"--resume_from_checkpoint {asked!r} is not a checkpoint: it needs trainer_state.json and the optimizer's "
            f"state. Checkpoints in it: {inside}"
        )


def create_optimizer_early(trainer: PDecayTrainer) -> None:
    """Make the optimizer now, to find errors in it or the checkpoint; sharded engines make their own."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    optimizer, folder = trainer.create_optimizer(), trainer.args.resume_from_checkpoint
    if folder is not None:
        check_checkpoint(trainer.model, folder)
        check_optimizer_state(optimizer.param_groups, folder)
