"""The size of a model, tensor by tensor: from its config on the meta device, or from a number of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..layers.matrices import decayable_parameter_names
from ..names import clean_name
from ..storage.untrusted import auto_config, model_class
from ..storage.untrusted import on_meta as built_on_meta


# Assumed if only the number of parameters is known: about as many tensors as a Llama of 8 B has.
_ASSUMED_TENSORS = 300


@dataclass(frozen=True)
class TensorSize:
    """The shape of a parameter, and whether it decays."""

    shape: tuple[int, ...]
    decayed: bool

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelSize:
    """The trainable floating-point parameters of a model, shared ones once; assumed if only their number is known."""

    name: str
    tensors: Sequence[TensorSize]
    assumed: bool = False

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def decayed(self) -> list[TensorSize]:
        """The tensors that decay."""
        return [tensor for tensor in self.tensors if tensor.decayed]

    @property
    def decayed_parameters(self) -> int:
        """Number of weights that decay."""
        return sum(tensor.numel for tensor in self.decayed)


def from_parameters(parameters: float) -> ModelSize:
    """Return the size of a model if only its number of parameters is known, finite and at least 1; all decay."""
    if not 1 <= parameters < math.inf:
        raise ValueError(f"Invalid parameters: parameters={parameters!r}; it must be a number such as 8e9.")
    numel = int(parameters)
    tensors = min(_ASSUMED_TENSORS, numel)
    sizes = [numel // tensors + (place < numel % tensors) for place in range(tensors)]
    return ModelSize(f"{numel:.3g} parameters", [TensorSize((size,), True) for size in sizes], assumed=True)


def from_pretrained(name: str) -> ModelSize:
    """Return the size of a model from its config; arguments and errors as in :func:`on_meta`."""
    return of_model(on_meta(name), name)


def on_meta(name: str) -> torch.nn.Module:
    """Build a model without weights on the meta device, from a folder with ``config.json``, that file, or a Hub name.

    The class is the first of the config's ``architectures``, or a causal LM if it names none. Raises ValueError if the
    config does not exist, or transformers cannot build a model from it.
    """
    import transformers.quantizers  # registers our quantizers; must come first

    from ..shrinking.quantizer import resize_as_noted

    source = str(Path(name).parent) if Path(name).name == "config.json" else name
    try:
        config = auto_config(source)
    except ValueError as error:
        raise ValueError(f"Invalid model: {error}; name a folder with config.json, or a model on the Hub.") from error
    try:
        make = model_class(config.architectures)
        if make is None:
            if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
                what = f"{name!r} is of type {config.model_type!r}, which has no causal LM"
                raise ValueError(f"{what}, and names no class of transformers in 'architectures'")
            make = transformers.AutoModelForCausalLM.from_config
        model: torch.nn.Module = built_on_meta(make, config, source)
        resize_as_noted(model)
    except ValueError as error:
        raise ValueError(f"Invalid model: {error}; correct its config.json.") from error
    return model


def of_model(model: torch.nn.Module, name: str = "model") -> ModelSize:
    """Return the size of a model, whatever device it is on."""
    decayed = set(decayable_parameter_names(model))
    sizes = [
        TensorSize(tuple(param.shape), clean_name(key) in decayed)
        for key, param in model.named_parameters()
        if param.requires_grad and param.is_floating_point()
    ]
    return ModelSize(name, sizes)
