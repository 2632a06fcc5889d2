"""Structured decay of a model: which rule takes which groups of weights, and how many of them are dead.

The groups themselves, such as the neurons of a layer, are found in ``coupling``; how they decay is in
``optim.grouped``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..layers.finding import find_units
from ..layers.matrices import matrix_units
from ..optim.shards import full_shape
from ..optim.units import ELEMENT, Units


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
) -> list[list[Units[str]]]:
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
    taken: list[list[Units[str]]] = []
    for claim in claims:
        if claim.kind == ELEMENT:
            for name in claim.names:
                owners.setdefault(name, claim)
            taken.append([])
            continue
        wanted = claim.names & set(default) or claim.names
        if claim.kind in ("neuron", "head", "rank"):
            units = find_units(model, claim.kind)
            found = [each for each in units if any(m.param in wanted for m in each.members)]
        else:
            found = matrix_units(model, claim.kind, wanted)
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
                owners[member.param] = claim
        taken.append(own)
    return taken


def _check_apart(claim: Claim, units: Sequence[Units[str]]) -> None:
    """Raise ValueError if layers share a weight, such as a bias, which would be in groups of both."""
    taken: dict[str, list[tuple[int, range, str]]] = {}
    for each in units:
        own = [(m.param, m.dim, range(m.offset, m.offset + each.count * m.size)) for m in each.members]
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
    coupling: Units[str], claim: Claim, owners: Mapping[str, Claim], trainable: Mapping[str, Tensor]
) -> bool:
    names = {member.param for member in coupling.members}
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


def as_data(units: Iterable[Units[str]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return units as a param group carries them: plain data, with parameters by their index.

    Args:
        units: The groups.
        names: Names of the parameters of the param group, in order.
    """
    index = {name: number for number, name in enumerate(names)}
    return [
        {
            "kind": each.kind,
            "count": each.count,
            "name": each.name,
            "members": [
                {"param": index[m.param], "dim": m.dim, "size": m.size, "offset": m.offset} for m in each.members
            ],
        }
        for each in units
    ]
