"""Counting dead units: neurons, heads, rows, columns and ranks whose weights are all exactly zero, or unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..optim.bases import decays_to_base
from ..optim.distributed import all_sum, common_groups, local, span_of
from ..optim.param_groups import still_entries
from ..optim.shards import change_here
from ..optim.unit_kinds import ELEMENT, kind_of, n_of_m
from ..optim.unit_operations import Values, alive_units
from ..optim.units import Units, is_still, units_of


@torch.no_grad()
def count_units(
    groups: Iterable[Mapping[str, Any]],
    params: Iterable[Sequence[Tensor]] | None = None,
    changed_by: Any = None,
) -> dict[str, tuple[int, Tensor]]:
    """Count units and dead units (a 0-dim tensor) by kind in an optimizer's ``param_groups``, without a device sync.

    Layers that a target leaves alone do not count. ``params`` holds the model's parameters by group, if the groups
    hold others. Units of groups that decay to a base are dead if all their weights are equal to it; these take the
    optimizer, ``changed_by``.
    """
    groups = list(groups)
    lists = [group["params"] for group in groups] if params is None else params
    counts: dict[str, tuple[int, Tensor]] = {}
    for group, tensors in zip(groups, lists, strict=True):
        kind = kind_of(group)
        changes = Values(partial(change_here, optimizer=changed_by)) if decays_to_base(group) else None
        for layer in units_of(group) if kind != ELEMENT else ():
            if is_still(layer, still_entries(group, tensors)):
                continue
            values = None if changes is None else changes.of(layer, tensors)
            count, dead = _count_layer(layer, tensors, n_of_m(kind), values)
            earlier, earlier_dead = counts.get(kind, (0, dead.new_zeros(())))
            counts[kind] = earlier + count, earlier_dead + dead.to(earlier_dead.device)
    return counts


def _count_layer(
    layer: Units[int],
    params: Sequence[Tensor],
    blocks: tuple[int, int] | None,
    values: Mapping[int, Tensor] | None,
) -> tuple[int, Tensor]:
    if blocks is None:
        return layer.count, (~alive_units(layer, params, values)).sum()
    member = layer.members[0]
    param = params[member.param]
    here = local(param.detach()) if values is None else values[member.param]
    nonzero = here.movedim(member.dim, -1) != 0
    fits = nonzero.unflatten(-1, (-1, blocks[1])).sum(-1) <= blocks[0]
    return param.numel() // blocks[1], all_sum(fits.sum(), common_groups([span_of(param)]))
