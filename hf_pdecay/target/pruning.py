"""A pruning step: the least salient weights of a budget, or its least salient units, become exactly 0, or their base.

The saliency of a weight is w² √v, as in ``control``, with the change w - base for w where a budget decays to a base.
The saliency of a unit is the mean over its weights: the loss for each weight, to second order, that removing them costs
if they do not interact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..optim.bases import end_
from ..optim.distributed import Groups, all_sum, first_index, span_of
from ..optim.shards import Ranked, change_here, ranked, second_moment
from ..optim.unit_kinds import ELEMENT, UNIT_KINDS, n_of_m
from ..optim.unit_operations import Values, alive_units, mean_squares, weakest, weights_here
from ..optim.units import Member, Units
from .budgets import Budget
from .ranking import Ranking, prune_least, scores
from .still import parts_without


@torch.no_grad()
def prune(budget: Budget, optimizer: Any, progress: float, first: Mapping[int, Tensor] | None = None) -> None:
    """Set the least salient units of a budget to 0 or their base, in place, up to a share of its target in [0, 1].

    Args:
        budget: The budget.
        optimizer: The optimizer, whose second moments rank weights.
        progress: The share of the target.
        first: By the ids of parameters, which of their weights here go before all others, if no more are marked in the
            budget than are to go. It is for single weights.
    """
    blocks = n_of_m(budget.kind)
    if budget.kind == ELEMENT:
        if first:
            _prune_marked(budget, optimizer, zeros_wanted(budget, progress), first)
        _prune_share(_ranked_weights(budget, optimizer), budget.target * progress)
    elif blocks is not None:
        _prune_blocks(budget, optimizer, progress, blocks)
    else:
        _prune_units(budget, optimizer, zeros_wanted(budget, progress))


def excess(budget: Budget, optimizer: Any) -> float:
    """Return the fraction of a budget's units that is zero, or unchanged, beyond its target, by a sample.

    It is negative if zeros lack.
    """
    zero = rank_by_magnitude(budget, optimizer).below(torch.finfo(torch.float32).tiny)
    return zero - zeros_wanted(budget, 1.0) / budget.units


def zeros_wanted(budget: Budget, progress: float) -> int:
    """Return how many of a budget's units should be zero, or unchanged, at a share of its target, in [0, 1]."""
    count = round(budget.target * progress * budget.units)
    # One unit stays: a layer without any would pass nothing on.
    return count if budget.kind == ELEMENT or n_of_m(budget.kind) else min(count, budget.units - 1)


def zeros_in(budget: Budget, optimizer: Any) -> int:
    """Return how many of a budget's units are zero, or unchanged, without tensors and layers that wholly are.

    Those wait to learn.
    """
    if budget.kind in UNIT_KINDS:
        dead = [~alive_units(layer, params, values) for layer, params, values in _layers(budget, optimizer)]
        return sum(int(layer.sum()) for layer in dead if not layer.all())
    counts: dict[Groups, list[Tensor]] = {}
    for tensor in _ranked_weights(budget, optimizer):
        zeros = (tensor.weight == (0 if tensor.base is None else tensor.base)).sum()
        counts.setdefault(tensor.groups, []).append(torch.stack([zeros, torch.full_like(zeros, tensor.weight.numel())]))
    total = 0
    for groups, pairs in counts.items():
        device = pairs[0].device
        for zero, numel in all_sum(torch.stack([pair.to(device) for pair in pairs]), groups).tolist():
            total += zero if zero < numel else 0
    return total


def rank_by_magnitude(budget: Budget, optimizer: Any) -> Ranking:
    """Return the ranking of what the decay acts on: |w| of the weights, or the root mean squares of the units.

    Where a budget decays to a base, those of the changes.
    """
    if budget.kind != ELEMENT and n_of_m(budget.kind) is None:
        layers = _layers(budget, optimizer)
        return Ranking([Ranked(mean_squares(layer, params, values).sqrt()) for layer, params, values in layers])
    return Ranking([tensor._replace(exp_avg_sq=None) for tensor in _ranked_weights(budget, optimizer)])


def _layers(budget: Budget, optimizer: Any) -> Iterator[tuple[Units[int], list[Tensor], Mapping[int, Tensor] | None]]:
    """The layers of units of a budget, their parameters, and the changes of these if the budget counts changes."""
    changes = Values(partial(change_here, optimizer=optimizer)) if budget.to_base else None
    for layer, params in budget.layers:
        yield layer, params, None if changes is None else changes.of(layer, params)


def _ranked_weights(budget: Budget, optimizer: Any) -> list[Ranked]:
    lacking = lacking_moments(budget, optimizer)
    tensors = []
    for param in budget.params:
        tensor = _ranked(param, budget, optimizer)
        tensors += _moving(tensor._replace(exp_avg_sq=None) if lacking else tensor, param, budget)
    return tensors


def _ranked(param: Tensor, budget: Budget, optimizer: Any) -> Ranked:
    """The weights of a parameter here, with their base if the budget decays to one."""
    tensor = ranked(param, optimizer)
    if not budget.to_base:
        return tensor._replace(base=None)
    # Before the first step nothing has changed.
    return tensor if tensor.base is not None else tensor._replace(base=tensor.weight.detach())


def _moving(tensor: Ranked, param: Tensor, budget: Budget) -> list[Ranked]:
    """Views of the matrices of a stack that belong to a budget; a tensor that is none as it is."""
    return parts_without(tensor, param, budget.still.get(id(param), ()))


def lacking_moments(budget: Budget, optimizer: Any) -> list[Tensor]:
    """Return the parameters of a budget that have stepped and have no second moment of each weight.

    With one of them in the budget all its weights are ranked by magnitude, as scores with and without second moments
    do not compare.
    """
    # A parameter may have a base before its first step.
    stepped = [param for param in budget.params if not {"base"}.issuperset(optimizer.state.get(param) or ())]
    return [param for param in stepped if second_moment(param, optimizer) is None]


def _prune_share(tensors: list[Ranked], share: float) -> bool:
    """End this share of the weights, those with the least scores; return whether there are any."""
    ranking = Ranking(tensors)
    count = ranking.rank(share)
    if count:
        prune_least(tensors, ranking.least(count))
    return count > 0


def _prune_marked(budget: Budget, optimizer: Any, count: int, marks: Mapping[int, Tensor]) -> None:
    """Set marked weights to 0 or their base, unless there were more than a number of zeros then."""
    views: list[tuple[Ranked, Ranked]] = []
    for param in budget.params:
        if id(param) in marks:
            tensor = _ranked(param, budget, optimizer)._replace(exp_avg_sq=None)
            marked = _moving(tensor._replace(weight=marks[id(param)], base=None), param, budget)
            views += zip(_moving(tensor, param, budget), marked, strict=True)
    counts: dict[Groups, Tensor] = {}
    for tensor, mark in views:
        marked_here = mark.weight.sum().cpu()
        counts[tensor.groups] = marked_here + counts[tensor.groups] if tensor.groups in counts else marked_here
    total = sum(int(all_sum(marked_here, groups)) for groups, marked_here in counts.items())
    if 0 < total <= count - zeros_in(budget, optimizer):
        for tensor, mark in views:
            end_(tensor.weight.detach(), mark.weight, tensor.base)


def _prune_units(budget: Budget, optimizer: Any, count: int) -> None:
    if not count:
        return
    with_moments = _has_second_moments(budget, optimizer)
    saliency = Values(partial(_saliency, budget=budget, optimizer=optimizer, with_moments=with_moments))
    layer_scores = [
        mean_squares(layer, params, saliency.of(layer, params)).sqrt().double().cpu() for layer, params in budget.layers
    ]
    flat = torch.cat(layer_scores)
    dead = torch.zeros(len(flat), dtype=torch.bool)
    dead[flat.argsort(stable=True)[:count]] = True
    dead_by_layer = dead.split([layer.count for layer, _ in budget.layers])
    for (layer, params), dead_here in zip(budget.layers, dead_by_layer, strict=True):
        for member in layer.members:
            param = params[member.param]
            span, base = span_of(param), _ranked(param, budget, optimizer).base
            weights = weights_here(param.detach(), member, span)
            indices = dead_here.nonzero().view(-1, 1) * member.size + torch.arange(member.size) + member.offset
            # The part of the shard that this process has.
            indices = indices.view(-1) - first_index(span, member.dim)
            indices = indices[(indices >= 0) & (indices < weights.shape[member.dim])]
            indices = indices.to(weights.device)
            if base is None:
                weights.index_fill_(member.dim, indices, 0)
            else:
                origin = weights_here(base, member, span)
                weights.index_copy_(member.dim, indices, origin.index_select(member.dim, indices))


def _prune_blocks(budget: Budget, optimizer: Any, progress: float, blocks: tuple[int, int]) -> None:
    """End the least salient of each block's M - N least salient weights; all of them at the whole target."""
    with_moments = _has_second_moments(budget, optimizer)
    candidates = []
    for param, member in _members(budget):
        saliency = _saliency(param, budget, optimizer, with_moments).movedim(member.dim, -1)
        stays = ~weakest(saliency, blocks, exact=True)
        least = saliency.masked_fill(stays, torch.inf).contiguous()
        candidates.append(ranked(param, optimizer)._replace(weight=least, exp_avg_sq=None, base=None))
    moving = [
        view
        for (param, _), candidate in zip(_members(budget), candidates, strict=True)
        for view in _moving(candidate, param, budget)
    ]
    if _prune_share(moving, budget.target * progress):
        for (param, member), candidate in zip(_members(budget), candidates, strict=True):
            stored = _ranked(param, budget, optimizer)
            for tensor, view in zip(_moving(stored, param, budget), _moving(candidate, param, budget), strict=True):
                here = tensor.viewed(partial(torch.movedim, source=member.dim, destination=-1))
                end_(here.weight, view.weight == 0, here.base)


def _members(budget: Budget) -> Iterator[tuple[Tensor, Member[int]]]:
    """Each parameter in which units of a budget lie, and where."""
    for layer, params in budget.layers:
        for member in layer.members:
            yield params[member.param], member


def _has_second_moments(budget: Budget, optimizer: Any) -> bool:
    has_any = any(ranked(param, optimizer).exp_avg_sq is not None for param, _ in _members(budget))
    return has_any and not lacking_moments(budget, optimizer)


def _saliency(param: Tensor, budget: Budget, optimizer: Any, with_moments: bool) -> Tensor:
    """Scores of a parameter's weights; if others have second moments, a parameter without one has v = 0."""
    tensor = _ranked(param, budget, optimizer)
    if not with_moments:
        tensor = tensor._replace(exp_avg_sq=None)
    if with_moments and tensor.exp_avg_sq is None:
        tensor = tensor._replace(exp_avg_sq=torch.zeros_like(tensor.weight, dtype=torch.float32))
    dtype = torch.promote_types(param.dtype, torch.float32)
    return scores(tensor._replace(weight=tensor.weight.detach()), dtype)
