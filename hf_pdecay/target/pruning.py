"""The cuts of a target: the least salient weights of a budget, or its least salient groups, become exactly 0.

A weight's saliency is that of ``control``, w² √v. A group's is the sum of those of its weights, the loss to second
order that removing all of them costs where they do not interact, over their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..optim.distributed import first_index, local, span_of
from ..optim.shards import Ranked, ranked
from ..optim.unit_operations import mean_squares, weakest
from ..optim.units import ELEMENT, Member, Units, n_of_m
from .budgets import Budget
from .ranking import Ranking, prune_least, scores


@torch.no_grad()
def prune(budget: Budget, optimizer: Any, progress: float) -> None:
    """Set the least salient units of a budget to 0, in place.

    Args:
        budget: The weights.
        optimizer: Their optimizer, in whose state the second moments are.
        progress: How much of the target is asked for now, in [0, 1].
    """
    if budget.kind == ELEMENT:
        tensors = [ranked(param, optimizer) for _, params in budget.members for param in params]
        ranking = Ranking(tensors)
        count = ranking.rank(budget.target * progress)
        if count:
            prune_least(tensors, ranking.least(count))
        return
    blocks = n_of_m(budget.kind)
    if blocks is None:
        _prune_units(budget, optimizer, wanted(budget, progress))
    else:
        _prune_blocks(budget, optimizer, progress, blocks)


def excess(budget: Budget, optimizer: Any) -> float:
    """Return which fraction of a budget's units is zero beyond its target, below 0 if some are missing, by a sample."""
    there = magnitudes(budget, optimizer).below(torch.finfo(torch.float32).tiny)
    return there - wanted(budget, 1.0) / budget.units


def wanted(budget: Budget, progress: float) -> int:
    """Return how many of a budget's units are to be zero, given how much of its target is asked for."""
    count = round(budget.target * progress * budget.units)
    # Of groups one stays: a layer of which nothing is left would pass nothing on.
    return count if budget.kind == ELEMENT or n_of_m(budget.kind) else min(count, budget.units - 1)


def magnitudes(budget: Budget, optimizer: Any) -> Ranking:
    """Return what the decay acts on in a budget: |w| of its weights, or the root mean square of its groups."""
    if budget.kind != ELEMENT and n_of_m(budget.kind) is None:
        return Ranking([Ranked(root_mean_squares(each, params)) for each, params in budget.coupled])
    tensors = [ranked(param, optimizer) for _, params in budget.members for param in params]
    return Ranking([each._replace(exp_avg_sq=None) for each in tensors])


def root_mean_squares(coupled: Units[int], params: Sequence[Tensor]) -> Tensor:
    """Return the root mean square of the weights of each group, of shape ``(count,)``."""
    return mean_squares(coupled, params).sqrt()


def _prune_units(budget: Budget, optimizer: Any, count: int) -> None:
    if not count:
        return
    seconds = _has_second_moments(budget, optimizer)
    found = []
    for each, params in budget.coupled:
        salient = {
            place.param: _saliency(params[place.param], optimizer, seconds) for place in each.members
        }  # fmt: skip
        found.append(mean_squares(each, params, salient).sqrt().double().cpu())
    flat = torch.cat(found)
    dead = torch.zeros(len(flat), dtype=torch.bool)
    dead[flat.argsort(stable=True)[:count]] = True
    for (each, params), some in zip(budget.coupled, dead.split([len(one) for one in found]), strict=True):
        for place in each.members:
            param = params[place.param]
            weights = local(param.detach())
            lost = some.nonzero().view(-1, 1) * place.size + torch.arange(place.size) + place.offset
            # Of a shard those that this process has.
            lost = lost.view(-1) - first_index(span_of(param), place.dim)
            lost = lost[(lost >= 0) & (lost < weights.shape[place.dim])]
            weights.index_fill_(place.dim, lost.to(weights.device), 0)


def _prune_blocks(budget: Budget, optimizer: Any, progress: float, blocks: tuple[int, int]) -> None:
    """Set the least salient of each block's M - N least salient to 0; all of them if the target is asked for whole."""
    seconds = _has_second_moments(budget, optimizer)
    candidates = []
    for weights, place in _blocks(budget):
        salient = _saliency(weights, optimizer, seconds).movedim(place.dim, -1)
        stays = ~weakest(salient, blocks, exact=True)
        least = salient.masked_fill(stays, torch.inf).contiguous()
        candidates.append(ranked(weights, optimizer)._replace(weight=least, exp_avg_sq=None))
    ranking = Ranking(candidates)
    count = ranking.rank(budget.target * progress)
    if not count:
        return
    prune_least(candidates, ranking.least(count))
    for (weights, place), chosen in zip(_blocks(budget), candidates, strict=True):
        local(weights.detach()).movedim(place.dim, -1).masked_fill_(chosen.weight == 0, 0)


def _blocks(budget: Budget) -> Iterator[tuple[Tensor, Member[int]]]:
    for each, params in budget.coupled:
        for place in each.members:
            yield params[place.param], place


def _has_second_moments(budget: Budget, optimizer: Any) -> bool:
    return any(
        ranked(params[place.param], optimizer).exp_avg_sq is not None
        for each, params in budget.coupled
        for place in each.members
    )


def _saliency(param: Tensor, optimizer: Any, seconds: bool) -> Tensor:
    """Scores of the weights of a parameter; where others have second moments, those without one have 0."""
    own = ranked(param, optimizer)
    if seconds and own.exp_avg_sq is None:
        own = own._replace(exp_avg_sq=torch.zeros_like(own.weight, dtype=torch.float32))
    dtype = torch.promote_types(param.dtype, torch.float32)
    return scores(own._replace(weight=own.weight.detach()), dtype)
