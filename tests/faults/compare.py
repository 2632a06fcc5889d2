"""What two runs left, compared bit by bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.serialization import safe_globals


_TIMES = ("_runtime", "_per_second")


def same(left: object, right: object) -> bool:
    """Whether two trees of tensors, arrays and values are the same to the bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))  # type: ignore[arg-type]
    return left == right


_SET_ASIDE = re.compile(r"sparsity\.\d+\.jsonl")


def differences(left: Path, right: Path, steps: int, logging_steps: int) -> list[str]:
    """Name what is not the same in the output folders of two runs; ``sparsity.jsonl`` is held against the steps too."""
    differing = []
    last = f"checkpoint-{steps}"
    names = [
        "model.safetensors",
        "sparsity.json",
        "sparsity.jsonl",
        *(f"{last}/{each.relative_to(left / last)}" for each in sorted((left / last).rglob("*")) if each.is_file()),
    ]
    for name in names:
        if name.endswith("training_args.bin"):
            continue  # holds the name of the folder
        if not (right / name).is_file():
            differing.append(f"{name} is missing")
        elif not same(_content(left / name), _content(right / name)):
            differing.append(name)
    for run in (left, right):
        lines = [json.loads(line)["step"] for line in (run / "sparsity.jsonl").read_text().splitlines()]
        if lines != [*range(logging_steps, steps + 1, logging_steps)]:
            differing.append(f"{run.name}/sparsity.jsonl has the steps {lines}")
        differing += [f"{each} was left" for each in run.glob(".*.tmp")]
    # A kill while save_total_limit is kept leaves a checkpoint half deleted, until the next save.
    # A run that was killed before its first checkpoint starts anew, and sets the lines of the killed one aside.
    files = [
        sorted(file.name for file in run.iterdir() if file.is_file() and not _SET_ASIDE.fullmatch(file.name))
        for run in (left, right)
    ]
    if files[0] != files[1]:
        differing.append(f"the files are {files[1]}")
    return differing


def _content(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix in (".pt", ".pth"):
        with safe_globals(
            [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]  # type: ignore[attr-defined]
        ):
            return torch.load(file, weights_only=True)
    if file.name == "trainer_state.json":
        state = json.loads(file.read_text())
        state["log_history"] = [
            {key: value for key, value in entry.items() if not key.endswith(_TIMES)} for entry in state["log_history"]
        ]
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"] or "").name
        return state
    return file.read_bytes()
