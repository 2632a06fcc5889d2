"""Removes units from a model's weights, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.architectures import Heads
from ..layers.finding import Layer, attribute, has
from ..layers.matrices import is_transposed, update_sizes
from ..names import clean_name
from ..terminal import progress


@dataclass(frozen=True)
class Removal:
    """A layer, and which of its units are kept: booleans of shape (units,), on the CPU."""

    layer: Layer
    keep: Tensor

    @property
    def kept(self) -> int:
        """Number of units that are kept."""
        return int(self.keep.sum())

    @property
    def removes(self) -> bool:
        """Whether a unit is removed."""
        return not bool(self.keep.all())


def shapes_after(model: nn.Module, removals: Iterable[Removal]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters, by clean name, after the removals."""
    shapes = {clean_name(name): list(param.shape) for name, param in model.named_parameters()}
    for removal in removals:
        for member in removal.layer.units.members:
            shapes[member.param][member.dim] -= member.size * int((~removal.keep).sum())
    return {name: tuple(shape) for name, shape in shapes.items()}


@torch.no_grad()
def resize(model: nn.Module, removals: Sequence[Removal]) -> None:
    """Remove units from a model, in place: new parameters of the same dtype, on the same device (meta, too)."""
    names = {clean_name(name): param for name, param in model.named_parameters()}
    masks: dict[tuple[str, int], Tensor] = {}
    for removal in removals:
        for member in removal.layer.units.members:
            length = names[member.param].shape[member.dim]
            mask = masks.setdefault((member.param, member.dim), torch.ones(length, dtype=torch.bool))
            stop = member.offset + removal.layer.units.count * member.size
            mask[member.offset : stop] &= removal.keep.repeat_interleave(member.size)
    new: dict[int, Tensor] = {}
    for (name, dim), mask in progress(masks.items(), "Removing units", len(masks)):
        if not bool(mask.all()):
            param = names[name]
            index = mask.nonzero().flatten().to(param.device)
            new[id(param)] = new.get(id(param), param.detach()).index_select(dim, index)
    _replace(model, new)
    for removal in removals:
        if isinstance(removal.layer.row, Heads) and removal.removes:
            for _, module in removal.layer.modules:
                _set_heads(module, removal.layer.row)


def _replace(model: nn.Module, new: dict[int, Tensor]) -> None:
    """Replace parameters by new tensors in all modules, and correct the sizes that the modules state."""
    params: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, old in list(module._parameters.items()):
            if old is None or id(old) not in new:
                continue
            if id(old) not in params:
                value = new[id(old)].clone(memory_format=torch.contiguous_format)
                params[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)
            module._parameters[key] = params[id(old)]
        update_sizes(module)


def _set_heads(module: nn.Module, row: Heads) -> None:
    linear = attribute(module, row.output.partition(":")[0])
    width = linear.weight.shape[int(not is_transposed(linear))]
    values = {"heads": width // attribute(module, row.dim), "width": width}
    for path, what in row.attributes.items():
        if has(module, path):
            owner, _, name = path.rpartition(".")
            setattr(attribute(module, owner) if owner else module, name, values[what])
