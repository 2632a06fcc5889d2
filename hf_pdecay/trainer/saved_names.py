"""The names under which transformers saves the weights of a model, if they are not the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def load_converted(model: nn.Module, folder: str) -> None:
    """Load the model of a checkpoint in safetensors whose names differ from the model's; else do nothing.

    transformers 5 saves some models, such as ViT and GPT-NeoX, under the names that their files had before. Its Trainer
    looks for the model's names, and leaves weights that it does not find unchanged.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or set(_saved_names(Path(folder))) <= model.state_dict().keys():
        return
    model.load_state_dict(type(model).from_pretrained(folder, config=model.config, dtype=model.dtype).state_dict())


def names_in_files(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Return the names in files of the parameters that transformers saves under other names than the model's.

    Several names may hold one parameter, such as fused experts; the model may be on the meta device.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, revert_weight_conversion
    except ImportError:  # transformers 4 saves what there is
        return {}
    saved: dict[str, tuple[str, ...]] = {}
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    # Whether a file's names have a prefix depends on where the model came from.
    if all(isinstance(conversion, PrefixChange) for conversion in conversions):
        return saved
    for name, param in model.named_parameters():
        try:
            names = tuple(revert_weight_conversion(model, {name: param.detach()}))
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError):
            continue  # one that a file has as a part of another
        if names != (name,):
            saved[name] = names
    return saved


def _saved_names(folder: Path) -> list[str]:
    """The names of a saved model's weights; none without safetensors."""
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return list(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"])
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        return []
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return list(file.keys())
