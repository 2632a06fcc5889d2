"""Counts the zeros of a model in a run, and the unchanged weights where weights decay to a base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..optim.bases import decays_to_base
from ..optim.param_groups import is_decayed
from ..optim.shards import group_params, is_sharded, settle
from ..rules.assign import decayed_parameter_names, still_by_name
from ..sparsity.counting import measure_sparsity, measure_with_extra
from ..sparsity.dead_units import count_units
from ..sparsity.report import SparsityReport


_Groups = tuple[list[Mapping[str, Any]], list[Sequence[Tensor]]]


def measure(
    model: nn.Module, optimizer: Any, near_zero_threshold: float, saved: Iterable[tuple[str, Tensor]] = ()
) -> SparsityReport:
    """Count the zeros of a model; the decayed weights are those of the optimizer if it is one of ours.

    ``saved`` is that of :func:`.counting.measure_sparsity`.
    """
    return measure_in_run(model, optimizer, near_zero_threshold, saved)[0]


def measure_in_run(
    model: nn.Module,
    optimizer: Any,
    near_zero_threshold: float,
    saved: Iterable[tuple[str, Tensor]] = (),
    extra: Sequence[int | Tensor] = (),
) -> tuple[SparsityReport, list[int]]:
    """Count like :func:`measure`, and return the values of ``extra`` as :func:`.counting.measure_with_extra` does.

    Where groups decay to a base, the report has a ``delta``; its own decayed weights are those that decay to zero, or
    whose zeros are kept.
    """
    settle(model)
    groups = [] if optimizer is None else optimizer.param_groups
    if not any("rule" in group or is_decayed(group) for group in groups):
        return measure_with_extra(model, near_zero_threshold=near_zero_threshold, extra=extra, saved=saved)
    pairs = list(zip(groups, group_params(optimizer), strict=True))
    to_zero = _parted([pair for pair in pairs if not decays_to_base(pair[0])])
    with_zeros = _parted([pair for pair in pairs if not decays_to_base(pair[0]) or pair[0]["keep_zeros"]])
    report, values = measure_with_extra(
        model,
        decayed=decayed_parameter_names(model, *with_zeros),
        near_zero_threshold=near_zero_threshold,
        extra=extra,
        units=count_units(*to_zero),
        still=still_by_name(model, *with_zeros),
        saved=saved,
    )
    to_base = _parted([pair for pair in pairs if decays_to_base(pair[0])])
    if any(map(is_decayed, to_base[0])):
        delta = measure_sparsity(
            model,
            decayed=decayed_parameter_names(model, *to_base),
            near_zero_threshold=near_zero_threshold,
            units=count_units(*to_base, changed_by=optimizer),
            changed_by=optimizer,
        )
        report = replace(report, delta=replace(delta, of_changes=True))
    return report, values


def all_must_count(model: nn.Module, optimizer: Any) -> bool:
    """Whether processes count together: those that hold shards of weights, or of bases, as DeepSpeed's do."""
    groups = [] if optimizer is None else optimizer.param_groups
    return any(map(decays_to_base, groups)) or any(is_sharded(param) for param in model.parameters())


def _parted(pairs: Iterable[tuple[Mapping[str, Any], Sequence[Tensor]]]) -> _Groups:
    """Groups, and the model's parameters in each."""
    pairs = list(pairs)
    return [group for group, _ in pairs], [params for _, params in pairs]
