"""Rounding the inputs of layers in their forward passes, by the transform that rounds weights.

Hooks of the layers do it, and the model's config says which: a property of the model, which stays after training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..layers.matrices import is_linear
from ..layers.parametrized import held_parameters
from ..names import clean_name
from .grid import check_width, grid_of
from .transform import Layout, round_blocks


CONFIG_KEY = "hf_pdecay"
"""What a model's config holds of ours: a dict."""

SETTING = "activation_bits"
"""The key in it, whose value has the width of the inputs of each layer by its name."""

_Model = TypeVar("_Model", bound=nn.Module)


def round_activations(model: _Model, bits: Mapping[str, float] | None = None) -> _Model:
    """Have layers of a model round their inputs in every forward pass, as a run with ``activation_bits`` does.

    A model that such a run has saved computes with inputs that are not rounded when plain ``from_pretrained`` has
    loaded it. After this call it has the loss that the run printed. The weights stay as they are. Inputs share a scale
    in blocks of 128 features of a token or pixel, and gradients pass through the rounding
    (https://huggingface.co/papers/2409.09245).

    Args:
        model: The model, wrapped or not. Its config, if it has one, will state the widths too.
        bits: 8, 4, 2, 1.58 or 1 by the name of a linear layer or convolution, for all layers that are to round their
            inputs; the others do not. None for the widths that the config states. ``{}`` ends the rounding.

    Returns:
        The same model.

    Raises:
        ValueError: If a width is not offered, a layer is missing, or ``bits`` is None and the config states none.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("out")
        >>> model = hf_pdecay.round_activations(model)
    """
    if bits is None:
        bits = stated_widths(getattr(getattr(model, "config", None), CONFIG_KEY, None))
        if not bits:
            raise ValueError(
                "Invalid bits: bits=None, and the config of the model states no activation_bits, as that of a model "
                'which was trained with them does; give the widths, as {"model.layers.0.mlp.down_proj": 8}.'
            )
    layers: dict[str, nn.Module] = {}
    for name, module in _named_layers(model):
        if name not in layers or inputs_dim(module) is not None:
            layers[name] = module
    chosen: dict[str, tuple[nn.Module, int, float]] = {}
    for name, width in bits.items():
        known = next((each for each in _aliases(model, name) if each in layers), None)
        dim = None if known is None else inputs_dim(layers[known])
        if known is None or dim is None:
            what = "is no layer of the model" if known is None else "is neither a linear layer nor a convolution"
            raise ValueError(f"Invalid bits: {name} {what}; name layers as model.named_modules() does.")
        chosen[known] = layers[known], dim, check_width(width, SETTING)
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _Rounding)]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for module, dim, width in chosen.values():
        module.register_forward_pre_hook(_Rounding(dim, width), with_kwargs=True)
    _state(model, {name: width for name, (_, _, width) in chosen.items()})
    return model


def rounded_inputs(model: nn.Module) -> dict[str, float]:
    """Return the width of the inputs of each layer that rounds them, by its name."""
    return {
        name: hook.width
        for name, module in _named_layers(model)
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, _Rounding)
    }


def weights_of_rounded_inputs(model: nn.Module) -> list[str]:
    """Return the clean names of the parameters that multiply inputs which are rounded."""
    rounded = rounded_inputs(model).keys()
    return [name for name, layers in input_layers(model).items() if not rounded.isdisjoint(layers)]


def stated_widths(ours: Any) -> dict[str, float]:
    """Return the widths of inputs, by the name of the layer, that our entry in a config states."""
    stated = ours.get(SETTING) if isinstance(ours, dict) else None
    return dict(stated) if isinstance(stated, dict) else {}


@contextmanager
def exact_inputs(model: nn.Module) -> Iterator[None]:
    """Have no layer round its inputs for a while."""
    before = rounded_inputs(model)
    if not before:
        yield
        return
    round_activations(model, {})
    try:
        yield
    finally:
        round_activations(model, before)


def input_layers(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the layers that multiply their inputs by a parameter, by its clean name.

    These are linear layers and convolutions. ``nn.MultiheadAttention`` and fused experts make inputs of their own
    inside, which no hook sees.
    """
    inside = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    names = {id(param): clean_name(name) for name, param in model.named_parameters()}
    found: dict[str, list[str]] = {}
    for layer, module in _named_layers(model):
        if inputs_dim(module) is not None and id(module) not in inside:
            weight = held_parameters(module).get("weight")
            if weight is not None:
                found.setdefault(names[id(weight)], []).append(layer)
    return found


def inputs_dim(module: nn.Module) -> int | None:
    """Return the dimension, from the end, of the features that a layer multiplies by its weight; None for others."""
    if is_linear(module):
        return -1
    return -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else None


class _Rounding:
    """A hook that rounds the input of a layer.

    Args:
        dim: The dimension of its features, from the end.
        width: One of :data:`.grid.WIDTHS`.
    """

    def __init__(self, dim: int, width: float) -> None:
        self.dim, self.width, self.grid = dim, width, grid_of(width)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._rounded(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self._rounded(kwargs[name])}

    def _rounded(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        features = x.shape[self.dim]
        inner = math.prod(x.shape[x.dim() + self.dim + 1 :])
        return round_blocks(x, Layout(math.prod(x.shape[: self.dim]), features, inner), self.grid)


def _named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their names in the model that is saved: without those of PEFT around it and its layers."""
    inner: Any = getattr(model, "get_base_model", None) if hasattr(model, "peft_config") else None
    base = model if inner is None else inner()
    for name, module in base.named_modules():
        yield clean_name(name).removesuffix(".base_layer"), module


def _aliases(model: nn.Module, name: str) -> Iterator[str]:
    """A layer's name in the model, and in the same with a head or without it."""
    base = f"{getattr(model, 'base_model_prefix', '')}."
    yield from (name, name.removeprefix(base), base + name)


def _state(model: nn.Module, widths: Mapping[str, float]) -> None:
    """Write widths into the config of a model."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return
    ours = dict(getattr(config, CONFIG_KEY, None) or {})
    ours.pop(SETTING, None)
    if widths:
        ours[SETTING] = {name: int(width) if width == int(width) else width for name, width in widths.items()}
    if ours:
        setattr(config, CONFIG_KEY, ours)
    elif hasattr(config, CONFIG_KEY):
        delattr(config, CONFIG_KEY)
