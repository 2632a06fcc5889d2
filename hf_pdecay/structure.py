"""Structured decay of a model: which rule takes which groups of weights, and how many of them are dead.

The groups themselves, such as the neurons of a layer, are found in ``coupling``; how they decay is in
``optim.grouped``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .groups import Coupling, Member
from .names import clean_name
from .optim.couplings import ELEMENT, Coupled, couplings_of, kind_of, n_of_m
from .optim.distributed import all_sum, common_groups, first_index, local, span_of
from .shards import full_shape


@dataclass(frozen=True)
class Claim:
    """What a rule says of groups.

    Args:
        pattern: The rule's pattern, for messages.
        kind: What is to decay as one; ``"element"`` for a rule that has no groups, which comes first where it comes
            first.
        names: Names of the parameters that it matches.
    """

    pattern: str
    kind: str
    names: frozenset[str]


def claimed(
    model: nn.Module, claims: Sequence[Claim], trainable: Mapping[str, Tensor], default: Collection[str]
) -> list[list[Coupling]]:
    """Decide which groups each rule takes.

    A rule takes, whole, each layer's groups of its kind of which it matches a weight that decays by default, or any
    parameter if it matches none that does. A layer whose weights all belong to rules before it, without groups or with
    the same kind, it leaves to them.

    Args:
        model: Any module, wrapped or not.
        claims: The rules in their order.
        trainable: Trainable parameters by name.
        default: Names of those that decay by default.

    Returns:
        For each rule what it takes, nothing for those without groups.

    Raises:
        ValueError: If a rule finds no groups, a parameter would be in groups of two kinds or a layer's weights belong
            to several rules, or a group has weights that are not trained.
    """
    owners: dict[str, Claim] = {}
    taken: list[list[Coupling]] = []
    for claim in claims:
        if claim.kind == ELEMENT:
            for name in claim.names:
                owners.setdefault(name, claim)
            taken.append([])
            continue
        wanted = claim.names & set(default) or claim.names
        found = [each for each in _find(model, claim, wanted) if any(m.name in wanted for m in each.members)]
        own = [each for each in found if not _belongs_to_others(each, claim, owners, trainable)]
        if not own:
            raise ValueError(
                f"Invalid lp_rules: {claim.pattern!r} has group={claim.kind!r}, and "
                + (
                    "rules before it have all that it matches."
                    if found
                    else f"what it matches is in no {claim.kind}: {', '.join(sorted(wanted)[:3])}."
                )
            )
        _check_apart(claim, own)
        for each in own:
            for member in each.members:
                owners[member.name] = claim
        taken.append(own)
    return taken


def _find(model: nn.Module, claim: Claim, wanted: Collection[str]) -> list[Coupling]:
    from .coupling import find

    blocks = n_of_m(claim.kind)
    if blocks is not None:
        return _layers(model, claim.kind, wanted)
    if claim.kind not in ("row", "column"):
        return find(model, claim.kind)
    others = _layers(model, claim.kind, wanted, linear=False)
    try:
        return [*find(model, claim.kind), *others]
    except ValueError:  # no linear layer
        if others:
            return others
        raise


def _layers(model: nn.Module, kind: str, wanted: Collection[str], linear: bool = True) -> list[Coupling]:
    """Each wanted weight of a layer by itself: its outputs or inputs, or the blocks along its inputs.

    Args:
        model: The model.
        kind: ``"row"``, ``"column"`` or N:M.
        wanted: Names of parameters.
        linear: Whether linear layers are meant too.
    """
    names = {id(param): clean_name(name) for name, param in model.named_parameters()}
    found: dict[str, Coupling] = {}
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


def _indices(matrix: _Matrix, kind: str, name: str, names: Mapping[int, str]) -> Coupling:
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
    return Coupling(kind, count, tuple(members), name.removesuffix("weight").rstrip("._"))


def _check_apart(claim: Claim, couplings: Sequence[Coupling]) -> None:
    """Raise ValueError if layers share a weight, such as a bias, which would be in groups of both."""
    taken: dict[str, list[tuple[int, range, str]]] = {}
    for each in couplings:
        own = [(m.name, m.dim, range(m.offset, m.offset + each.count * m.size)) for m in each.members]
        for name, dim, span in own:
            for other_dim, other, layer in taken.get(name, []):
                if other_dim != dim or (other.start < span.stop and span.start < other.stop):
                    raise ValueError(
                        f"Invalid lp_rules: {claim.pattern!r} has group={claim.kind!r}, and {layer} and {each.name} "
                        f"share {name}, which would be in groups of both; leave one of the two out of the rule."
                    )
        for name, dim, span in own:
            taken.setdefault(name, []).append((dim, span, each.name))


def _belongs_to_others(
    coupling: Coupling, claim: Claim, owners: Mapping[str, Claim], trainable: Mapping[str, Tensor]
) -> bool:
    names = {member.name for member in coupling.members}
    frozen = sorted(names - trainable.keys())
    if frozen:
        raise ValueError(
            f"Invalid lp_rules: {claim.pattern!r} has group={claim.kind!r}, and {frozen[0]}, in which groups of "
            f"{coupling.name} lie, is not trained; set requires_grad, or leave {coupling.name} out of the rule."
        )
    others = {name: owners[name] for name in sorted(names & owners.keys())}
    matrices = {name for name in names if len(full_shape(trainable[name])) > 1}
    alike = all(other.kind in (ELEMENT, claim.kind) for other in others.values())
    if others and alike and matrices <= others.keys():
        return True
    for name, other in others.items():
        raise ValueError(
            f"Invalid lp_rules: {name} is in groups of {claim.pattern!r} (group={claim.kind!r}) and belongs to "
            f"{other.pattern!r} (group={other.kind!r}) too; it can be in one of the two only. Make one of the patterns "
            "narrower."
        )
    return False


def as_data(couplings: Iterable[Coupling], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return couplings as a param group carries them: plain data, with parameters by their index.

    Args:
        couplings: The groups.
        names: Names of the parameters of the param group, in order.
    """
    index = {name: number for number, name in enumerate(names)}
    return [
        {
            "kind": each.kind,
            "count": each.count,
            "name": each.name,
            "members": [
                {"param": index[m.name], "dim": m.dim, "size": m.size, "offset": m.offset} for m in each.members
            ],
        }
        for each in couplings
    ]


@dataclass(frozen=True)
class GroupSparsity:
    """How many groups of a kind are dead, or for N:M how many blocks have at most N weights that are not zero.

    Args:
        kind: ``"row"``, ``"column"``, ``"neuron"``, ``"head"``, ``"rank"`` or N:M.
        groups: How many there are.
        dead: How many of them have no weight but exact zeros; for N:M how many blocks fit.
    """

    kind: str
    groups: int
    dead: int

    @property
    def sparsity(self) -> float:
        """Fraction of dead groups, in [0, 1]."""
        return self.dead / self.groups if self.groups else 0.0

    @property
    def label(self) -> str:
        """The groups in the plural."""
        return f"{self.kind} blocks" if ":" in self.kind else f"{self.kind}s"

    def __str__(self) -> str:
        """Return a part of a sentence: "neurons: 50.0% of 2,048 dead"."""
        return f"{self.label}: {self.sparsity:.1%} of {self.groups:,} {'fit' if ':' in self.kind else 'dead'}"


def alive(coupled: Coupled, params: Sequence[Tensor]) -> Tensor:
    """Return which groups of a coupling have a weight that is not zero, as a bool tensor on the first one's device.

    Of sharded parameters all processes must call it, and are told the same.
    """
    found: Tensor | None = None
    spans = {place.param: span_of(params[place.param]) for place in coupled.places}
    for place in coupled.places:
        param = params[place.param]
        weights = local(param.detach())
        there = torch.zeros(param.shape[place.dim], dtype=torch.bool, device=weights.device)
        first = first_index(spans[place.param], place.dim)
        rows = (weights != 0).transpose(0, place.dim)
        there[first : first + len(rows)] = rows.flatten(1).any(1) if rows.dim() > 1 else rows
        own = there.narrow(0, place.offset, coupled.count * place.size).view(coupled.count, -1).any(1)
        found = own if found is None else found | own.to(found.device)
    if found is None:
        raise ValueError(f"{coupled!r} has no members.")
    groups = common_groups(list(spans.values()))
    return all_sum(found.to(torch.int32), groups) > 0 if groups else found


@torch.no_grad()
def count_groups(
    groups: Iterable[Mapping[str, Any]], params: Iterable[Sequence[Tensor]] | None = None
) -> dict[str, tuple[int, Tensor]]:
    """Count the groups of each kind that an optimizer decays, without a wait for the device.

    Args:
        groups: An optimizer's ``param_groups``.
        params: The model's parameters in each, where the groups hold others.

    Returns:
        Kind → how many groups there are, and how many are dead (:class:`GroupSparsity`) as a 0-dim tensor.
    """
    groups = list(groups)
    found: dict[str, tuple[int, Tensor]] = {}
    for group, some in zip(groups, [g["params"] for g in groups] if params is None else params, strict=True):
        kind = kind_of(group)
        if kind == ELEMENT:
            continue
        blocks = n_of_m(kind)
        for each in couplings_of(group):
            if blocks is None:
                units, died = each.count, (~alive(each, some)).sum()
            else:
                param = some[each.places[0].param]
                weights = local(param.detach()).movedim(each.places[0].dim, -1)
                fits = (weights != 0).unflatten(-1, (-1, blocks[1])).sum(-1) <= blocks[0]
                units = param.numel() // blocks[1]
                died = all_sum(fits.sum(), common_groups([span_of(param)]))
            total, dead = found.get(kind, (0, died.new_zeros(())))
            found[kind] = total + units, dead + died.to(dead.device)
    return found
