"""A forecast before a run starts: how many zeros its λ_p can give at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..optim.bases import decays_to_base
from ..optim.decay import forecast_threshold, lambda_for_threshold
from ..optim.shards import Ranked, held
from ..optim.unit_kinds import UNIT_KINDS, kind_of
from ..optim.unit_operations import mean_squares
from ..optim.units import units_of
from .ranking import Ranking


# Below this forecast the user is warned that λ_p will not make the model sparse.
_FEW = 0.05


class DecayingGroup(NamedTuple):
    """A param group on which p-norm decay acts: its index, the group itself and the model's parameters in it."""

    number: int
    settings: Mapping[str, Any]
    params: Sequence[Tensor]


def forecast(groups: Sequence[DecayingGroup], lr_sums: Sequence[float]) -> list[str]:
    """Return a warning for each param group in which λ_p can zero only few weights.

    The forecast is an upper bound: the weights that would be dead by the end if no gradient held them up. ``lr_sums``
    has the sum of each group's learning rates over all steps still to come. There is none for changes from a base, as
    they are not known before the run.
    """
    warnings = []
    for (number, group, params), lr_sum in zip(groups, lr_sums, strict=True):
        p_norm, lambda_p = group["p_norm"], group["lambda_p"]
        if lambda_p == 0 or lr_sum == 0:
            continue
        settings = (
            f"p_norm={p_norm:g}, lambda_p={lambda_p:g} on the {len(params)} tensors of "
            f"{group.get('rule', f'group {number}')!r}"
        )
        if p_norm >= 2:
            what = "unchanged weights: for p >= 2 no change" if decays_to_base(group) else "zeros: for p >= 2 no weight"
            warnings.append(f"{settings} give no {what} reaches 0. Take p_norm below 2.")
            continue
        if decays_to_base(group):
            continue
        ranking = Ranking(_units(group, params))
        sparsity, half = ranking.below(forecast_threshold(p_norm, lambda_p, lr_sum)), ranking.quantile(0.5)
        if sparsity < _FEW:
            warnings.append(
                f"{settings} can zero at most {sparsity:.1%} of these {_unit_name(group)}: the learning rates of this "
                f"run add up to only {lr_sum:.3g}. Give a target_sparsity, such as 0.5, and the run ends with as many "
                "zeros at any learning rate. Without a target, up to 50% take lambda_p of about "
                f"{lambda_for_threshold(p_norm, half, lr_sum):.2g}, or a higher learning rate."
            )
    return warnings


def _units(group: Mapping[str, Any], params: Sequence[Tensor]) -> list[Ranked]:
    """The magnitudes that decay in a param group: |w| of the weights, or the root mean squares of the units."""
    if kind_of(group) not in UNIT_KINDS:
        return [held(param) for param in params]
    return [Ranked(mean_squares(layer, params).sqrt()) for layer in units_of(group)]


def _unit_name(group: Mapping[str, Any]) -> str:
    return f"{kind_of(group)}s" if kind_of(group) in UNIT_KINDS else "weights"
