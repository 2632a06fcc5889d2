"""The names under which transformers saves the weights of a model, if they are not the model's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..names import clean_name
from ..names import saved_names as saved_by_peft
from ..optim.shards import full_shape


def names_in_files(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the names in files of the parameters that are saved under other names than the model's.

    Several names may hold one parameter, such as fused experts. The model may be wrapped, sharded or on the meta
    device. Where transformers does not know whether files have a prefix, as for a model that it has not loaded, they
    are taken to have none.
    """
    saved: dict[str, tuple[str, ...]] = {}
    for name in (clean_name(name) for name, _ in model.named_parameters(remove_duplicate=False)):
        if (in_adapter := saved_by_peft(name)[1]) != name:
            saved[name] = (in_adapter,)
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 saves what there is
        return saved
    for prefix, part in _models(model):
        for name, param in part.named_parameters():
            # The conversion may cut a parameter into pieces.
            empty = torch.empty(full_shape(param), dtype=param.dtype, device="meta")
            try:
                names = tuple(revert_weight_conversion(part, {name: empty}))
            except (RuntimeError, ValueError, KeyError, IndexError, TypeError):
                continue  # one that a file has as a part of another
            if names != (name,):
                saved[clean_name(prefix + name)] = tuple(clean_name(prefix + saved_name) for saved_name in names)
    return saved


class NamesInModel:
    """By a name in a file, the model's name of the parameter or buffer into which it is loaded.

    Several names may belong to one parameter, such as fused experts. A shared parameter has the first of its names.

    Args:
        model: A model, on any device; None if it is not known, which gives every name back.
    """

    def __init__(self, model: nn.Module | None) -> None:
        firsts: dict[int, str] = {}
        self._own: dict[str, str] = {}
        if model is not None:
            for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
                self._own[name] = firsts.setdefault(id(tensor), name)
        self._patterns: list[tuple[re.Pattern[str], str]] = []
        self._renamed: Callable[[str], str] = lambda name: name
        try:
            from transformers import PreTrainedModel
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        except ImportError:  # transformers 4
            for pattern, name in (getattr(model, "_checkpoint_conversion_mapping", None) or {}).items():
                self._patterns.append((re.compile(pattern), name))
            self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
            self._renamed = self._substituted
            return
        if isinstance(model, PreTrainedModel):
            conversions, prefix, state = (
                get_model_conversion_mapping(model),
                model.base_model_prefix,
                model.state_dict(),
            )
            renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
            converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
            self._renamed = lambda name: rename_source_key(name, renamings, converters, prefix, state)[0]

    def _substituted(self, name: str) -> str:
        own = next((pattern.sub(new, name) for pattern, new in self._patterns if pattern.search(name)), name)
        if own in self._own:
            return own
        # The file is of a base model, or the model is.
        return own.removeprefix(self._prefix) if own.startswith(self._prefix) else self._prefix + own

    def __call__(self, name: str) -> str:
        """Return the model's name; the given one if no other is known."""
        return self._own.get(name) or self._own.get(self._renamed(name), name)


def _models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost models of transformers in a module, each with the prefix of its names."""
    from transformers import PreTrainedModel

    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(prefix) for prefix in found):
            found.append(f"{name}." if name else "")
            yield found[-1], module
