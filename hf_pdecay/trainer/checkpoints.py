"""Which checkpoints a run can go on from: those that are whole, and are of this model and this optimizer.

A process that is killed while it saves leaves a checkpoint folder that is cut short, and the Trainer takes the one with
the highest number. What makes a checkpoint whole is decided by what is in it. The Trainer writes ``trainer_state.json``
last, so it must be there and parse; each file of weights must be as long as its header says; each file of
``torch.save`` must have the directory that a zip file ends with; and what goes together must be there together.
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..optim.shards import full_shape


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"

_NAME = re.compile(r"checkpoint-(\d+)")
# What the Trainer's own SIGTERM handler leaves in a checkpoint until it is done with it.
_SENTINEL = "checkpoint-is-incomplete.txt"
_WEIGHTS = ("*.safetensors", "*/*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "pytorch_model_fsdp*")
_TORCH_FILES = (
    "optimizer*.pt",
    "scheduler*.pt",
    "scaler.pt",
    "rng_state*.pth",
    "training_args.bin",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "global_step*/*.pt",
)

# By what a checkpoint is known whose optimizer an engine has sharded. DeepSpeed writes `latest` last; FSDP writes one
# folder of shards for the model and one for the optimizer, or one file of each.
_ENGINES = {"DeepSpeed": ("latest",), "FSDP": ("pytorch_model_fsdp*", "optimizer_*", "optimizer.bin")}


def fault(folder: str | os.PathLike[str]) -> str | None:
    """Say what is missing or cut short in a checkpoint; None if it is whole.

    Reads headers only, so it takes no longer for a large model. A checkpoint of the model alone, as
    ``save_only_model`` makes it, is whole.

    Args:
        folder: A checkpoint, ``checkpoint-N``.
    """
    path = Path(folder)
    if (path / _SENTINEL).exists():
        return f"{_SENTINEL} says that it was never finished"
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{STATE_FILE}, which is written last, is missing"
    except ValueError:
        return f"{STATE_FILE} is cut short"
    if not isinstance(state, dict) or "global_step" not in state:
        return f"{STATE_FILE} is not the state of a run"
    if not any(any(path.glob(pattern)) for pattern in _WEIGHTS):
        return "the weights are missing"
    for index in sorted(path.glob("*.index.json")):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError):
            return f"{index.name} is cut short"
        for shard in sorted(shards):
            if not (path / shard).is_file():
                return f"{shard} is missing, which {index.name} names"
    for file in sorted({*path.glob("*.safetensors"), *path.glob("*/*.safetensors")}):
        if _safetensors_header(file) is None:
            return f"{file.relative_to(path)} is cut short"
    for pattern in _TORCH_FILES:
        for file in sorted(path.glob(pattern)):
            if not _is_whole_zip(file):
                return f"{file.relative_to(path)} is cut short"
    return _missing_shards(path) or _missing_state(path)


def check_whole(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError if a checkpoint is not whole, saying what is wrong with it and which one is."""
    path = Path(folder)
    found = fault(path)
    if found is None:
        return
    others = (each for each in _checkpoints(path.parent) if each != path)
    other = next((each.name for each in others if fault(each) is None), None)
    advice = (
        "Name a whole one."
        if other is None
        else f"The newest whole one beside it is {other}, which resume_from_checkpoint=True takes."
    )
    raise ValueError(f"Invalid resume_from_checkpoint: {str(folder)!r} is not a whole checkpoint: {found}. {advice}")


def newest_whole(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest whole checkpoint of a run, None if there is none; logs which newer ones were left out and why.

    It stands for ``transformers.trainer_utils.get_last_checkpoint``, which looks at the numbers alone.

    Args:
        output_dir: The run's folder. It need not exist.
    """
    left_out: list[str] = []
    for each in _checkpoints(Path(output_dir)):
        found = fault(each)
        if found is None:
            if left_out:
                logger.warning("Taking %s; left out as not whole: %s.", each.name, "; ".join(left_out))
            return str(each)
        left_out.append(f"{each.name} ({found})")
    return None


def agreed_newest_whole(output_dir: str | os.PathLike[str]) -> str:
    """Return the newest whole checkpoint of a run, as the first process found it, in every process.

    Raises:
        ValueError: In every process, if there is none.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        outcome[0] = newest_whole(output_dir)
        if outcome[0] is None:
            left_out = "; ".join(f"{each.name} ({fault(each)})" for each in _checkpoints(Path(output_dir)))
            outcome[1] = f"no whole checkpoint: {left_out}." if left_out else "no checkpoint."
    broadcast_object_list(outcome, from_process=0)
    newest, why_none = outcome
    if newest is None:
        raise ValueError(
            f"Invalid resume_from_checkpoint: resume_from_checkpoint=True, and output_dir={str(output_dir)!r} has "
            f"{why_none} Start anew, without resume_from_checkpoint."
        )
    return str(newest)


def check_checkpoint(model: nn.Module, folder: str) -> None:
    """Raise ValueError if a checkpoint is not one of this model, going by names and shapes; reads headers only."""
    shapes = {name: list(full_shape(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()}
    saved: dict[str, list[int]] = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        saved |= {name: entry["shape"] for name, entry in (_safetensors_header(file) or {}).items()}
    differing = [name for name in saved if name in shapes and saved[name] != shapes[name]]
    if differing:
        name = differing[0]
        what = f"{name} is {saved[name]} there and {shapes[name]} here"
    elif saved and not saved.keys() & shapes.keys():
        what = f"it holds {next(iter(saved))} and no tensor of the name of any here"
    else:
        return
    raise ValueError(
        f"Invalid resume_from_checkpoint: {folder!r} is a checkpoint of another model: {what}. Name a checkpoint of "
        "this run."
    )


def check_engine_of(folder: str, engine: str, processes: int) -> None:
    """Raise ValueError if a checkpoint was written under another engine than the one that is to read it.

    Args:
        folder: A whole checkpoint.
        engine: ``"DeepSpeed"``, ``"FSDP"``, or ``""`` where each process holds all.
        processes: How many there are now.
    """
    path = Path(folder)
    if not (path / "scheduler.pt").is_file() and not any(path.glob("optimizer*")):
        return  # the model alone
    written = next((name for name, marks in _ENGINES.items() if any(any(path.glob(each)) for each in marks)), "")
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
    """Raise ValueError if a checkpoint's optimizer has other groups than this run's; reads no moments."""
    saved = _saved_groups(folder)
    if saved is None:
        return
    sizes, saved_sizes = ([len(group["params"]) for group in some] for some in (groups, saved))
    if sizes != saved_sizes:
        raise ValueError(
            f"Invalid resume_from_checkpoint: the optimizer in {folder!r} has param groups of {saved_sizes} tensors, "
            f"this run's has {sizes}. Resume with the optim, lp_rules and weight_decay that made the checkpoint."
        )
    for ours, theirs in zip(groups, saved, strict=True):
        # What a rule says, or moments, would go to other weights of the same shapes without a word.
        for name in ("rule", "group") if "rule" in theirs else ():
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"Invalid resume_from_checkpoint: the optimizer in {folder!r} has a param group with "
                    f"{name}={theirs.get(name)!r} where this run's has {name}={ours.get(name)!r}. Resume with the "
                    "optim and lp_rules that made the checkpoint."
                )


def other_settings(
    groups: list[dict[str, Any]], folder: str, controlled: Collection[int], *, annealed: bool
) -> list[str]:
    """Say which settings of the decay a resumed run takes from its checkpoint, where it was given others.

    Args:
        groups: The run's param groups, which :func:`check_optimizer_state` has checked.
        folder: The checkpoint.
        controlled: Places of those groups that have a target, by which λ_p and ``keep_zeros`` are set.
        annealed: Whether p goes from ``p_norm_begin`` to that of the groups.

    Returns:
        A sentence for each setting of each group.
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
    """The param groups of a checkpoint's optimizer, without its moments; None where none is in one file."""
    file = Path(folder) / "optimizer.pt"
    if not file.is_file():
        return None
    groups: list[dict[str, Any]] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["param_groups"]
    return groups


def _checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    if not output_dir.is_dir():
        return []
    numbered = [(_NAME.fullmatch(each.name), each) for each in output_dir.iterdir() if each.is_dir()]
    return [each for _, each in sorted(((int(match[1]), each) for match, each in numbered if match), reverse=True)]


def _missing_shards(path: Path) -> str | None:
    """What is missing of what FSDP or DeepSpeed wrote; None if it is all there."""
    for each in sorted(path.glob("*_[0-9]")):
        # torch.distributed.checkpoint writes this last, once all processes have written their shards.
        if each.is_dir() and not (each / ".metadata").is_file():
            return f"{each.name}/.metadata is missing"
    folders = [each.name for each in path.glob("global_step*")]
    if not folders:
        return None
    latest = path / "latest"
    named = latest.read_text(encoding="utf-8").strip() if latest.is_file() else None
    return None if named in folders else "latest, which DeepSpeed writes last, is missing"


def _missing_state(path: Path) -> str | None:
    """What there should be beside the other states of the optimizer and the random numbers; None if it is all there."""
    random_states = {each.name for each in path.glob("rng_state*.pth")}
    optimizer = any(path.glob("optimizer*")) or (path / "latest").is_file()
    scheduler = (path / "scheduler.pt").is_file()
    if not (random_states or optimizer or scheduler):
        return None  # the model alone
    if not optimizer:
        return "optimizer.pt is missing"
    if not scheduler:
        return "scheduler.pt is missing"
    if "rng_state.pth" in random_states:
        return None
    # Of several processes, which are two at least, each writes its own; how many there were is not written down.
    for number in range(max(2, len(random_states))):
        if f"rng_state_{number}.pth" not in random_states:
            return f"rng_state_{number}.pth is missing" if random_states else "rng_state.pth is missing"
    return None


def _safetensors_header(file: Path) -> dict[str, Any] | None:
    """The header of a file of tensors; None if it is cut, or the file is not as long as the header says."""
    with open(file, "rb") as handle:
        length = handle.read(8)
        if len(length) < 8:
            return None
        (size,) = struct.unpack("<Q", length)
        whole = os.fstat(handle.fileno()).st_size
        if size > whole - 8:
            return None
        try:
            header: dict[str, Any] = json.loads(handle.read(size))
        except ValueError:
            return None
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    return header if whole == 8 + size + end else None


def _is_whole_zip(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file):
            return True
    except zipfile.BadZipFile:
        return False


def load_converted(model: nn.Module, folder: str) -> None:
    """Load the model of a checkpoint that names its weights otherwise than the model does.

    transformers 5 saves some models, such as ViT and GPT-NeoX, under the names that their files had before. Its Trainer
    looks for names as they are, and leaves weights that it does not find as they happen to be.

    Args:
        model: The model, into which the Trainer has loaded the checkpoint.
        folder: The checkpoint. Nothing is done if it has no model in safetensors, or the names are those of the model.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or set(_saved_names(Path(folder))) <= model.state_dict().keys():
        return
    model.load_state_dict(type(model).from_pretrained(folder, config=model.config, dtype=model.dtype).state_dict())


def names_in_files(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Return under which names transformers saves the parameters of a model, of those that it saves under others.

    Several are the parts of one parameter, such as experts that are fused in memory.

    Args:
        model: The model, with weights or on the meta device. It is not changed.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, revert_weight_conversion
    except ImportError:  # transformers 4 saves what there is
        return {}
    found: dict[str, tuple[str, ...]] = {}
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    # Whether a file's names have a prefix depends on where the model came from.
    if not any(not isinstance(each, PrefixChange) for each in conversions):
        return found
    for name, param in model.named_parameters():
        try:
            names = tuple(revert_weight_conversion(model, {name: param.detach()}))
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError):
            continue  # one that a file has as a part of another
        if names != (name,):
            found[name] = names
    return found


def _saved_names(folder: Path) -> list[str]:
    """The names of a saved model's weights; none without safetensors."""
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return list(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"])
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        return []
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return list(file.keys())
