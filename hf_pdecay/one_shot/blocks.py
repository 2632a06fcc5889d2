"""Which modules of a model are its repeated blocks, and which matrices they hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ..layers.matrices import decayable_parameter_names, is_linear, matrices_of
from ..names import clean_name
from ..optim.shards import is_sharded


@dataclass(frozen=True)
class Block:
    """A block of a stack, by its name and module."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Target:
    """A parameter of a block that decays by default: one matrix, or several along dimension 0.

    Attributes:
        transposed: Whether its last dimension holds the outputs.
        linear: Whether a linear layer holds it.
    """

    name: str
    param: Tensor
    transposed: bool
    linear: bool

    @property
    def matrices(self) -> list[Tensor]:
        """Views of shape (outputs, inputs)."""
        whole = self.param.detach()
        stack = whole if whole.dim() == 3 else whole.unsqueeze(0)
        return list((stack.mT if self.transposed else stack).unbind(0))


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the entries of the ``nn.ModuleList`` that holds the most decaying weights; the outermost such list.

    Raises:
        ValueError: If there is none.
    """
    chosen = set(decayable_parameter_names(model))
    decaying = {id(param): param.numel() for name, param in model.named_parameters() if clean_name(name) in chosen}
    most, found = 0, []
    for name, module in model.named_modules():  # from the outside in
        if isinstance(module, nn.ModuleList):
            weights = sum(decaying.get(id(param), 0) for param in module.parameters())
            if weights > most:
                most, found = weights, list(_entries(clean_name(name), module))
    if not found:
        raise ValueError(
            f"{type(model).__name__} cannot be pruned block by block: no nn.ModuleList in it has matrices that decay."
        )
    return found


def _entries(name: str, module: nn.Module) -> Iterator[Block]:
    """The entries of a list, and of lists in it, which no model calls."""
    for place, entry in module.named_children():
        if isinstance(entry, nn.ModuleList):
            yield from _entries(f"{name}.{place}", entry)
        else:
            yield Block(f"{name}.{place}", entry)


def targets_of(model: nn.Module) -> dict[str, Target]:
    """Return the parameters that decay by default and are matrices or stacks of them, by name, in the model's order."""
    names = {id(param): clean_name(name) for name, param in model.named_parameters()}
    found: dict[str, Target] = {}
    for module in model.modules():
        for matrix in matrices_of(module):
            name = names.get(id(matrix.weight))
            flat = matrix.weight.dim() == 2 or matrix.stacked
            if name is not None and flat and matrix.transposed is not None:
                found[name] = Target(name, matrix.weight, matrix.transposed, is_linear(module))
    return {name: found[name] for name in decayable_parameter_names(model) if name in found}


def check_held(model: nn.Module, wanted: Collection[str]) -> None:
    """Raise ValueError if weights are sharded or not in memory."""
    for name, param in model.named_parameters():
        if clean_name(name) in wanted and (is_sharded(param) or param.is_meta):
            where = "sharded over processes" if is_sharded(param) else "on the meta device"
            raise ValueError(f"{name} is {where}; the whole model must be in the memory of one process.")
