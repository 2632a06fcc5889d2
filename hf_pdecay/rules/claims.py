"""Which rule takes each parameter, and which units the rules with a ``group`` take; ``layers`` finds them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass

from torch import Tensor, nn

from ..layers.finding import find_units
from ..layers.matrices import bias_names, matrix_units
from ..optim.shards import full_shape
from ..optim.unit_kinds import ELEMENT
from ..optim.units import Units
from .spec import Rule


@dataclass(frozen=True)
class Claim:
    """A rule and the units that it takes, layer by layer; none for a rule without ``group``."""

    rule: Rule
    units: tuple[Units[str], ...] = ()

    @property
    def params(self) -> set[str]:
        """Names of the parameters in which its units lie."""
        return {member.param for layer in self.units for member in layer.members}

    def __str__(self) -> str:
        return f"{self.rule.text!r} (group={self.rule.group!r})"


def claims_by_name(
    model: nn.Module, matches: Mapping[Rule, Collection[str]], trainable: Mapping[str, Tensor], default: Collection[str]
) -> dict[str, Claim]:
    """Decide which rule takes each parameter, by name; parameters that no rule takes are left out.

    A rule without ``group`` takes the parameters that it matches and that no rule before it has. A rule with a
    ``group`` takes whole layers: all units of its kind in each layer with a parameter that it matches and that decays
    by default, or with any parameter that it matches if none of those decays by default. It skips a layer whose weights
    all belong to rules before it that have no group or the same one. What then lies in no unit needs another rule.

    ``matches`` has the names of the parameters that each rule matches; ``default``, of those that decay by default.

    Raises:
        ValueError: If a rule finds no units, a weight that it matches is in no unit and no other rule takes it, a
            parameter would be in units of two kinds, the weights of a layer belong to several rules, or a unit has
            weights that are not trained.
    """
    claims: dict[str, Claim] = {}
    biases = bias_names(model)
    wanted_by: dict[Rule, set[str]] = {}
    for rule, names in matches.items():
        if rule.group == ELEMENT:
            for name in names:
                claims.setdefault(name, Claim(rule))
            continue
        wanted = wanted_by[rule] = set(names) & set(default) or set(names)
        layers = _layers(model, rule.group, wanted)
        free = [layer for layer in layers if not _is_taken(layer, rule, claims, trainable, biases)]
        if not free:
            why = f"what it matches is in no {rule.group}: {', '.join(sorted(wanted)[:3])}."
            raise ValueError(
                f"Invalid lp_rules: {rule.text!r} has group={rule.group!r}, and "
                f"{'rules before it have all that it matches.' if layers else why}"
            )
        _check_apart(rule, free)
        claim = Claim(rule, tuple(free))
        claims.update(dict.fromkeys(claim.params, claim))
    for rule, wanted in wanted_by.items():
        left = [name for name in trainable if name in wanted and name not in claims]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ValueError(
                f"Invalid lp_rules: {rule.text!r} has group={rule.group!r} and matches {left[0]}{more}, which no "
                f"{rule.group} has; make the pattern narrower, or give the rest a rule of its own, such as 'off'."
            )
    return claims


def _layers(model: nn.Module, kind: str, wanted: Set[str]) -> list[Units[str]]:
    """The units of a kind, layer by layer, of the layers that have a wanted parameter."""
    if kind not in ("neuron", "head", "rank"):
        return matrix_units(model, kind, wanted)
    return [layer for layer in find_units(model, kind) if any(member.param in wanted for member in layer.members)]


def _check_apart(rule: Rule, layers: Sequence[Units[str]]) -> None:
    """Raise ValueError if layers share a weight, such as a bias, which would be in units of both."""
    taken: dict[tuple[str, int | None], list[tuple[int, range, str]]] = {}
    for layer in layers:
        spans = [((m.param, m.matrix), m.dim, range(m.offset, m.offset + layer.count * m.size)) for m in layer.members]
        for where, dim, span in spans:
            for other_dim, other, other_layer in taken.get(where, []):
                if other_dim != dim or (other.start < span.stop and span.start < other.stop):
                    raise ValueError(
                        f"Invalid lp_rules: {rule.text!r} has group={rule.group!r}, and {other_layer} and {layer.name} "
                        f"share {where[0]}, which would be in {rule.group}s of both; leave one of the two out of the "
                        "rule."
                    )
        for where, dim, span in spans:
            taken.setdefault(where, []).append((dim, span, layer.name))


def _is_taken(
    layer: Units[str], rule: Rule, claims: Mapping[str, Claim], trainable: Mapping[str, Tensor], biases: Set[str]
) -> bool:
    """Whether a layer belongs to rules before this one; raise ValueError if a part of it does."""
    names = {member.param for member in layer.members}
    frozen = sorted(names - trainable.keys())
    if frozen:
        raise ValueError(
            f"Invalid lp_rules: {rule.text!r} has group={rule.group!r}, and {frozen[0]}, in which {rule.group}s of "
            f"{layer.name} lie, is not trained; set requires_grad, or leave {layer.name} out of the rule."
        )
    others = {name: claims[name] for name in sorted(names & claims.keys())}
    matrices = {name for name in names - biases if len(full_shape(trainable[name])) > 1}
    alike = all(other.rule.group in (ELEMENT, rule.group) for other in others.values())
    if others and alike and matrices <= others.keys():
        return True
    for name, other in others.items():
        raise ValueError(
            f"Invalid lp_rules: {name} is claimed by {Claim(rule)} and by {other}; only one rule can have it. Make "
            "one of the patterns narrower."
        )
    return False
