"""Where a model multiplies by matrices that can be rounded, and how their inputs lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ..layers.matrices import matrices_of
from ..names import clean_name
from ..optim.shards import full_shape
from .transform import Layout


class Use(NamedTuple):
    """A module whose forward pass multiplies by a parameter.

    Attributes:
        module: The module that is called.
        holder: Name of its child that holds the parameter; empty if it does so itself.
        attribute: The parameter's name there.
    """

    module: nn.Module
    holder: str
    attribute: str


class Roundable(NamedTuple):
    """A parameter that can be rounded: how its blocks lie, and all its uses."""

    layout: Layout
    uses: list[Use]


def roundable(model: nn.Module) -> dict[str, Roundable]:
    """Return by clean name the parameters of a model that can be rounded; shared ones have the first of their names.

    These are the matrices of linear layers, convolutions, ``nn.MultiheadAttention`` and embeddings, and stacks of
    matrices such as fused experts. A parameter from which ``torch.nn.utils.prune`` or a parametrization computes a
    weight is not among them.
    """
    names = {id(param): clean_name(name) for name, param in model.named_parameters()}
    # Attention multiplies by this layer's weight without calling it.
    callers = {
        id(module.out_proj): (module, "out_proj")
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    found: dict[str, Roundable] = {}
    for module in model.modules():
        attributes = {id(param): name for name, param in module._parameters.items()}
        caller, holder = callers.get(id(module), (module, ""))
        for weight, layout in _matrices(module):
            attribute = attributes[id(weight)]
            if not attribute.endswith("_orig"):
                known = found.setdefault(names[id(weight)], Roundable(layout, []))
                known.uses.append(Use(caller, holder, attribute))
    return found


def _matrices(module: nn.Module) -> Iterator[tuple[Tensor, Layout]]:
    if isinstance(module, nn.Embedding):
        if "weight" in module._parameters:
            rows, columns = full_shape(module.weight)
            yield module.weight, Layout(rows, columns, 1)
        return
    for matrix in matrices_of(module):
        shape = full_shape(matrix.weight)
        if matrix.transposed is None:
            continue
        if matrix.stacked:
            count, first, second = shape
            layout = Layout(count, first, second) if matrix.transposed else Layout(count * first, second, 1)
        else:
            rest = shape[1:].numel()
            layout = Layout(1, shape[0], rest) if matrix.transposed else Layout(shape[0], rest, 1)
        yield matrix.weight, layout
