"""Forecast before a run starts: how many zeros its λ_p can give at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..optim.decay import forecast_threshold, lambda_for_threshold
from ..optim.shards import Ranked, held
from ..optim.units import UNIT_KINDS, kind_of, units_of
from .pruning import root_mean_squares
from .ranking import Ranking


# Below this forecast a run is told that its λ_p will not make it sparse.
_HARDLY_ANY = 0.05


class DecayingGroup(NamedTuple):
    """A param group on which p-norm decay acts.

    Attributes:
        number: Its place among the optimizer's groups.
        settings: The group itself.
        params: The model's parameters in it.
    """

    number: int
    settings: Mapping[str, Any]
    params: Sequence[Tensor]


def forecast(groups: Sequence[DecayingGroup], lr_sums: Sequence[float]) -> list[str]:
    """Say beforehand, group by group, what λ_p can come to, where that is little or nothing.

    The forecast is an upper one: the weights that would be dead by the end were there no gradient to hold them up.

    Args:
        groups: Param groups that decay.
        lr_sums: Σα of each of them, the sum of the learning rates of all steps still to come.

    Returns:
        A sentence for each group of which too few weights can become zero.
    """
    sentences = []
    for (number, group, params), lr_sum in zip(groups, lr_sums, strict=True):
        p_norm, lambda_p = group["p_norm"], group["lambda_p"]
        if lambda_p == 0 or lr_sum == 0:
            continue
        settings = (
            f"p_norm={p_norm:g}, lambda_p={lambda_p:g} on the {len(params)} tensors of "
            f"{group.get('rule', f'group {number}')!r}"
        )
        if p_norm >= 2:
            sentences.append(f"{settings} give no zeros: for p >= 2 no weight reaches 0. Take p_norm below 2.")
            continue
        ranking = Ranking(_units(group, params))
        sparsity, half = ranking.below(forecast_threshold(p_norm, lambda_p, lr_sum)), ranking.quantile(0.5)
        if sparsity < _HARDLY_ANY:
            sentences.append(
                f"{settings} can zero at most {sparsity:.1%} of these {_unit_name(group)}: the learning rates of this "
                f"run add up to only {lr_sum:.3g}. For up to 50% take lambda_p of about "
                f"{lambda_for_threshold(p_norm, half, lr_sum):.2g}, or raise the learning rate."
            )
    return sentences


def _units(group: Mapping[str, Any], params: Sequence[Tensor]) -> list[Ranked]:
    """What decays as one in a param group: the weights, or groups of them by their root mean square."""
    if kind_of(group) not in UNIT_KINDS:
        return [held(param) for param in params]
    return [Ranked(root_mean_squares(each, params)) for each in units_of(group)]


def _unit_name(group: Mapping[str, Any]) -> str:
    return f"{kind_of(group)}s" if kind_of(group) in UNIT_KINDS else "weights"
