"""Checkpoints whose weights have other names than the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..names import clean_name


if TYPE_CHECKING:
    from torch import nn


def load_converted(model: nn.Module, folder: str) -> None:
    """Load the model of a checkpoint in safetensors whose names differ from the model's; else do nothing.

    transformers 5 saves some models, such as ViT and GPT-NeoX, under the names that their files had before. Its Trainer
    looks for the model's names, and leaves weights that it does not find unchanged.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or set(_saved_names(Path(folder))) <= model.state_dict().keys():
        return
    model.load_state_dict(type(model).from_pretrained(folder, config=model.config, dtype=model.dtype).state_dict())


def without_tied(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a gathered state without the further names of tied weights: FSDP2 gathers these twice.

    Without an engine transformers leaves them out, and so does the file of the base.
    """
    firsts: dict[int, str] = {}
    further = {
        clean_name(name)
        for name, param in model.named_parameters(remove_duplicate=False)
        if firsts.setdefault(id(param), name) != name
    }
    return {name: tensor for name, tensor in state_dict.items() if clean_name(name) not in further}


def _saved_names(folder: Path) -> list[str]:
    """The names of a saved model's weights; none without safetensors."""
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return list(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"])
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        return []
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return list(file.keys())
