"""Which checkpoints are whole: the Trainer takes the one with the highest number, even if saving it was killed.

The Trainer writes ``trainer_state.json`` last, so it must be there and parse. Files of weights must be as long as their
headers say, files of ``torch.save`` must end with the directory of a zip file, and no file of a set may be missing.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from ..sparsity.file_names import CHECKPOINT, STATE_FILE
from ..storage.container import FormatError, read_header
from ..terminal import get_logger


logger = get_logger(__name__)

_SENTINEL = "checkpoint-is-incomplete.txt"  # the Trainer's SIGTERM handler removes it when it is done
_WEIGHTS = ("*.safetensors", "*/*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "pytorch_model_fsdp*")
_TORCH_FILES = (
    "optimizer*.pt",
    "scheduler*.pt",
    "scaler.pt",
    "rng_state*.pth",
    "latent_weights.pt",
    "training_args.bin",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "global_step*/*.pt",
)


def fault(folder: str | os.PathLike[str]) -> str | None:
    """Say, from headers alone, what a checkpoint lacks; None if it is whole, as one by ``save_only_model`` can be."""
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
        if shapes_in(file) is None:
            return f"{file.relative_to(path)} is cut short"
    for pattern in _TORCH_FILES:
        for file in sorted(path.glob(pattern)):
            if not _is_whole_zip(file):
                return f"{file.relative_to(path)} is cut short"
    return _missing_shards(path) or _missing_state(path)


def check_whole(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError if a checkpoint is not whole, with what is wrong and which other one is whole."""
    path = Path(folder)
    inside = _checkpoints(path)
    if inside:
        names = ", ".join(checkpoint.name for checkpoint in reversed(inside))
        whole = next((str(checkpoint) for checkpoint in inside if fault(checkpoint) is None), None)
        advice = f"Name {whole!r}, the newest whole one." if whole else "None of them is whole."
        raise ValueError(
            f"Invalid resume_from_checkpoint: {str(folder)!r} is the folder of a run, with the checkpoints {names} in "
            f"it. {advice}"
        )
    flaw = fault(path)
    if flaw is None:
        return
    others = (checkpoint for checkpoint in _checkpoints(path.parent) if checkpoint != path)
    other = next((checkpoint.name for checkpoint in others if fault(checkpoint) is None), None)
    advice = "Name a whole one."
    if other is not None:
        advice = f"The newest whole one beside it is {other}, which resume_from_checkpoint=True takes."
    raise ValueError(f"Invalid resume_from_checkpoint: {str(folder)!r} is not a whole checkpoint: {flaw}. {advice}")


def newest_whole(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest whole checkpoint of a run, None without one; logs which newer ones were left out and why.

    ``transformers.trainer_utils.get_last_checkpoint`` looks at the numbers alone.

    Args:
        output_dir: The run's folder. It need not exist.
    """
    left_out: list[str] = []
    for checkpoint in _checkpoints(Path(output_dir)):
        flaw = fault(checkpoint)
        if flaw is None:
            if left_out:
                logger.warning("Taking %s; left out as not whole: %s.", checkpoint.name, "; ".join(left_out))
            return str(checkpoint)
        left_out.append(f"{checkpoint.name} ({flaw})")
    return None


def agreed_newest_whole(output_dir: str | os.PathLike[str]) -> str:
    """Return in every process the newest whole checkpoint, as the first process sees it; ValueError without one."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        outcome[0] = newest_whole(output_dir)
        if outcome[0] is None:
            checkpoints = _checkpoints(Path(output_dir))
            left_out = "; ".join(f"{checkpoint.name} ({fault(checkpoint)})" for checkpoint in checkpoints)
            outcome[1] = f"no whole checkpoint: {left_out}." if left_out else "no checkpoint."
    broadcast_object_list(outcome, from_process=0)
    newest, why_none = outcome
    if newest is None:
        raise ValueError(
            f"Invalid resume_from_checkpoint: resume_from_checkpoint=True, and output_dir={str(output_dir)!r} has "
            f"{why_none} Start anew, without resume_from_checkpoint."
        )
    return str(newest)


def _checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    if not output_dir.is_dir():
        return []
    matches = [(CHECKPOINT.fullmatch(folder.name), folder) for folder in output_dir.iterdir() if folder.is_dir()]
    numbered = sorted(((int(match[1]), folder) for match, folder in matches if match), reverse=True)
    return [folder for _, folder in numbered]


def _missing_shards(path: Path) -> str | None:
    """What is missing of the files of FSDP or DeepSpeed; None if nothing is."""
    for folder in sorted(path.glob("*_[0-9]")):
        # torch.distributed.checkpoint writes this last, once all processes have written their shards.
        if folder.is_dir() and not (folder / ".metadata").is_file():
            return f"{folder.name}/.metadata is missing"
    steps = [folder.name for folder in path.glob("global_step*")]
    if not steps:
        return None
    latest = path / "latest"
    named = latest.read_text(encoding="utf-8").strip() if latest.is_file() else None
    return None if named in steps else "latest, which DeepSpeed writes last, is missing"


def _missing_state(path: Path) -> str | None:
    """Which state of the optimizer, scheduler or random numbers is missing; None if nothing is, or all are."""
    random_states = {file.name for file in path.glob("rng_state*.pth")}
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
    # Each of several processes, at least two, writes its own; their number is not written down.
    for number in range(max(2, len(random_states))):
        if f"rng_state_{number}.pth" not in random_states:
            return f"rng_state_{number}.pth is missing" if random_states else "rng_state.pth is missing"
    return None


def shapes_in(file: Path) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the tensors in a safetensors file by name, None if the file is not whole."""
    try:
        return {name: entry.shape for name, entry in read_header(file).entries.items()}
    except FormatError:
        return None


def _is_whole_zip(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file):
            return True
    except zipfile.BadZipFile:
        return False
