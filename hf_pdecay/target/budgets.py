"""Who shares which target: the sparsity that is asked for, divided over the weights that decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..optim.param_groups import decayed_groups, is_decayed
from ..optim.shards import full_numel
from ..optim.units import ELEMENT, Units, kind_of, n_of_m, unit_size, units_of
from .settings import check_target


Members = list[tuple[dict[str, Any], list[Tensor]]]


@dataclass(frozen=True)
class Budget:
    """Weights that share a target.

    Args:
        target: Fraction of them that is to be zero; for groups of weights the fraction of the groups.
        members: Param groups, each with those of its parameters that are meant.
        kind: What decays as one: ``"element"``, ``"row"`` and the like, or N:M.
        coupled: The groups of weights that are meant, each with the parameters of its param group; none for elements.
    """

    target: float
    members: Sequence[tuple[dict[str, Any], list[Tensor]]]
    kind: str = ELEMENT
    coupled: Sequence[tuple[Units[int], list[Tensor]]] = ()

    @property
    def numel(self) -> int:
        """Number of weights."""
        if self.kind != ELEMENT:
            return sum(each.count * unit_size(each, params) for each, params in self.coupled)
        return sum(full_numel(param) for _, params in self.members for param in params)

    @property
    def units(self) -> int:
        """Number of what is counted: groups, or weights for elements and N:M."""
        if self.kind == ELEMENT or n_of_m(self.kind) is not None:
            return self.numel
        return sum(each.count for each, _ in self.coupled)


def budgets(
    groups: Sequence[dict[str, Any]],
    target: float | None,
    scope: str = "global",
    params: Sequence[Sequence[Tensor]] | None = None,
) -> list[Budget]:
    """Divide the weights that groups decay into budgets, each with the target that is left for it.

    A budget has units of one kind, and a target holds for each kind by itself: half of the weights that decay alone,
    half of the neurons. N:M has the target that it implies.

    Args:
        groups: Param groups; one with ``target_sparsity`` above 0 has that target, one with 0 is left to its λ_p.
        target: Fraction of zeros for the weights of all groups but those with 0; None or 0 where only the groups' own
            targets count.
        scope: ``"global"``, or ``"tensor"`` for each tensor by itself, and of groups of weights for each layer.
        params: The model's parameters in each group, where the groups hold others.

    Raises:
        ValueError: If a target is outside of [0, 1), the groups' own targets leave no such target to the others, or it
            is not the one that N:M implies.
    """
    target = check_target(target)
    by_kind: dict[str, dict[float | None, Members]] = {}
    for group, some in zip(groups, params or [group["params"] for group in groups], strict=True):
        own: float | None = group.get("target_sparsity")
        kind = kind_of(group)
        if not is_decayed(group) or own == 0:
            continue
        implied = check_target_of(kind, own)
        if own is not None or implied is not None or target is not None:
            aim = check_target(own) if implied is None else implied
            by_kind.setdefault(kind, {}).setdefault(aim, []).append((group, list(some)))
    blocks = {kind: check_target_of(kind, None) for kind in by_kind}
    if target is not None and by_kind and all(each not in (None, target) for each in blocks.values()):
        kind, implied = next(iter(blocks.items()))
        raise ValueError(
            f"Invalid target_sparsity: target_sparsity={target:g} where all that decays has group={kind!r}, which is "
            f"{implied:g} by itself; leave the target out."
        )
    open_kinds = [kind for kind, by_target in by_kind.items() if kind == ELEMENT or None in by_target]
    found: list[Budget] = []
    for kind, by_target in by_kind.items():
        # Where rules set all groups of a kind, the target is that of the others, if there are any.
        bound = kind == ELEMENT or None in by_target or not open_kinds
        left = _left(kind, target, by_target) if target is not None and blocks[kind] is None and bound else 0.0
        for own, members in by_target.items():
            found += _divided(kind, left if own is None else own, members, scope)
    return [budget for budget in found if budget.numel]


def target_of_all(
    groups: Sequence[dict[str, Any]], target: float | None, params: Sequence[Sequence[Tensor]] | None = None
) -> float | None:
    """Return the fraction of all decayed weights that is to be zero; for the arguments see :func:`budgets`.

    Returns:
        None where some of them have no target, or decay in groups of weights, which have targets of their own kind.
    """
    if any(kind_of(group) != ELEMENT for group in decayed_groups(groups)):
        return None
    some = [group["params"] for group in groups] if params is None else params
    decayed = sum(
        full_numel(param) for group, each in zip(groups, some, strict=True) if is_decayed(group) for param in each
    )
    found = budgets(groups, target, params=params)
    if not decayed or sum(budget.numel for budget in found) != decayed:
        return None
    return sum(budget.target * budget.numel for budget in found) / decayed


def check_target_of(kind: str, own: float | None) -> float | None:
    """Return the target that N:M has by itself; None for other kinds.

    Args:
        kind: What decays as one.
        own: What was asked for; None or 0 for nothing.

    Raises:
        ValueError: If another one was asked for.
    """
    blocks = n_of_m(kind)
    if blocks is None:
        return None
    implied = 1 - blocks[0] / blocks[1]
    if own and abs(own - implied) > 1e-9:
        raise ValueError(
            f"Invalid target_sparsity: target_sparsity={own!r} with group={kind!r}, which is {implied:g} by itself; "
            "leave the target out, or give 0 for what λ_p alone comes to."
        )
    return implied


def _divided(kind: str, target: float, members: Members, scope: str) -> list[Budget]:
    if kind == ELEMENT:
        if scope == "global":
            return [Budget(target, members)]
        return [Budget(target, [(group, [param])]) for group, some in members for param in some]
    if scope == "global":
        coupled = [(each, some) for group, some in members for each in units_of(group)]
        return [Budget(target, members, kind, coupled)]
    return [
        Budget(target, [(group, some)], kind, [(each, some)]) for group, some in members for each in units_of(group)
    ]


def _left(kind: str, target: float, by_target: Mapping[float | None, Members]) -> float:
    """The target of the groups without one of their own, such that all of a kind together come to ``target``."""
    sizes = {
        own: sum(each.units for each in _divided(kind, 0.0, members, "global")) for own, members in by_target.items()
    }
    total, free = sum(sizes.values()), sizes.get(None, 0)
    ruled = sum(own * size for own, size in sizes.items() if own is not None)
    left = target * total - ruled
    # Rules may leave nothing to the others, but not less; and a weight must be left of those others.
    if total and not -0.5 <= left <= max(free - 1, 0) + 0.5:
        what = "decayed weights" if kind == ELEMENT else f"{kind}s"
        if free == total:
            raise ValueError(
                f"Invalid target_sparsity: target_sparsity={target!r} cannot be met: it would leave none of {total:,} "
                f"{what}. It must be at most {(total - 1) / total:.9g} here."
            )
        raise ValueError(
            f"Invalid target_sparsity: target_sparsity={target:g} cannot be met: with the targets in lp_rules the "
            f"{what} can be from {ruled / total:.1%} to {(ruled + free) / total:.1%} zeros. Change the "
            "target, or those of the rules."
        )
    return max(left, 0.0) / free if free else 0.0
