"""Layers that compute their weight from other parameters: under ``torch.nn.utils.prune``, a norm, or an adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..names import clean_name


class Parametrized(NamedTuple):
    """A tensor that a module computes from parameters.

    Attributes:
        name: Clean name of the tensor, ``"encoder.conv.weight"``.
        by: What computes it, ``"WeightNorm"``.
        params: The parameters.
        pruned: Whether it is one parameter times a mask.
    """

    name: str
    by: str
    params: tuple[Tensor, ...]
    pruned: bool = False


def held_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters by the names under which it computes with them.

    What ``torch.nn.utils.prune`` masks has the name of the masked tensor: ``weight_orig`` that of ``weight``.
    """
    params: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    for name in _masked(module):
        params[name] = params.pop(f"{name}_orig")
    return params


def parametrized(model: nn.Module) -> Iterator[Parametrized]:
    """Yield the tensors that the modules of a model compute from parameters."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        params = dict(module.named_parameters(recurse=False))
        for name in _masked(module):
            yield Parametrized(clean_name(prefix + name), "prune", (params[f"{name}_orig"],), True)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                parts = tuple(params[key] for end in ("_g", "_v", "_orig") if (key := hook.name + end) in params)
                yield Parametrized(clean_name(prefix + hook.name), type(hook).__name__, parts)
        if parametrize.is_parametrized(module):
            for name, maps in module.parametrizations.items():
                by = ", ".join(type(each).__name__.lstrip("_") for each in maps)
                yield Parametrized(clean_name(prefix + name), by, tuple(maps.parameters()))


def adapter_parameters(model: nn.Module) -> dict[int, str]:
    """Return by ``id`` the parameters of PEFT's adapters, and the method of each, ``"lokr"``."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    owners: dict[int, str] = {}
    for module in model.modules() if tuners is not None else ():
        if isinstance(module, tuners.BaseTunerLayer):  # type: ignore[union-attr]
            base = {id(param) for param in module.get_base_layer().parameters()}
            method = type(module).__module__.split(".")[-2]
            owners |= {id(param): method for param in module.parameters() if id(param) not in base}
    return owners


def _masked(module: nn.Module) -> list[str]:
    """Names of the tensors of a module that are parameters under a mask."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, BasePruningMethod)]
    return [hook._tensor_name for hook in hooks if f"{hook._tensor_name}_orig" in module._parameters]
