"""Cutting groups out of a model's weights, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.architectures import Heads
from ..layers.finding import Layer, attribute, has
from ..layers.matrices import is_transposed, update_sizes
from ..names import clean_name


@dataclass(frozen=True)
class Cut:
    """A layer and which of its groups are kept.

    Args:
        layer: The layer.
        keep: Booleans of shape (groups,), on the CPU.
    """

    layer: Layer
    keep: Tensor

    @property
    def kept(self) -> int:
        """Number of groups that are kept."""
        return int(self.keep.sum())

    @property
    def cuts(self) -> bool:
        """Whether there is a group that is not kept."""
        return not bool(self.keep.all())


def shapes_after(model: nn.Module, cuts: Iterable[Cut]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters, by clean name, as they are once groups are cut."""
    shapes = {clean_name(name): list(param.shape) for name, param in model.named_parameters()}
    for cut in cuts:
        for member in cut.layer.units.members:
            shapes[member.param][member.dim] -= member.size * int((~cut.keep).sum())
    return {name: tuple(shape) for name, shape in shapes.items()}


@torch.no_grad()
def resize(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Cut groups out of a model, in place: new parameters of the same dtype, on the same device, meta included."""
    names = {clean_name(name): param for name, param in model.named_parameters()}
    masks: dict[tuple[str, int], Tensor] = {}
    for cut in cuts:
        for member in cut.layer.units.members:
            length = names[member.param].shape[member.dim]
            mask = masks.setdefault((member.param, member.dim), torch.ones(length, dtype=torch.bool))
            stop = member.offset + cut.layer.units.count * member.size
            mask[member.offset : stop] &= cut.keep.repeat_interleave(member.size)
    new: dict[int, Tensor] = {}
    for (name, dim), mask in masks.items():
        if not bool(mask.all()):
            param = names[name]
            index = mask.nonzero().flatten().to(param.device)
            new[id(param)] = new.get(id(param), param.detach()).index_select(dim, index)
    _replace(model, new)
    for cut in cuts:
        if isinstance(cut.layer.row, Heads) and cut.cuts:
            for _, module in cut.layer.modules:
                _set_heads(module, cut.layer.row)


def _replace(model: nn.Module, new: dict[int, Tensor]) -> None:
    """Put new tensors in the place of parameters, wherever these are, and correct the sizes that modules state."""
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
