"""The weights of a folder as its files hold them, and its model without weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..names import natural_key
from ..storage.folder import INDEX, WEIGHTS, read_weight_map, shard_names
from ..storage.readers import safe_open
from ..terminal import progress
from ..trainer.checkpoints import newest_whole
from ..trainer.pareto import SEARCH_FILE


def model_folder(folder: Path) -> Path:
    """The folder itself, or its newest whole checkpoint if it holds no model."""
    if not folder.exists():
        raise ValueError(f"Invalid folder: {str(folder)!r} does not exist.")
    if not folder.is_dir():
        raise ValueError(f"Invalid folder: {str(folder)!r} is a file; name the folder that it lies in.")
    if any(folder.glob("*.safetensors")):
        return folder
    newest = newest_whole(folder)
    if newest is None or not any(Path(newest).glob("*.safetensors")):
        raise ValueError(
            f"Invalid folder: {str(folder)!r} holds no model in safetensors, no checkpoint and no {SEARCH_FILE}; "
            "name a folder that save_model() or a search has written."
        )
    return Path(newest)


def countable(tensor: Tensor) -> Tensor:
    """The values in a dtype in which torch can count zeros: not float8, nor unsigned integers of 16 bits and more."""
    if tensor.is_floating_point():
        return tensor.float() if tensor.element_size() == 1 else tensor
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor


def weight_files(folder: Path) -> list[Path]:
    """The files that ``from_pretrained`` would load, not shards of an earlier saving; else all safetensors files."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return sorted(folder.glob("*.safetensors"))
    files = [folder / name for name in shard_names(read_weight_map(folder))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{str(folder)!r} is incomplete: {file.name} of its {INDEX} is missing.")
    return files


def read_tensors(files: Sequence[Path], doing: str = "Counting") -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of files by name, one at a time, in natural order within each file.

    Raises ValueError if a file is cut short.
    """
    for path in files:
        with opened(path) as file:
            names = sorted(file.keys(), key=natural_key)
            for name in progress(names, f"{doing} {path.name}", len(names)):
                yield name, file.get_tensor(name)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file of weights, plain or compressed; raise ValueError if it is cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}); it may be cut short.") from error
