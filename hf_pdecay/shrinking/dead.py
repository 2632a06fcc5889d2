"""Which units of a model are dead: by their zeros alone they contribute nothing to the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.architectures import Neurons
from ..layers.finding import Layer, attribute
from ..names import clean_name
from ..optim.shards import is_sharded
from ..optim.unit_operations import alive_here
from ..terminal import progress


def dead_units_of(model: nn.Module, layers: Sequence[Layer]) -> list[Tensor]:
    """Return which units of each layer are dead, as booleans on the CPU; raise ValueError for a sharded weight."""
    params = {clean_name(name): param for name, param in model.named_parameters()}
    units = []
    for layer in progress(layers, "Looking for dead units", len(layers), "layers"):
        zeros = []
        for member in layer.units.members:
            if is_sharded(params[member.param]):
                raise ValueError(
                    f"{member.param} is divided among processes; save the model, and shrink it after from_pretrained."
                )
            zeros.append(~alive_here(params[member.param], member, layer.units.count).cpu())
        units.append(dead(layer, zeros))
    return units


def dead(layer: Layer, zeros: Sequence[Tensor]) -> Tensor:
    """Return which units of a layer are dead, given which units are wholly zero in each of its members.

    A neuron is dead if its column in the down projection is zero, or one of the factors before it: its row in the up
    projection with the bias, or its row in the gate projection if the activation of 0 is 0. A head is dead if its
    columns in the output projection are zero, or the rows of its values with their bias. A unit of several modules is
    dead if it is dead in all of them.
    """
    modules: dict[int, dict[str, Tensor]] = {}
    for site, zero in zip(layer.sites, zeros, strict=True):
        of_module = modules.setdefault(site.module, {})
        of_module[site.part] = of_module[site.part] & zero if site.part in of_module else zero
    result = torch.ones(layer.units.count, dtype=torch.bool)
    for index, (_, module) in enumerate(layer.modules):
        of_module = modules[index]
        if isinstance(layer.row, Neurons):
            silent = of_module["down"].clone()
            for factor in range(len(layer.row.up)):
                if factor > 0 or _is_zero_at_zero(attribute(module, layer.row.activation)):
                    silent |= of_module[f"up{factor}"]
        else:
            silent = of_module["output"] | of_module["value"]
        result &= silent
    return result


def _is_zero_at_zero(activation: Any) -> bool:
    with torch.no_grad():
        return bool((activation(torch.zeros(1)) == 0).all())
