"""Which weights of a model are matrices, and where their inputs and outputs lie."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..names import clean_name
from ..optim.shards import full_shape
from ..optim.units import Member, Units, n_of_m


def _layers(model: nn.Module, kind: str, wanted: Collection[str], linear: bool = True) -> list[Units[str]]:
    """Each wanted weight of a layer by itself: its outputs or inputs, or the blocks along its inputs.

    Args:
        model: The model.
        kind: ``"row"``, ``"column"`` or N:M.
        wanted: Names of parameters.
        linear: Whether linear layers are meant too.
    """
    names = {id(param): clean_name(name) for name, param in model.named_parameters()}
    found: dict[str, Units[str]] = {}
    for module in model.modules():
        for matrix in _matrices(module, linear):
            name = names.get(id(matrix.weight))
            if name is not None and name in wanted and name not in found:
                found[name] = _indices(matrix, kind, name, names)
    return list(found.values())


class _Matrix(NamedTuple):
    """A weight of a layer.

    Attributes:
        weight: The weight.
        bias: The bias of its outputs, if there is one, and where in it they begin.
        offset: See there.
        repeats: How often an index of its outputs comes in the bias.
        turned: Whether its outputs are its columns.
    """

    weight: Tensor
    bias: Tensor | None
    offset: int = 0
    repeats: int = 1
    turned: bool = False


def _matrices(module: nn.Module, linear: bool) -> Iterator[_Matrix]:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.MultiheadAttention):
        parts = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        for place, weight in enumerate(parts if module.in_proj_weight is None else (module.in_proj_weight,)):
            yield _Matrix(weight, module.in_proj_bias, place * module.embed_dim)
    elif isinstance(module, _ConvTransposeNd):
        # An index of the weight is an output of each of the convolution's own groups.
        yield _Matrix(module.weight, module.bias, repeats=module.groups, turned=True)
    elif isinstance(module, _ConvNd) or (linear and isinstance(module, (nn.Linear, Conv1D))):
        yield _Matrix(module.weight, module.bias, turned=isinstance(module, Conv1D))


def _indices(matrix: _Matrix, kind: str, name: str, names: Mapping[int, str]) -> Units[str]:
    """What the indices of a weight's outputs or inputs are, or the blocks along its inputs."""
    dim = int((kind == "row") == matrix.turned)
    count = full_shape(matrix.weight)[dim]
    blocks = n_of_m(kind)
    if blocks is not None and count % blocks[1]:
        raise ValueError(
            f"Invalid lp_rules: group={kind!r} on {name}, whose {count} inputs are not divisible by {blocks[1]}; "
            "leave it out of the rule."
        )
    members = [Member(name, dim)]
    if kind == "row" and matrix.bias is not None:
        offsets = (matrix.offset + part * count for part in range(matrix.repeats))
        members += [Member(names[id(matrix.bias)], 0, offset=offset) for offset in offsets]
    return Units(kind, count, tuple(members), name.removesuffix("weight").rstrip("._"))


def decayable_parameter_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that decay by default, in the model's order, shared ones once.

    These are the weights of ``nn.Linear`` and of its subclasses, of HF's ``Conv1D``, of convolutions and of
    ``nn.MultiheadAttention``, and matrices stacked in one parameter of three dimensions, as fused experts are. What an
    embedding or an LM head owns is left out, also where it is shared with a linear layer.

    Args:
        model: Any module, wrapped or not.
    """
    kept_out = {id(param) for module in _embeddings_and_heads(model) for param in module.parameters(recurse=False)}
    chosen = {
        id(param) for module in model.modules() for param in _decayable_params(module) if id(param) not in kept_out
    }
    return [clean_name(name) for name, param in model.named_parameters() if id(param) in chosen]


def _embeddings_and_heads(model: nn.Module) -> Iterator[nn.Module]:
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield module
        elif isinstance(module, PreTrainedModel):
            head = module.get_output_embeddings()
            if isinstance(head, nn.Module):
                yield from head.modules()  # PEFT wraps a head that it adapts or trains


def _decayable_params(module: nn.Module) -> Iterator[Tensor]:
    from transformers.pytorch_utils import Conv1D

    own = module.named_parameters(recurse=False)
    if isinstance(module, (nn.Linear, Conv1D, _ConvNd)):
        found = (param for name, param in own if name == "weight")
    elif isinstance(module, nn.MultiheadAttention):
        found = (param for _, param in own if len(full_shape(param)) == 2)
    else:
        # A position table is stored as 1 × positions × width: no stack.
        found = (param for _, param in own if len(full_shape(param)) == 3 and min(full_shape(param)) > 1)
    return (param for param in found if param.is_floating_point())
