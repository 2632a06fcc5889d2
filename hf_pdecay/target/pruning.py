"""A pruning step: the least salient weights of a budget, or its least salient units, become exactly 0.

The saliency of a weight is w² √v, as in ``control``. The saliency of a unit is the mean over its weights: the loss for
each weight, to second order, that removing them costs if they do not interact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..optim.distributed import Groups, all_sum, first_index, local, span_of
from ..optim.shards import Ranked, full_shape, ranked, second_moment
from ..optim.unit_kinds import ELEMENT, UNIT_KINDS, n_of_m
from ..optim.unit_operations import alive_units, mean_squares, weakest, weights_here
from ..optim.units import Member
from .budgets import Budget
from .ranking import Ranking, prune_least, scores
from .still import runs


@torch.no_grad()
def prune(budget: Budget, optimizer: Any, progress: float, first: Mapping[int, Tensor] | None = None) -> None:
    """Set the least salient units of a budget to 0, in place, up to a share of its target in [0, 1].

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
    """Return the fraction of a budget's units that is zero beyond its target, by a sample; negative if zeros lack."""
    zero = rank_by_magnitude(budget, optimizer).below(torch.finfo(torch.float32).tiny)
    return zero - zeros_wanted(budget, 1.0) / budget.units


def zeros_wanted(budget: Budget, progress: float) -> int:
    """Return how many of a budget's units should be zero at a share of its target, in [0, 1]."""
    count = round(budget.target * progress * budget.units)
    # One unit stays: a layer without any would pass nothing on.
    return count if budget.kind == ELEMENT or n_of_m(budget.kind) else min(count, budget.units - 1)


def zeros_in(budget: Budget, optimizer: Any) -> int:
    """Return how many of a budget's units are zero, without tensors and layers of zeros, which wait to learn."""
    if budget.kind in UNIT_KINDS:
        dead = [~alive_units(layer, params) for layer, params in budget.layers]
        return sum(int(layer.sum()) for layer in dead if not layer.all())
    counts: dict[Groups, list[Tensor]] = {}
    for tensor in _ranked_weights(budget, optimizer):
        zeros = tensor.weight.numel() - tensor.weight.count_nonzero()
        counts.setdefault(tensor.groups, []).append(torch.stack([zeros, torch.full_like(zeros, tensor.weight.numel())]))
    total = 0
    for groups, pairs in counts.items():
        device = pairs[0].device
        for zero, numel in all_sum(torch.stack([pair.to(device) for pair in pairs]), groups).tolist():
            total += zero if zero < numel else 0
    return total


def rank_by_magnitude(budget: Budget, optimizer: Any) -> Ranking:
    """Return the ranking of what the decay acts on: |w| of the weights, or the root mean squares of the units."""
    if budget.kind != ELEMENT and n_of_m(budget.kind) is None:
        return Ranking([Ranked(mean_squares(layer, params).sqrt()) for layer, params in budget.layers])
    return Ranking([tensor._replace(exp_avg_sq=None) for tensor in _ranked_weights(budget, optimizer)])


def _ranked_weights(budget: Budget, optimizer: Any) -> list[Ranked]:
    lacking = lacking_moments(budget, optimizer)
    tensors = []
    for param in budget.params:
        tensor = ranked(param, optimizer)
        tensors += _moving(tensor._replace(exp_avg_sq=None) if lacking else tensor, param, budget)
    return tensors


def _moving(tensor: Ranked, param: Tensor, budget: Budget) -> list[Ranked]:
    """Return views of the matrices of a stack that belong to a budget; a tensor that is none as it is.

    All processes get as many views, in which they hold different weights, or none.
    """
    still = budget.still.get(id(param))
    if not still:
        return [tensor]
    span = span_of(param)
    first, held = first_index(span, 0), len(tensor.weight)
    views = []
    for start, end in runs(still, full_shape(param)[0]):
        here = slice(min(max(start - first, 0), held), min(max(end - first, 0), held))
        second = tensor.exp_avg_sq
        views.append(tensor._replace(weight=tensor.weight[here], exp_avg_sq=None if second is None else second[here]))
    return views


def lacking_moments(budget: Budget, optimizer: Any) -> list[Tensor]:
    """Return the parameters of a budget that have stepped and have no second moment of each weight.

    With one of them in the budget all its weights are ranked by magnitude, as scores with and without second moments
    do not compare.
    """
    stepped = [param for param in budget.params if optimizer.state.get(param)]
    return [param for param in stepped if second_moment(param, optimizer) is None]


def _prune_share(tensors: list[Ranked], share: float) -> bool:
    """Set this share of the weights to 0, those with the least scores; return whether there are any."""
    ranking = Ranking(tensors)
    count = ranking.rank(share)
    if count:
        prune_least(tensors, ranking.least(count))
    return count > 0


def _prune_marked(budget: Budget, optimizer: Any, count: int, marks: Mapping[int, Tensor]) -> None:
    """Set marked weights to 0, unless there were more than a number of zeros then."""
    views: list[tuple[Ranked, Ranked]] = []
    for param in budget.params:
        if id(param) in marks:
            tensor = ranked(param, optimizer)._replace(exp_avg_sq=None)
            marked = _moving(tensor._replace(weight=marks[id(param)]), param, budget)
            views += zip(_moving(tensor, param, budget), marked, strict=True)
    counts: dict[Groups, Tensor] = {}
    for tensor, mark in views:
        marked_here = mark.weight.sum().cpu()
        counts[tensor.groups] = marked_here + counts[tensor.groups] if tensor.groups in counts else marked_here
    total = sum(int(all_sum(marked_here, groups)) for groups, marked_here in counts.items())
    if 0 < total <= count - zeros_in(budget, optimizer):
        for tensor, mark in views:
            tensor.weight.detach().masked_fill_(mark.weight, 0)


def _prune_units(budget: Budget, optimizer: Any, count: int) -> None:
    if not count:
        return
    with_moments = _has_second_moments(budget, optimizer)
    layer_scores = []
    known: dict[int, Tensor] = {}  # by the id of a parameter; the layers of a stack have the same ones
    for layer, params in budget.layers:
        ids = {member.param: id(params[member.param]) for member in layer.members}
        known = {key: known[key] for key in ids.values() if key in known}
        for index, key in ids.items():
            if key not in known:
                known[key] = _saliency(params[index], optimizer, with_moments)
        saliency = {index: known[key] for index, key in ids.items()}
        layer_scores.append(mean_squares(layer, params, saliency).sqrt().double().cpu())
    flat = torch.cat(layer_scores)
    dead = torch.zeros(len(flat), dtype=torch.bool)
    dead[flat.argsort(stable=True)[:count]] = True
    dead_by_layer = dead.split([layer.count for layer, _ in budget.layers])
    for (layer, params), dead_here in zip(budget.layers, dead_by_layer, strict=True):
        for member in layer.members:
            param = params[member.param]
            span = span_of(param)
            weights = weights_here(param.detach(), member, span)
            indices = dead_here.nonzero().view(-1, 1) * member.size + torch.arange(member.size) + member.offset
            # The part of the shard that this process has.
            indices = indices.view(-1) - first_index(span, member.dim)
            indices = indices[(indices >= 0) & (indices < weights.shape[member.dim])]
            weights.index_fill_(member.dim, indices.to(weights.device), 0)


def _prune_blocks(budget: Budget, optimizer: Any, progress: float, blocks: tuple[int, int]) -> None:
    """Set the least salient of each block's M - N least salient weights to 0; all of them at the whole target."""
    with_moments = _has_second_moments(budget, optimizer)
    candidates = []
    for param, member in _members(budget):
        saliency = _saliency(param, optimizer, with_moments).movedim(member.dim, -1)
        stays = ~weakest(saliency, blocks, exact=True)
        least = saliency.masked_fill(stays, torch.inf).contiguous()
        candidates.append(ranked(param, optimizer)._replace(weight=least, exp_avg_sq=None))
    moving = [
        view
        for (param, _), candidate in zip(_members(budget), candidates, strict=True)
        for view in _moving(candidate, param, budget)
    ]
    if _prune_share(moving, budget.target * progress):
        for (param, member), candidate in zip(_members(budget), candidates, strict=True):
            for weights, view in zip(
                _moving(Ranked(local(param.detach())), param, budget), _moving(candidate, param, budget), strict=True
            ):
                weights.weight.movedim(member.dim, -1).masked_fill_(view.weight == 0, 0)


def _members(budget: Budget) -> Iterator[tuple[Tensor, Member[int]]]:
    """Each parameter in which units of a budget lie, and where."""
    for layer, params in budget.layers:
        for member in layer.members:
            yield params[member.param], member


def _has_second_moments(budget: Budget, optimizer: Any) -> bool:
    has_any = any(ranked(param, optimizer).exp_avg_sq is not None for param, _ in _members(budget))
    return has_any and not lacking_moments(budget, optimizer)


def _saliency(param: Tensor, optimizer: Any, with_moments: bool) -> Tensor:
    """Scores of a parameter's weights; if others have second moments, a parameter without one has v = 0."""
    tensor = ranked(param, optimizer)
    if not with_moments:
        tensor = tensor._replace(exp_avg_sq=None)
    if with_moments and tensor.exp_avg_sq is None:
        tensor = tensor._replace(exp_avg_sq=torch.zeros_like(tensor.weight, dtype=torch.float32))
    dtype = torch.promote_types(param.dtype, torch.float32)
    return scores(tensor._replace(weight=tensor.weight.detach()), dtype)
