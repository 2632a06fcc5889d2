"""Checks that a checkpoint is of this run: of its model, engine and optimizer."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..layers.saved_names import NamesInModel
from ..optim.bases import decays_to_base
from ..optim.shards import full_shape
from ..optim.validation import check_saved_groups
from .checkpoints import shapes_in
from .engines import engine_that_wrote


if TYPE_CHECKING:
    from torch import nn


def check_checkpoint(model: nn.Module, folder: str) -> None:
    """Raise ValueError if a checkpoint is of another model, by names and shapes; reads headers only."""
    shapes = {name: list(full_shape(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()}
    saved: dict[str, list[int]] = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        saved |= {name: list(shape) for name, shape in (shapes_in(file) or {}).items()}
    differing = [name for name in saved if name in shapes and saved[name] != shapes[name]]
    if differing:
        name = differing[0]
        what = f"{name} is {saved[name]} there and {shapes[name]} here"
    elif saved and not saved.keys() & shapes.keys() and not shapes.keys() & set(map(NamesInModel(model), saved)):
        what = f"it holds {next(iter(saved))} and no tensor of the name of any here"
    else:
        return
    raise ValueError(
        f"Invalid resume_from_checkpoint: {folder!r} is a checkpoint of another model: {what}. Name a checkpoint of "
        "this run."
    )


def check_engine_of(folder: str, engine: str, processes: int) -> None:
    """Raise ValueError if a whole checkpoint was written under another engine; ``""`` means that none shards."""
    path = Path(folder)
    if not (path / "scheduler.pt").is_file() and not any(path.glob("optimizer*")):
        return  # the model alone
    written = engine_that_wrote(path)
    if written != engine:
        by, now = (f"under {name}" if name else "on one process or DDP" for name in (written, engine))
        raise ValueError(
            f"Invalid resume_from_checkpoint: {folder!r} was written {by}, and this run is {now}, which cannot read "
            "its optimizer. Resume with the accelerate config that made it."
        )
    shards = len(list(path.glob("global_step*/*_optim_states.pt")))
    if engine == "DeepSpeed" and shards not in (0, processes):
        raise ValueError(
            f"Invalid resume_from_checkpoint: {folder!r} was written by {shards} processes, and DeepSpeed cannot "
            f"divide it anew among {processes}. Resume with num_processes: {shards}; FSDP2 and DDP could."
        )


def check_optimizer_state(groups: list[dict[str, Any]], folder: str) -> None:
    """Raise ValueError if the optimizer of a checkpoint has other param groups than this run's; reads no moments."""
    saved = _saved_groups(folder)
    if saved is not None:
        was, now = (any(map(decays_to_base, side)) for side in (saved, groups))
        if was != now:
            raise ValueError(
                f"Invalid resume_from_checkpoint: {folder!r} is of a run in which weights decay to "
                f"{'their base' if was else 'zero'}, and here they decay to {'their base' if now else 'zero'}: give "
                f"decay_to={('base' if was else 'zero')!r}, or start another run from the weights in there."
            )
        check_saved_groups(saved, groups, f"Invalid resume_from_checkpoint: the optimizer in {folder!r}")


def other_settings(
    groups: list[dict[str, Any]], folder: str, controlled: Collection[int], *, annealed: bool
) -> list[str]:
    """Say, one sentence for each setting and group, what a resumed run takes from its checkpoint, not its arguments.

    ``controlled`` holds the indices of the groups with a target, which sets λ_p and ``keep_zeros``; ``annealed`` says
    whether p goes from ``p_norm_begin`` to that of the groups.
    """
    sentences = []
    for number, (ours, theirs) in enumerate(zip(groups, _saved_groups(folder) or groups, strict=True)):
        if not (ours["decayed"] and "rule" in theirs):
            continue
        saved = {**theirs, "p_norm": theirs.get("p_norm_end", theirs["p_norm"])} if annealed else theirs
        names = ["p_norm", "target_sparsity", *(() if number in controlled else ("lambda_p", "keep_zeros"))]
        sentences += [
            f"The run goes on with {name}={saved[name]!r} of {folder!r} for {ours['rule']!r}, not with {ours[name]!r}. "
            "For that start another from the weights in there."
            for name in names
            if name in saved and saved[name] != ours[name]
        ]
    return sentences


def _saved_groups(folder: str) -> list[dict[str, Any]] | None:
    """The param groups of a checkpoint's optimizer, without its moments; None if it is not in one file."""
    file = Path(folder) / "optimizer.pt"
    if not file.is_file():
        return None
    groups: list[dict[str, Any]] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["param_groups"]
    return groups
