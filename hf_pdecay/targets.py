"""Who shares which target: the sparsity that is asked for, divided over the weights that decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .decay import check_p_norm
from .shards import full_numel


BUDGETS = ("global", "tensor")


@dataclass(frozen=True)
class Budget:
    """Weights that share a target.

    Args:
        target: Fraction of them that is to be zero.
        members: Param groups, each with those of its parameters that are meant.
    """

    target: float
    members: Sequence[tuple[dict[str, Any], list[Tensor]]]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(full_numel(param) for _, params in self.members for param in params)


def budgets(
    groups: Sequence[dict[str, Any]],
    target: float | None,
    scope: str = "global",
    params: Sequence[Sequence[Tensor]] | None = None,
) -> list[Budget]:
    """Divide the weights that groups decay into budgets, each with the target that is left for it.

    Args:
        groups: Param groups; one with ``target_sparsity`` above 0 has that target, one with 0 is left to its λ_p.
        target: Fraction of zeros for the weights of all groups but those with 0; None or 0 where only the groups' own
            targets count.
        scope: ``"global"`` or ``"tensor"``.
        params: The model's parameters in each group, where the groups hold others.

    Raises:
        ValueError: If a target is outside of [0, 1), or the groups' own targets leave no such target to the others.
    """
    target = check_target(target)
    by_target: dict[float | None, list[tuple[dict[str, Any], list[Tensor]]]] = {}
    for group, some in zip(groups, params or [group["params"] for group in groups], strict=True):
        own: float | None = group.get("target_sparsity")
        if is_decayed(group) and own != 0 and (own is not None or target is not None):
            by_target.setdefault(check_target(own), []).append((group, list(some)))
    rest = 0.0 if target is None else _left(target, by_target)
    found = []
    for own, members in by_target.items():
        aim = rest if own is None else own
        if scope == "global":
            found.append(Budget(aim, members))
        else:
            found += [Budget(aim, [(group, [param])]) for group, some in members for param in some]
    return [budget for budget in found if budget.numel]


def _left(target: float, by_target: Mapping[float | None, Sequence[tuple[dict[str, Any], list[Tensor]]]]) -> float:
    """The target of the groups without one of their own, such that all of them together come to ``target``."""
    sizes = {own: Budget(0.0, members).numel for own, members in by_target.items()}
    total, free = sum(sizes.values()), sizes.get(None, 0)
    ruled = sum(own * size for own, size in sizes.items() if own is not None)
    left = target * total - ruled
    # Rules may leave nothing to the others, but not less; and a weight must be left of those others.
    if total and not -0.5 <= left <= max(free - 1, 0) + 0.5:
        raise ValueError(
            f"Invalid target_sparsity: target_sparsity={target:g} cannot be met: with the targets in lp_rules the "
            f"decayed weights can be from {ruled / total:.1%} to {(ruled + free) / total:.1%} zeros. Change the "
            "target, or those of the rules."
        )
    return max(left, 0.0) / free if free else 0.0


def check_target(target: float | None, name: str = "target_sparsity") -> float | None:
    """Return a target as a number, or None where there is none: for None and 0.

    Raises:
        ValueError: If it is outside of [0, 1).
    """
    if target is None:
        return None
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 <= target < 1:
        raise ValueError(f"Invalid {name}: {name}={target!r}; it must be at least 0 and below 1, such as 0.9 for 90%.")
    return float(target) or None


def check_budget(budget: str) -> None:
    """Raise ValueError if a budget is not one of :data:`BUDGETS`."""
    if budget not in BUDGETS:
        raise ValueError(
            f"Invalid sparsity_budget: sparsity_budget={budget!r}; it must be one of {', '.join(BUDGETS)}."
        )


def check_p_norms(p_norm: float, p_norm_begin: float | None = None, *, targeted: bool = False) -> None:
    """Check p and the p that it begins with: above 0, and where there is a target below 2.

    Raises:
        ValueError: If they are not.
    """
    for name, value in (("p_norm", p_norm), ("p_norm_begin", p_norm_begin)):
        if value is None:
            continue
        try:
            check_p_norm(value)
        except ValueError as error:
            raise ValueError(str(error).replace("p_norm", name)) from error
        if targeted and value >= 2:
            raise ValueError(
                f"Invalid {name}: {name}={value:g} with a target_sparsity; for p >= 2 decay brings no weight to 0. "
                f"Take {name} below 2, such as 0.8, or no target."
            )


def decayed_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups on which p-norm decay acts."""
    return [group for group in groups if is_decayed(group)]


def is_decayed(group: Mapping[str, Any]) -> bool:
    """Whether p-norm decay acts on a group; on one without the key ``decayed`` it does if its λ_p is above 0."""
    return "p_norm" in group and bool(group.get("decayed", group["lambda_p"] > 0))
