"""Which weights a target leaves alone: still ones, which have had no gradient yet or are frozen.

A weight without a gradient has no saliency: by w² √v it would be the first to go, however much the model needs it. The
test is made for whole tensors, and for each matrix of a stack, as an expert to which no token was routed has a gradient
of zeros. A single weight or row without a gradient is pruned: its input or its output is always zero.

Still weights that decay to a base are left alone too. But they are equal to it, unless they were frozen after they had
moved, and a model's file shows them as unchanged. So :mod:`.budgets` counts them towards the target of single weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..optim.bases import decays_to_base
from ..optim.distributed import Groups, all_sum, first_index, local, span_of
from ..optim.moments import dequantize
from ..optim.param_groups import highest_rate, is_decayed, still_entries
from ..optim.shards import Ranked, full_numel, full_shape, group_params, is_flat_shard, ranked, second_moment
from ..optim.unit_kinds import ELEMENT, UNIT_KINDS, kind_of
from ..optim.units import Units, units_of


# Entries of an optimizer's state from which one sees that a gradient came, in the order in which they are looked at.
_TRACES = ("exp_avg_sq", "exp_avg", "momentum_buffer", "square_avg", "sum", "exp_inf")


@torch.no_grad()
def mark_still(optimizer: Any) -> None:
    """Note in each group that decays, as ``still``, which of its weights cannot move now.

    That has an entry for each parameter: True for all of it, or the indices of the matrices of a stack. A group that
    decays to a base also gets ``still_unchanged``, by parameter how many of these weights are equal to it. All
    processes that hold shards must call, and get the same. Waits for the device.
    """
    groups, lists = optimizer.param_groups, group_params(optimizer)
    frozen = _frozen(groups)
    decayed = [
        (group, params, rests) for group, params, rests in zip(groups, lists, frozen, strict=True) if is_decayed(group)
    ]
    stacks = {id(param): full_shape(param)[0] for group, params, _ in decayed for param in _stacks(group, params)}
    moved = _moved([param for _, params, _ in decayed for param in params], stacks, optimizer)
    for group, params, rests in decayed:
        at_rest = {id(param): rests or not param.requires_grad for param in params}
        parts = {key: [not hit or at_rest[key] for hit in moved[key]] for key in at_rest}
        if kind_of(group) in UNIT_KINDS:
            for layer in units_of(group):
                _mark_layer(layer, params, at_rest, moved, parts)
        group["still"] = [_entry(parts[id(param)]) for param in params]
        if decays_to_base(group) and kind_of(group) == ELEMENT:
            group["still_unchanged"] = _unchanged(group, params, optimizer)


def still_unchanged(group: Mapping[str, Any], params: Sequence[Tensor]) -> list[int]:
    """Return for each parameter of a group how many of its still weights are equal to their base, as noted."""
    numbers: list[int] = group.get("still_unchanged") or []
    return numbers if len(numbers) == len(params) else [0] * len(params)


def parts_without(tensor: Ranked, param: Tensor, left_out: Sequence[int]) -> list[Ranked]:
    """Return views of the matrices of a stack but those left out, by their indices; without such the tensor itself.

    All processes get as many views, in which they hold different weights, or none.
    """
    if not left_out:
        return [tensor]
    first, held = first_index(span_of(param), 0), len(tensor.weight)
    runs = _runs(left_out, full_shape(param)[0])
    bounds = [(min(max(start - first, 0), held), min(max(end - first, 0), held)) for start, end in runs]
    return [tensor.viewed(itemgetter(slice(*bound))) for bound in bounds]


def still_weights(group: Mapping[str, Any], params: Sequence[Tensor]) -> list[int]:
    """Return for each parameter of a group how many of its weights are still, as :func:`mark_still` has noted."""
    return [
        full_numel(param) if entry is True else full_numel(param) // full_shape(param)[0] * len(entry) if entry else 0
        for entry, param in zip(still_entries(group, params), params, strict=True)
    ]


def _unchanged(group: Mapping[str, Any], params: Sequence[Tensor], optimizer: Any) -> list[int]:
    """How many still weights of each parameter of a group are equal to their base."""
    counts = [0] * len(params)
    here: dict[Groups, list[tuple[int, Tensor]]] = {}
    for index, (param, entry) in enumerate(zip(params, still_entries(group, params), strict=True)):
        if not entry:
            continue
        tensor = ranked(param, optimizer)
        others = [] if entry is True else [each for each in range(full_shape(param)[0]) if each not in entry]
        parts = parts_without(tensor, param, others)
        same = [
            torch.full((), part.weight.numel(), device=part.weight.device)
            if part.base is None
            else (part.weight == part.base).sum()
            for part in parts
        ]
        here.setdefault(tensor.groups, []).append((index, torch.stack(same).sum()))
    for groups, numbers in here.items():
        device = numbers[0][1].device
        sums = all_sum(torch.stack([number.to(device) for _, number in numbers]), groups).tolist()
        for (index, _), number in zip(numbers, sums, strict=True):
            counts[index] = number
    return counts


def _runs(left_out: Iterable[int], count: int) -> Iterator[tuple[int, int]]:
    """Yield the first index and the end of each run of the indices below ``count`` that are not left out."""
    start = 0
    for index in (*sorted(left_out), count):
        if index > start:
            yield start, index
        start = index + 1


def _frozen(groups: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether each group has a learning rate of 0."""
    rates = [float(group["lr"]) for group in groups]
    if any(rates):
        return [rate == 0 for rate in rates]
    # As at the first step of a warm-up, or after the last step: what could move before can still.
    return [highest_rate(group) <= 0 or all(entry is True for entry in group.get("still") or [[]]) for group in groups]


def _stacks(group: Mapping[str, Any], params: Sequence[Tensor]) -> Iterator[Tensor]:
    """The parameters that are stacks of matrices, and the biases of such."""
    yield from (param for param in params if len(full_shape(param)) == 3)
    if kind_of(group) in UNIT_KINDS:
        for layer in units_of(group):
            yield from (params[member.param] for member in layer.members if member.matrix is not None)


def _mark_layer(
    layer: Units[int],
    params: Sequence[Tensor],
    frozen: Mapping[int, bool],
    moved: Mapping[int, Sequence[bool]],
    parts: Mapping[int, list[bool]],
) -> None:
    """Units go as one: they are still if any of their weights is frozen, or none has had a gradient."""
    places = []
    for member in layer.members:
        key = id(params[member.param])
        places += [(key, index) for index in (range(len(parts[key])) if member.matrix is None else [member.matrix])]
    still = any(frozen[key] for key, _ in places) or not any(moved[key][index] for key, index in places)
    for key, index in places:
        parts[key][index] = still


def _entry(parts: Sequence[bool]) -> bool | list[int]:
    return True if all(parts) else [index for index, still in enumerate(parts) if still]


def _moved(params: Sequence[Tensor], stacks: Mapping[int, int], optimizer: Any) -> dict[int, list[bool]]:
    """Say for each parameter, by its id, whether it has had a gradient; for each matrix of a stack if there are any."""
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    known = not any("dormant" in state for state in states)  # no step was made: nothing is known
    moved = {id(param): [known] * stacks.get(id(param), 1) for param in params}
    if known:
        return moved
    for number in range(len(_TRACES)):
        signs: dict[Groups, list[tuple[int, Tensor]]] = {}
        for param in params:
            key = id(param)
            if all(moved[key]):
                continue
            found, groups = _sign(param, len(moved[key]), optimizer, number)
            if isinstance(found, Tensor):
                signs.setdefault(groups, []).append((key, found))
            elif found:
                moved[key] = [True] * len(moved[key])
        if not signs:
            break
        for groups, found_here in signs.items():
            device = found_here[0][1].device
            sums = all_sum(torch.cat([sign.to(device) for _, sign in found_here]).to(torch.int64), groups).tolist()
            for key, sign in found_here:
                hits, sums = sums[: len(sign)], sums[len(sign) :]
                moved[key] = [before or hit > 0 for before, hit in zip(moved[key], hits, strict=True)]
    if not any(map(any, moved.values())):
        # An optimizer may not fill its traces, as one whose momentum is 0: what has stepped may have moved. If second
        # moments are 0, all steps were skipped.
        unknown = [param for param in params if not is_flat_shard(param) and second_moment(param, optimizer) is None]
        moved |= {id(param): [True] * len(moved[id(param)]) for param in unknown if _has_stepped(param, optimizer)}
    return moved


def _has_stepped(param: Any, optimizer: Any) -> bool:
    return is_flat_shard(param) or "dormant" in (optimizer.state.get(param) or {})


def _sign(param: Any, parts: int, optimizer: Any, number: int) -> tuple[Tensor | bool, Groups]:
    """Whether this process sees, in the trace of a number, that the parts of a parameter have had a gradient."""
    if is_flat_shard(param):
        return _sign_in_flat_shard(param, parts, optimizer, number)
    if not _has_stepped(param, optimizer):
        return False, ()
    state = optimizer.state[param]
    traces = [state[name] for name in _TRACES if isinstance(state.get(name), Tensor)]
    traces = [trace for trace in traces if trace.shape == param.shape]
    if not traces:
        return True, ()
    if number >= len(traces):
        return False, ()
    trace = local(traces[number])
    trace = dequantize(trace, torch.promote_types(trace.dtype, torch.float32))
    groups = ranked(param, optimizer).groups
    if parts == 1:
        return trace.any().reshape(1), groups
    seen = trace.flatten(1).any(1)
    span = span_of(param) if groups else None
    if span is None or span.dim != 0:
        return seen, groups
    whole = seen.new_zeros(parts)
    whole[span.start : span.start + len(seen)] = seen
    return whole, groups


def _sign_in_flat_shard(param: Any, parts: int, optimizer: Any, number: int) -> tuple[Tensor | bool, Groups]:
    """The same under DeepSpeed, which lays weights end to end, and gives those without a gradient one of zeros."""
    if number:
        return False, ()
    if not any("exp_avg_sq" in state for state in optimizer.state.values()):
        return True, ()
    shard = ranked(param, optimizer)
    seen = shard.weight.new_zeros(()) if shard.exp_avg_sq is None else shard.exp_avg_sq.any()
    return seen.bool().expand(parts), shard.groups
