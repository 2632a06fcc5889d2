"""Which weights share which target: the sparsity asked for, divided over the weights that decay.

In a run where weights decay to a base, its target is the fraction of these that end equal to it, unchanged. Weights
that decay to 0 in such a run, as of a new classifier head, never share a budget with them, and have only the targets
that rules give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..optim.bases import decays_to_base
from ..optim.param_groups import is_decayed, still_entries
from ..optim.shards import full_numel, full_shape
from ..optim.unit_kinds import ELEMENT, UNIT_KINDS, kind_of, n_of_m
from ..optim.units import Units, is_still, unit_size, units_of
from .settings import check_target
from .still import still_unchanged, still_weights


Members = list[tuple[dict[str, Any], list[Tensor]]]


@dataclass(frozen=True)
class Budget:
    """Weights that share a target, in [0, 1): the fraction of zeros, or of zero units if they decay as units.

    Where they decay to a base, it is the fraction of weights that are equal to it, or of units that wholly are.

    Args:
        members: Param groups, each with those of its parameters that belong to the budget.
        layers: The units of the budget layer by layer, each with the parameters of its param group; empty for elements.
        still: By the id of a parameter, which of its matrices do not belong to the budget, as they cannot move.
        to_base: Whether the weights decay to a base, so that the target counts unchanged weights and not zeros.
    """

    target: float
    members: Members
    kind: str = ELEMENT
    layers: Sequence[tuple[Units[int], list[Tensor]]] = ()
    still: Mapping[int, Sequence[int]] = field(default_factory=dict)
    to_base: bool = False

    @property
    def params(self) -> list[Tensor]:
        """All parameters, once for each layer of units that lies in them."""
        if self.kind == ELEMENT:
            return [param for _, params in self.members for param in params]
        return [params[member.param] for layer, params in self.layers for member in layer.members]

    @property
    def numel(self) -> int:
        """Number of weights."""
        if self.kind in UNIT_KINDS:
            return sum(layer.count * unit_size(layer, params) for layer, params in self.layers)
        return sum(map(self._numel_of, self.params))

    def _numel_of(self, param: Tensor) -> int:
        matrices = full_shape(param)[0] if id(param) in self.still else 1
        return full_numel(param) // matrices * (matrices - len(self.still.get(id(param), ())))

    @property
    def units(self) -> int:
        """Number of what the target counts: units, or weights for elements and N:M."""
        if self.kind == ELEMENT or n_of_m(self.kind) is not None:
            return self.numel
        return sum(layer.count for layer, _ in self.layers)


def divide_target(
    groups: Sequence[dict[str, Any]],
    target: float | None,
    scope: str = "global",
    params: Sequence[Sequence[Tensor]] | None = None,
) -> list[Budget]:
    """Divide the weights that decay into budgets, each with its target and units of one kind.

    A target holds for each kind separately: half of the weights that decay alone, half of the neurons. N:M implies its.
    Weights that are ``still`` (:func:`.still.mark_still`) belong to no budget. Those that decay to a base count towards
    the target all the same if they decay alone: of all weights that a run may change, so many end unchanged.

    Args:
        groups: Param groups. ``target_sparsity`` above 0 is the target of its group; 0 leaves the group to its λ_p.
        target: Fraction of zeros in all groups but those with 0; None or 0 if only the groups' own targets count. Where
            groups decay to a base, the fraction of unchanged weights in these; others have only their own targets.
        scope: ``"global"``, or ``"tensor"`` for a budget for each tensor, and for each layer of units.
        params: The model's parameters in each group, if the groups hold others.

    Raises:
        ValueError: If a target is outside [0, 1), or cannot be met beside the groups' own or the one that N:M implies.
    """
    target = check_target(target)
    by_kind: dict[tuple[str, bool], dict[float | None, Members]] = {}
    for group, tensors in zip(groups, params or [group["params"] for group in groups], strict=True):
        if not has_target(group, target, groups):
            continue
        kind = kind_of(group)
        ruled: float | None = group.get("target_sparsity")
        implied = implied_target(kind, ruled)
        aim = check_target(ruled) if implied is None else implied
        by_kind.setdefault((kind, decays_to_base(group)), {}).setdefault(aim, []).append((group, list(tensors)))
    to_base = _any_to_base(groups)
    # The kinds for which the run's target holds.
    implied_targets = {kind: implied_target(kind, None) for kind, based in by_kind if based == to_base}
    if target is not None and implied_targets and all(each not in (None, target) for each in implied_targets.values()):
        kind, implied = next(iter(implied_targets.items()))
        raise ValueError(
            f"Invalid target_sparsity: target_sparsity={target:g}, but all that decays has group={kind!r}, which "
            f"implies {implied:g}; leave the target out."
        )
    open_kinds = [kind for kind in implied_targets if kind == ELEMENT or None in by_kind[kind, to_base]]
    result: list[Budget] = []
    for (kind, based), by_target in by_kind.items():
        # If rules set all units of a kind, the target is that of the other kinds, if there are any.
        bound = based == to_base and implied_targets[kind] is None
        bound = bound and (kind == ELEMENT or None in by_target or not open_kinds)
        rest = _target_of_rest(kind, target, by_target) if target is not None and bound else 0.0
        for ruled, members in by_target.items():
            result += _budgets(kind, rest if ruled is None else ruled, members, scope)
    return [budget for budget in result if budget.numel]


def has_target(group: Mapping[str, Any], target: float | None, groups: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Whether a group has a target, of its own or that of the run, if there is one.

    Give the run's param ``groups``, as its target holds only for those that decay to a base if there are any.
    """
    ruled: float | None = group.get("target_sparsity")
    if not is_decayed(group) or ruled == 0:
        return False
    bound = decays_to_base(group) or not _any_to_base(groups)
    return bool(ruled or (target and bound) or implied_target(kind_of(group), ruled) is not None)


def _any_to_base(groups: Sequence[Mapping[str, Any]]) -> bool:
    return any(is_decayed(group) and decays_to_base(group) for group in groups)


def overall_target(
    groups: Sequence[dict[str, Any]], target: float | None, params: Sequence[Sequence[Tensor]] | None = None
) -> float | None:
    """Return the fraction of zeros asked for in all decayed weights; None if some have no target or decay as units.

    Tensors that are wholly still do not count, as in reports. In a run where weights decay to a base, it is the
    fraction of unchanged weights among those that do, still ones too.
    """
    to_base = _any_to_base(groups)
    counted = [decays_to_base(group) == to_base and is_decayed(group) for group in groups]
    if any(counts and kind_of(group) != ELEMENT for group, counts in zip(groups, counted, strict=True)):
        return None
    lists = [group["params"] for group in groups] if params is None else params
    numbers = [
        (full_numel(param), still, unchanged)
        for group, tensors, counts in zip(groups, lists, counted, strict=True)
        if counts
        for param, still, unchanged in zip(
            tensors, still_weights(group, tensors), still_unchanged(group, tensors), strict=True
        )
    ]
    decayed = sum(numel for numel, still, _ in numbers if to_base or still < numel)
    shares = [budget for budget in divide_target(groups, target, params=params) if budget.to_base == to_base]
    if not decayed or sum(budget.numel for budget in shares) != sum(numel - still for numel, still, _ in numbers):
        return None
    unchanged = sum(unchanged for *_, unchanged in numbers)
    return (sum(budget.target * budget.numel for budget in shares) + unchanged) / decayed


def implied_target(kind: str, asked: float | None) -> float | None:
    """Return the target that N:M implies, None for other kinds; raise ValueError if another one was asked for."""
    blocks = n_of_m(kind)
    if blocks is None:
        return None
    implied = 1 - blocks[0] / blocks[1]
    if asked and abs(asked - implied) > 1e-9:
        raise ValueError(
            f"Invalid target_sparsity: target_sparsity={asked!r} with group={kind!r}, which implies {implied:g}; leave "
            "the target out, or give 0 for the zeros that λ_p alone makes."
        )
    return implied


def _budgets(kind: str, target: float, members: Members, scope: str) -> list[Budget]:
    """Divide members that share a target into budgets."""
    to_base = any(decays_to_base(group) for group, _ in members)
    still = {
        id(param): entry
        for group, params in members
        for param, entry in zip(params, still_entries(group, params), strict=True)
        if isinstance(entry, list) and entry
    }
    if kind == ELEMENT:
        tensors = [
            (group, *row)
            for group, params in members
            for row in zip(params, still_weights(group, params), still_unchanged(group, params), strict=True)
        ]
        shares = [tensors] if scope == "global" else [[tensor] for tensor in tensors]
        return [_of_elements(target, share, still, to_base) for share in shares]
    layers = [
        (group, layer, params)
        for group, params in members
        for layer in units_of(group)
        if not is_still(layer, still_entries(group, params))
    ]
    if scope == "global":
        return [Budget(target, members, kind, [(layer, params) for _, layer, params in layers], still, to_base)]
    return [
        Budget(target, [(group, params)], kind, [(layer, params)], still, to_base) for group, layer, params in layers
    ]


def _of_elements(
    target: float,
    tensors: Sequence[tuple[dict[str, Any], Tensor, int, int]],
    still: Mapping[int, Sequence[int]],
    to_base: bool,
) -> Budget:
    """The budget of parameters, each given with its group, how many of its weights are still, and unchanged of these.

    Where weights decay to a base, the moving ones get the target at which all together reach ``target``.
    """
    members: Members = []
    for group, param, at_rest, _ in tensors:
        if not members or members[-1][0] is not group:
            members.append((group, []))
        if at_rest < full_numel(param):
            members[-1][1].append(param)
    budget = Budget(target, members, still=still, to_base=to_base)
    resting, moving = sum(at_rest for *_, at_rest, _ in tensors), budget.numel
    if not (to_base and resting and moving):
        return budget
    wanted = target * (moving + resting) - sum(unchanged for *_, unchanged in tensors)
    return replace(budget, target=min(max(wanted, 0.0), moving - 1) / moving)


def _target_of_rest(kind: str, target: float, by_target: Mapping[float | None, Members]) -> float:
    """The target of the groups without their own, with which all units of a kind together reach ``target``."""
    sizes = {aim: _size(kind, members) for aim, members in by_target.items()}
    total, free = sum(sizes.values()), sizes.get(None, 0)
    ruled = sum(aim * size for aim, size in sizes.items() if aim is not None)
    rest = target * total - ruled
    # The rules may already make all the zeros, but not more; and one of the other units must stay. Where some
    # are still, the others come as close as they can.
    whole = not any("still" in group for members in by_target.values() for group, _ in members)
    if whole and total and not -0.5 <= rest <= max(free - 1, 0) + 0.5:
        what = "decayed weights" if kind == ELEMENT else f"{kind}s"
        to_base = any(decays_to_base(group) for members in by_target.values() for group, _ in members)
        if free == total:
            raise ValueError(
                f"Invalid target_sparsity: target_sparsity={target!r} cannot be met: it would leave none of {total:,} "
                f"{what}{' changed' if to_base else ''}. It must be at most {(total - 1) / total:.9g} here."
            )
        raise ValueError(
            f"Invalid target_sparsity: target_sparsity={target:g} cannot be met: with the targets in lp_rules the "
            f"{what} can be from {ruled / total:.1%} to {(ruled + free) / total:.1%} "
            f"{'unchanged' if to_base else 'zeros'}. Change the target, or the targets of the rules."
        )
    rest = max(rest, 0.0) if whole else min(max(rest, 0.0), free - 1)
    return rest / free if free else 0.0


def _size(kind: str, members: Members) -> int:
    """The number of what a target of these members counts: units, or weights, with still ones that decay to a base."""
    units = sum(budget.units for budget in _budgets(kind, 0.0, members, "global"))
    if kind != ELEMENT:
        return units
    return units + sum(sum(still_weights(group, params)) for group, params in members if decays_to_base(group))
