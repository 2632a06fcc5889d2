"""Which weights share which target: the sparsity asked for, divided over the weights that decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..optim.param_groups import decayed_groups, is_decayed, still_entries
from ..optim.shards import full_numel, full_shape
from ..optim.unit_kinds import ELEMENT, UNIT_KINDS, kind_of, n_of_m
from ..optim.units import Units, is_still, unit_size, units_of
from .settings import check_target
from .still import still_weights


Members = list[tuple[dict[str, Any], list[Tensor]]]


@dataclass(frozen=True)
class Budget:
    """Weights that share a target, in [0, 1): the fraction of zeros, or of zero units if they decay as units.

    Args:
        members: Param groups, each with those of its parameters that belong to the budget.
        layers: The units of the budget layer by layer, each with the parameters of its param group; empty for elements.
        still: By the id of a parameter, which of its matrices do not belong to the budget, as they cannot move.
    """

    target: float
    members: Members
    kind: str = ELEMENT
    layers: Sequence[tuple[Units[int], list[Tensor]]] = ()
    still: Mapping[int, Sequence[int]] = field(default_factory=dict)

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
    Weights that are ``still`` (:func:`.still.mark_still`) belong to no budget.

    Args:
        groups: Param groups. ``target_sparsity`` above 0 is the target of its group; 0 leaves the group to its λ_p.
        target: Fraction of zeros in all groups but those with 0; None or 0 if only the groups' own targets count.
        scope: ``"global"``, or ``"tensor"`` for a budget for each tensor, and for each layer of units.
        params: The model's parameters in each group, if the groups hold others.

    Raises:
        ValueError: If a target is outside [0, 1), or cannot be met beside the groups' own or the one that N:M implies.
    """
    target = check_target(target)
    by_kind: dict[str, dict[float | None, Members]] = {}
    for group, tensors in zip(groups, params or [group["params"] for group in groups], strict=True):
        if not has_target(group, target):
            continue
        kind = kind_of(group)
        ruled: float | None = group.get("target_sparsity")
        implied = implied_target(kind, ruled)
        aim = check_target(ruled) if implied is None else implied
        by_kind.setdefault(kind, {}).setdefault(aim, []).append((group, list(tensors)))
    implied_targets = {kind: implied_target(kind, None) for kind in by_kind}
    if target is not None and by_kind and all(implied not in (None, target) for implied in implied_targets.values()):
        kind, implied = next(iter(implied_targets.items()))
        raise ValueError(
            f"Invalid target_sparsity: target_sparsity={target:g}, but all that decays has group={kind!r}, which "
            f"implies {implied:g}; leave the target out."
        )
    open_kinds = [kind for kind, by_target in by_kind.items() if kind == ELEMENT or None in by_target]
    result: list[Budget] = []
    for kind, by_target in by_kind.items():
        # If rules set all units of a kind, the target is that of the other kinds, if there are any.
        bound = implied_targets[kind] is None and (kind == ELEMENT or None in by_target or not open_kinds)
        rest = _target_of_rest(kind, target, by_target) if target is not None and bound else 0.0
        for ruled, members in by_target.items():
            result += _budgets(kind, rest if ruled is None else ruled, members, scope)
    return [budget for budget in result if budget.numel]


def has_target(group: Mapping[str, Any], target: float | None) -> bool:
    """Whether a group has a target, of its own or that of the run, if there is one."""
    ruled: float | None = group.get("target_sparsity")
    if not is_decayed(group) or ruled == 0:
        return False
    return bool(ruled or target or implied_target(kind_of(group), ruled) is not None)


def overall_target(
    groups: Sequence[dict[str, Any]], target: float | None, params: Sequence[Sequence[Tensor]] | None = None
) -> float | None:
    """Return the fraction of zeros asked for in all decayed weights; None if some have no target or decay as units.

    Tensors that are wholly still do not count, as in reports.
    """
    if any(kind_of(group) != ELEMENT for group in decayed_groups(groups)):
        return None
    lists = [group["params"] for group in groups] if params is None else params
    counts = [
        (full_numel(param), still)
        for group, tensors in zip(groups, lists, strict=True)
        if is_decayed(group)
        for param, still in zip(tensors, still_weights(group, tensors), strict=True)
    ]
    decayed = sum(numel for numel, still in counts if still < numel)
    shares = divide_target(groups, target, params=params)
    if not decayed or sum(budget.numel for budget in shares) != sum(numel - still for numel, still in counts):
        return None
    return sum(budget.target * budget.numel for budget in shares) / decayed


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
    still = {
        id(param): entry
        for group, params in members
        for param, entry in zip(params, still_entries(group, params), strict=True)
        if isinstance(entry, list) and entry
    }
    if kind == ELEMENT:
        moving = [
            (
                group,
                [param for param, entry in zip(params, still_entries(group, params), strict=True) if entry is not True],
            )
            for group, params in members
        ]
        if scope == "global":
            return [Budget(target, moving, still=still)]
        return [Budget(target, [(group, [param])], still=still) for group, params in moving for param in params]
    layers = [
        (group, layer, params)
        for group, params in members
        for layer in units_of(group)
        if not is_still(layer, still_entries(group, params))
    ]
    if scope == "global":
        return [Budget(target, members, kind, [(layer, params) for _, layer, params in layers], still)]
    return [Budget(target, [(group, params)], kind, [(layer, params)], still) for group, layer, params in layers]


def _target_of_rest(kind: str, target: float, by_target: Mapping[float | None, Members]) -> float:
    """The target of the groups without their own, with which all units of a kind together reach ``target``."""
    sizes = {aim: sum(b.units for b in _budgets(kind, 0.0, members, "global")) for aim, members in by_target.items()}
    total, free = sum(sizes.values()), sizes.get(None, 0)
    ruled = sum(aim * size for aim, size in sizes.items() if aim is not None)
    rest = target * total - ruled
    # The rules may already make all the zeros, but not more; and one of the other units must stay. Where some
    # are still, the others come as close as they can.
    whole = not any("still" in group for members in by_target.values() for group, _ in members)
    if whole and total and not -0.5 <= rest <= max(free - 1, 0) + 0.5:
        what = "decayed weights" if kind == ELEMENT else f"{kind}s"
        if free == total:
            raise ValueError(
                f"Invalid target_sparsity: target_sparsity={target!r} cannot be met: it would leave none of {total:,} "
                f"{what}. It must be at most {(total - 1) / total:.9g} here."
            )
        raise ValueError(
            f"Invalid target_sparsity: target_sparsity={target:g} cannot be met: with the targets in lp_rules the "
            f"{what} can be from {ruled / total:.1%} to {(ruled + free) / total:.1%} zeros. Change the target, or the "
            "targets of the rules."
        )
    rest = max(rest, 0.0) if whole else min(max(rest, 0.0), free - 1)
    return rest / free if free else 0.0
