"""Which layers hold matrices, and where the inputs and outputs of each lie: the only list of layer types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from ..names import clean_name
from ..optim.param_groups import can_decay
from ..optim.shards import full_shape
from ..optim.unit_kinds import n_of_m
from ..optim.units import Member, Units
from .parametrized import held_parameters
from .products import products_of


Linear = nn.Linear | Conv1D


class Matrix(NamedTuple):
    """A matrix that a layer holds, or a stack of matrices, as fused experts are, and the bias of its outputs.

    Attributes:
        offset: Index in the bias of the first output.
        repeats: Number of times that the outputs come in the bias, one after the other.
        transposed: Whether its columns are the outputs; otherwise its rows are. None if they
            have several dimensions.
        stacked: Whether dimension 0 counts matrices, and biases.
    """

    weight: Tensor
    bias: Tensor | None
    offset: int = 0
    repeats: int = 1
    transposed: bool | None = False
    stacked: bool = False

    def dim(self, kind: str) -> int:
        """Return the dimension along which its ``"row"`` units lie, or for other kinds the one of its inputs."""
        return int((kind == "row") == self.transposed) + self.stacked


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
    """Yield what a layer multiplies by, without what a parametrization computes.

    These are the matrices of a linear layer, convolution or ``nn.MultiheadAttention``, and parameters of three
    dimensions that a module multiplies by as :func:`.products_of` reads it.
    """
    params = held_parameters(module)
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        for place, name in enumerate(name for name in names if name in params):
            yield Matrix(params[name], params.get("in_proj_bias"), place * module.embed_dim)
    elif is_linear(module) or isinstance(module, _ConvNd):
        if "weight" not in params:
            return
        # Each group of a transposed convolution has all indices of the weight's outputs.
        repeats = module.groups if isinstance(module, _ConvTransposeNd) else 1
        yield Matrix(params["weight"], params.get("bias"), repeats=repeats, transposed=is_transposed(module))
    else:
        solid = [name for name, param in params.items() if len(full_shape(param)) == 3 and min(full_shape(param)) > 1]
        cls: Any = type(module)  # mypy does not take a type of modules for hashable
        products = products_of(cls) if solid else {}
        for name in solid:
            if name in products:
                bias = _bias_of_stack(params, name) if products[name].stacked else None
                yield Matrix(params[name], bias, transposed=products[name].transposed, stacked=products[name].stacked)


def _bias_of_stack(params: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The biases beside a stack, one for each matrix: of two dimensions."""
    names = f"{name}_bias", f"{name.removesuffix('weight')}bias"
    return next((params[bias] for bias in names if bias in params and len(full_shape(params[bias])) == 2), None)


def matrix_units(model: nn.Module, kind: str, wanted: Set[str] | None = None) -> list[Units[str]]:
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
        first = matrices[0]
        biases = [names[id(matrix.bias)] for matrix in matrices if kind == "row" and matrix.bias is not None]
        if wanted is not None and wanted.isdisjoint({name, *biases}):
            continue
        if first.transposed is None:
            if wanted is None:
                continue
            raise ValueError(
                f"Invalid lp_rules: group={kind!r} on {name}, a matrix whose inputs or outputs have several "
                "dimensions; leave it out of the rule."
            )
        dim = first.dim(kind)
        count = full_shape(first.weight)[dim]
        if blocks is not None and count % blocks[1]:
            raise ValueError(
                f"Invalid lp_rules: group={kind!r} on {name}, whose {count} inputs are not divisible by "
                f"{blocks[1]}; leave it out of the rule."
            )
        if first.stacked and blocks is None:
            for place in range(full_shape(first.weight)[0]):
                both = Member(name, dim, matrix=place), *(Member(bias, 1, matrix=place) for bias in biases)
                units.append(Units(kind, count, both, f"{name}[{place}]"))
            continue
        members = {Member(name, dim): None}
        for matrix in matrices if kind == "row" else ():
            if matrix.bias is not None:
                offsets = (matrix.offset + part * count for part in range(matrix.repeats))
                members |= {Member(names[id(matrix.bias)], 0, offset=offset): None for offset in offsets}
        units.append(Units(kind, count, tuple(members), name if first.stacked else layers[name]))
    return units


def bias_names(model: nn.Module) -> set[str]:
    """Return the names of the biases that belong to matrices; those of a stack have two dimensions."""
    biases = {
        id(matrix.bias) for module in model.modules() for matrix in matrices_of(module) if matrix.bias is not None
    }
    return {clean_name(name) for name, param in model.named_parameters() if id(param) in biases}


def decayable_parameter_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that decay by default, in the model's order, shared ones once.

    These are the weights of ``nn.Linear`` and of its subclasses, of HF's ``Conv1D``, of convolutions and of
    ``nn.MultiheadAttention``, and parameters of three dimensions that a module multiplies by, as fused experts are. Of
    a layer under ``torch.nn.utils.prune`` it is what the mask is applied to; a layer under a parametrization has none.
    The parameters of embeddings and LM heads are left out, also if a linear layer shares them.

    Args:
        model: Any module, wrapped or not.
    """
    kept_out = {id(param) for module in _embeddings_and_heads(model) for param in module.parameters(recurse=False)}
    chosen = {id(matrix.weight) for module in model.modules() for matrix in matrices_of(module)} - kept_out
    return [clean_name(name) for name, param in model.named_parameters() if id(param) in chosen and can_decay(param)]


def _embeddings_and_heads(model: nn.Module) -> Iterator[nn.Module]:
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield module
        elif isinstance(module, PreTrainedModel):
            head = module.get_output_embeddings()
            if isinstance(head, nn.Module):
                yield from head.modules()  # PEFT wraps a head that it adapts or trains


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
