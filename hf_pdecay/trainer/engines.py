"""Checks, before any training, of how FSDP and DeepSpeed shard a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..optim.unit_kinds import ELEMENT, kind_of
from ..terminal import get_logger


if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


logger = get_logger(__name__)

# Optimizers that know no DTensor: torch 2.13's Adafactor stops at the norm of one, bitsandbytes at any.
_NOT_ON_DTENSORS = ("adafactor_lp", "lion_lp", "lion_8bit_lp", "adamw_bnb_8bit_lp")
# Optimizers whose step treats each weight by itself.
_ON_FLAT_SHARDS = ("adamw_lp", "sgd_lp", "lion_lp")
# Files of a checkpoint that show which engine sharded its optimizer; FSDP writes a folder of shards, or one file.
_FILES = {"DeepSpeed": ("latest",), "FSDP": ("pytorch_model_fsdp*", "optimizer_*", "optimizer.bin")}


def engine_of(trainer: Trainer) -> str:
    """Return the name of the engine that shards a run: ``"FSDP"``, ``"DeepSpeed"``, or ``""`` for none."""
    return "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed" if trainer.is_deepspeed_enabled else ""


def engine_that_wrote(checkpoint: Path) -> str:
    """Return the name of the engine that sharded the optimizer of a checkpoint, ``""`` for none."""
    return next((name for name, marks in _FILES.items() if any(any(checkpoint.glob(mark)) for mark in marks)), "")


def check_engine(trainer: Trainer, optim: str = "adamw_lp", moments: str | None = None) -> None:
    """Raise ValueError if the decay would be wrong or do nothing, given how a Trainer's run is sharded."""
    if moments == "8bit" and engine_of(trainer):
        raise ValueError(
            f"Invalid moments: moments='8bit' under {engine_of(trainer)}, whose shards torchao cannot quantise; take "
            "moments=bfloat16, or train on one process or under DDP."
        )
    if trainer.is_fsdp_enabled:
        if optim in _NOT_ON_DTENSORS:
            raise ValueError(
                f"Invalid optim: optim={optim!r} under FSDP, whose shards it does not know; take adamw_lp, sgd_lp or "
                "muon_lp, or train on one process or under DDP."
            )
        version = getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1)
        if version != 2:
            raise ValueError(
                f"Invalid fsdp_version: fsdp_version={version} flattens many parameters into one, so that their p, λ_p "
                "and targets would be lost. Set fsdp_version: 2 in the accelerate config (or fsdp_config)."
            )
    if trainer.is_deepspeed_enabled:
        if optim not in _ON_FLAT_SHARDS:
            raise ValueError(
                f"Invalid optim: optim={optim!r} under DeepSpeed, which gives an optimizer flat pieces of the weights, "
                f"not their shapes; take one of {', '.join(_ON_FLAT_SHARDS)}, or FSDP2."
            )
        config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
        if config.get_value("optimizer") is not None:
            raise ValueError(
                "Invalid deepspeed config: its entry 'optimizer' would take the place of optim='adamw_lp'. Remove that "
                "entry, and the Trainer gives DeepSpeed its own optimizer."
            )
        for entry in ("offload_optimizer", "offload_param"):
            device = config.get_value(f"zero_optimization.{entry}.device", "none")
            if device == "nvme":
                raise ValueError(
                    f"Invalid deepspeed config: zero_optimization.{entry}.device={device!r}; adamw_lp steps and prunes "
                    "weights where they lie, which must be 'cpu' or 'none'."
                )


def check_structured(
    trainer: Trainer, groups: Iterable[Mapping[str, Any]], optim: str = "adamw_lp", backend: str = "auto"
) -> None:
    """Raise ValueError if weights that decay as units are sharded in a way that the optimizer cannot handle."""
    groups = list(groups)
    kinds = [kind_of(group) for group in groups if kind_of(group) != ELEMENT]
    if kinds and trainer.is_deepspeed_enabled:
        raise ValueError(
            f"Invalid lp_rules: group={kinds[0]!r} under {engine_of(trainer)}, which gives an optimizer flat pieces of "
            "the weights, not their rows; structured decay takes one process, or several under DDP or FSDP2."
        )
    if kinds and trainer.is_fsdp_enabled and (optim != "adamw_lp" or backend in ("foreach", "reference")):
        raise ValueError(
            f"Invalid lp_rules: group={kinds[0]!r} under FSDP with optim={optim!r} and backend={backend!r}; units of "
            "sharded weights take adamw_lp with backend 'auto', 'compiled' or 'triton'."
        )
    for group in groups if trainer.is_fsdp_enabled else ():
        members = (member for layer in group.get("units") or () for member in layer["members"])
        if any(member.get("matrix") is not None for member in members):
            raise ValueError(
                f"Invalid lp_rules: group={kind_of(group)!r} on fused experts under FSDP, which divides them among "
                "processes; take one process, DDP, or N:M such as 2:4."
            )


def check_same(settings: Mapping[str, Any]) -> None:
    """Raise ValueError in every process if their settings differ; all of them must call."""
    if PartialState().num_processes == 1:
        return
    everyone: list[Mapping[str, Any]] = gather_object([dict(settings)])
    for name in settings:
        values = [process[name] for process in everyone]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"Invalid {name}: {name}={values[0]!r} in process 0 and {values[other]!r} in process {other}; all must "
                "be given the same."
            )


def check_world_size(args: TrainingArguments) -> None:
    """Raise ValueError for more processes than can train together, and warn if a launcher started one for several.

    Several processes on one GPU fail in NCCL or wait for ever.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if args.device.type == "cuda" and here > torch.cuda.device_count():
        raise ValueError(
            f"Invalid num_processes: {here} processes were started on a machine of {torch.cuda.device_count()} GPUs. "
            "Start one for each, by num_processes in the accelerate config."
        )
    started = int(os.environ.get("WORLD_SIZE", args.world_size))
    if started != args.world_size:
        raise ValueError(
            f"Invalid use_cpu: {started} processes were started (WORLD_SIZE={started}) and world_size="
            f"{args.world_size}: they do not find each other. On a CPU give use_cpu=True, or start one process."
        )
    if started == 1 and "WORLD_SIZE" not in os.environ and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        # So does `accelerate launch` if it is asked for several and sees fewer than two GPUs.
        logger.warning(
            "This run has one process, though MASTER_ADDR and MASTER_PORT are set as for several: the launcher started "
            "only one. `accelerate launch --multi_gpu --num_processes 2` starts two, on CPUs too (with use_cpu=True), "
            "and so does a --config_file from examples/accelerate_configs."
        )


@contextmanager
def whole_model(trainer: Trainer) -> Iterator[None]:
    """Have the Trainer save the whole model under FSDP, even if checkpoints are sharded."""
    if not trainer.is_fsdp_enabled:
        yield
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    kept = plugin.state_dict_type, plugin.state_dict_config, plugin.optim_state_dict_config
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.state_dict_type, plugin.state_dict_config, plugin.optim_state_dict_config = kept
