"""Which groups of a model contribute nothing, by zeros alone: without them the outputs are the same."""

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


def dead_groups(model: nn.Module, layers: Sequence[Layer]) -> list[Tensor]:
    """Return for each layer which of its groups are dead, as booleans on the CPU.

    Raises:
        ValueError: If this process holds a shard of a weight only.
    """
    params = {clean_name(name): param for name, param in model.named_parameters()}
    found = []
    for layer in layers:
        zeros = []
        for member in layer.units.members:
            if is_sharded(params[member.param]):
                raise ValueError(
                    f"{member.param} is divided among processes; save the model, and shrink what from_pretrained gives."
                )
            zeros.append(~alive_here(params[member.param], member, layer.units.count).cpu())
        found.append(dead(layer, zeros))
    return found


def dead(layer: Layer, zeros: Sequence[Tensor]) -> Tensor:
    """Return which groups of a layer contribute nothing, given in which of its members each is wholly zero.

    A neuron is dead if its column in the down projection is zero, or one of the factors before it: its row in the up
    projection with the bias, or that in the gate projection if the activation of 0 is 0. A head is dead if its columns
    in the output projection are zero, or the rows of its values with their bias. A group that lies in several modules
    is dead if it is so in all of them.
    """
    parts: dict[int, dict[str, Tensor]] = {}
    for place, zero in zip(layer.sites, zeros, strict=True):
        of_module = parts.setdefault(place.module, {})
        of_module[place.part] = of_module[place.part] & zero if place.part in of_module else zero
    found = torch.ones(layer.units.count, dtype=torch.bool)
    for index, (_, module) in enumerate(layer.modules):
        of_module = parts[index]
        if isinstance(layer.row, Neurons):
            silent = of_module["down"].clone()
            for factor in range(len(layer.row.up)):
                if factor > 0 or _is_zero_at_zero(attribute(module, layer.row.activation)):
                    silent |= of_module[f"up{factor}"]
        else:
            silent = of_module["output"] | of_module["value"]
        found &= silent
    return found


def _is_zero_at_zero(activation: Any) -> bool:
    with torch.no_grad():
        return bool((activation(torch.zeros(1)) == 0).all())
