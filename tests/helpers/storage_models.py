"""Small sparse models in folders, for the tests of compressed checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .models import build


def sparsified(model: nn.Module, zeros: float = 0.9) -> nn.Module:
    """Set a share of the elements of each matrix to zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 1:
                param[torch.rand(param.shape, generator=generator) < zeros] = 0
    return model


def saved(name: str, folder: Path, **kwargs: Any) -> Any:
    """Save a tiny sparse model of an architecture as plain safetensors, and return it."""
    model: Any = sparsified(build(name))
    model.save_pretrained(str(folder), **kwargs)
    return model


def write_folder(folder: Path, *shards: dict[str, Tensor], **config: Any) -> None:
    """Write tensors as a model's folder by the safetensors library: one file, or some with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "bert", "dtype": "float32", **config}, indent=2) + "\n"
    )
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{each:05d}-of-{len(shards):05d}.safetensors" for each in range(1, len(shards) + 1)]
        placed = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": 1}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a plain folder, as the safetensors library reads them."""
    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """What must be equal for two tensors to be bit-identical."""
    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same_state(left: nn.Module, right: nn.Module) -> bool:
    """Whether two modules have bit-identical tensors, dtypes included."""
    one, other = left.state_dict(), right.state_dict()
    return one.keys() == other.keys() and all(bits(one[name]) == bits(other[name]) for name in one)


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder, by its path in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())
