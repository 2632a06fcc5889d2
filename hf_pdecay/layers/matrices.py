"""Which layers hold matrices, and where the inputs and outputs of each lie: the only list of layer types."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from ..names import clean_name
from ..optim.shards import full_shape
from ..optim.unit_kinds import n_of_m
from ..optim.units import Member, Units


Linear = nn.Linear | Conv1D


class Matrix(NamedTuple):
    """A matrix that a layer holds, and the bias of its outputs.

    Attributes:
        offset: Index in the bias of the first output.
        repeats: Number of times that the outputs come in the bias, one after the other.
        transposed: Whether its columns are the outputs; otherwise its rows are.
    """

    weight: Tensor
    bias: Tensor | None
    offset: int = 0
    repeats: int = 1
    transposed: bool = False

    def dim(self, kind: str) -> int:
        """Return the dimension along which its ``"row"`` units lie, or for other kinds the one of its inputs."""
        return int((kind == "row") == self.transposed)


def is_linear(module: nn.Module) -> TypeGuard[Linear]:
    """Whether a module is a linear layer: ``nn.Linear``, Hugging Face's ``Conv1D`` or a subclass of them."""
    return isinstance(module, Linear)


def is_plain_linear(module: nn.Module) -> TypeGuard[Linear]:
    """Whether a module is a linear layer and nothing more, as a subclass may be."""
    return type(module) in (nn.Linear, Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Whether the columns of a layer's weight are its outputs."""
    return isinstance(module, (Conv1D, _ConvTransposeNd))


def matrices_of(module: nn.Module) -> Iterator[Matrix]:
    """Yield the matrices of a linear layer, convolution or ``nn.MultiheadAttention``, without parametrized ones."""
    params = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        for place, name in enumerate(name for name in names if name in params):
            yield Matrix(params[name], params.get("in_proj_bias"), place * module.embed_dim)
    elif "weight" in params and (is_linear(module) or isinstance(module, _ConvNd)):
        # Each group of a transposed convolution has all indices of the weight's outputs.
        repeats = module.groups if isinstance(module, _ConvTransposeNd) else 1
        yield Matrix(params["weight"], params.get("bias"), repeats=repeats, transposed=is_transposed(module))


def matrix_units(model: nn.Module, kind: str, wanted: Collection[str] | None = None) -> list[Units[str]]:
    """Return the rows, columns or N:M blocks (along the inputs) of a model's matrices, shared matrices once.

    Only layers with units in one of the ``wanted`` parameters count, by name; None for all layers.

    Raises:
        ValueError: If M does not divide the inputs of a matrix.
    """
    names = {id(param): clean_name(name) for name, param in model.named_parameters()}
    alike: dict[str, list[Matrix]] = {}
    layers: dict[str, str] = {}
    for layer, module in model.named_modules():
        for matrix in matrices_of(module):
            name = names[id(matrix.weight)]
            alike.setdefault(name, []).append(matrix)
            layers.setdefault(name, clean_name(layer))
    blocks, units = n_of_m(kind), []
    for name, matrices in alike.items():
        dim = matrices[0].dim(kind)
        count = full_shape(matrices[0].weight)[dim]
        members = {Member(name, dim): None}
        for matrix in matrices if kind == "row" else ():
            if matrix.bias is not None:
                offsets = (matrix.offset + part * count for part in range(matrix.repeats))
                members |= {Member(names[id(matrix.bias)], 0, offset=offset): None for offset in offsets}
        if wanted is None or any(member.param in wanted for member in members):
            if blocks is not None and count % blocks[1]:
                raise ValueError(
                    f"Invalid lp_rules: group={kind!r} on {name}, whose {count} inputs are not divisible by "
                    f"{blocks[1]}; leave it out of the rule."
                )
            units.append(Units(kind, count, tuple(members), layers[name]))
    return units


def decayable_parameter_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that decay by default, in the model's order, shared ones once.

    These are the weights of ``nn.Linear`` and of its subclasses, of HF's ``Conv1D``, of convolutions and of
    ``nn.MultiheadAttention``, and matrices stacked in one parameter of three dimensions, as fused experts are. The
    parameters of embeddings and LM heads are left out, also if a linear layer shares them.

    Args:
        model: Any module, wrapped or not.
    """
    kept_out = {id(param) for module in _embeddings_and_heads(model) for param in module.parameters(recurse=False)}
    chosen = {id(param) for module in model.modules() for param in _matrices_or_stacks(module)} - kept_out
    return [
        clean_name(name)
        for name, param in model.named_parameters()
        if id(param) in chosen and param.is_floating_point()
    ]


def _embeddings_and_heads(model: nn.Module) -> Iterator[nn.Module]:
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield module
        elif isinstance(module, PreTrainedModel):
            head = module.get_output_embeddings()
            if isinstance(head, nn.Module):
                yield from head.modules()  # PEFT wraps a head that it adapts or trains


def _matrices_or_stacks(module: nn.Module) -> Iterator[Tensor]:
    if is_linear(module) or isinstance(module, (nn.MultiheadAttention, _ConvNd)):
        yield from (matrix.weight for matrix in matrices_of(module))
    else:
        # A position table has the shape 1 × positions × width: it is not a stack.
        for param in module.parameters(recurse=False):
            if len(full_shape(param)) == 3 and min(full_shape(param)) > 1:
                yield param


def make_linear(inputs: int, outputs: int, *, bias: bool, transposed: bool) -> Linear:
    """Return an ``nn.Linear``, or a ``Conv1D`` (always with a bias) for a transposed weight, on the meta device."""
    with torch.device("meta"):
        return Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs, bias=bias)


def update_sizes(module: nn.Module) -> None:
    """Set the sizes that a linear layer or an embedding states to those of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
