"""Counting zeros, or unchanged weights: a model → :class:`~hf_pdecay.SparsityReport`."""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.matrices import decayable_parameter_names
from ..names import clean_name
from ..optim.backends import has_triton
from ..optim.bases import decays_to_base
from ..optim.distributed import Groups, all_sum
from ..optim.shards import full_numel, full_shape, group_params, held, is_sharded, ranked
from .defaults import NEAR_ZERO_THRESHOLD
from .report import SparsityReport, TensorSparsity, UnitSparsity


_CHUNK = 1 << 24  # weights that are counted at a time
_TEMPORARIES = 5  # bytes for each of them: its magnitude and a mask


def measure_sparsity(
    model: nn.Module,
    *,
    decayed: Collection[str] | None = None,
    near_zero_threshold: float = NEAR_ZERO_THRESHOLD,
    units: Mapping[str, tuple[int, Tensor]] | None = None,
    still: Mapping[str, int] | None = None,
    saved: Iterable[tuple[str, Tensor]] = (),
    changed_by: Any = None,
) -> SparsityReport:
    """Count the zeros of a model; counting waits for each device once.

    Args:
        model: Any module, wrapped or not. Parameters that are not floating-point (packed quantised ones) are left out,
            and a shared parameter is counted once. If processes hold shards of it, all of them must call; each counts
            its own shards, and all get the report of the whole model.
        decayed: Names of the parameters on which p-norm decay acts; those that decay by default if None.
        near_zero_threshold: Magnitude below which a non-zero weight counts as near zero.
        units: What :func:`.dead_units.count_units` returned, if weights decay as units.
        still: How many weights of a parameter, by its name, a target left alone.
        saved: Names of parameters with the weights that are counted in their place, one after the other: those of
            this process.
        changed_by: The optimizer that trains the model, to count changes: in the report zeros are then the weights that
            are equal to their base, which lies in the optimizer's state, near-zeros are changes below the threshold,
            and norms are those of the changes. What the optimizer does not train is unchanged. What it trains and does
            not let decay to a base is changed. What a target left alone is unchanged and counts, so leave ``still``
            out. Under DeepSpeed weights and bases are compared in the dtype of the model, and all processes must call,
            as for shards.
    """
    return measure_with_extra(
        model,
        decayed=decayed,
        near_zero_threshold=near_zero_threshold,
        units=units,
        still=still,
        saved=saved,
        changed_by=changed_by,
    )[0]


def measure_with_extra(
    model: nn.Module,
    *,
    decayed: Collection[str] | None = None,
    near_zero_threshold: float = NEAR_ZERO_THRESHOLD,
    extra: Sequence[int | Tensor] = (),
    units: Mapping[str, tuple[int, Tensor]] | None = None,
    still: Mapping[str, int] | None = None,
    saved: Iterable[tuple[str, Tensor]] = (),
    changed_by: Any = None,
) -> tuple[SparsityReport, list[int]]:
    """Count zeros like :func:`measure_sparsity`, and return the values of ``extra`` from the same transfer.

    ``extra`` holds integers, or 0-dim integer tensors on any device.
    """
    chosen = {clean_name(name) for name in (decayable_parameter_names(model) if decayed is None else decayed)}
    named = list(_distinct_parameters(model))
    with torch.no_grad():
        params = [param for _, param in named]
        if changed_by is None:
            owners = [held(param).groups for param in params]
            counts = _counts([held(param).weight for param in params], near_zero_threshold)
        else:
            owners, counts = _counts_of_changes(params, changed_by, near_zero_threshold)
        places = {name: place for place, (name, _) in enumerate(named)}
        for name, weights in saved:
            if name in places:
                counts[places[name]] = _count(weights, near_zero_threshold)
        _add_shards(owners, counts)
    totals = {kind: total for kind, (total, _) in (units or {}).items()}
    extra = [*(dead for _, dead in (units or {}).values()), *extra]
    rows = _to_host([*counts, *(value.reshape(1) for value in extra if isinstance(value, Tensor))])
    from_device = iter(rows[len(counts) :])
    numbers = [next(from_device)[0] if isinstance(value, Tensor) else int(value) for value in extra]
    report = SparsityReport(
        [
            TensorSparsity(
                name,
                tuple(full_shape(param)),
                full_numel(param),
                *_numbers(row),
                name in chosen,
                (still or {}).get(name, 0),
            )
            for (name, param), row in zip(named, rows, strict=False)
        ],
        near_zero_threshold,
        [UnitSparsity(kind, total, dead) for (kind, total), dead in zip(totals.items(), numbers, strict=False)],
    )
    return report, numbers[len(totals) :]


def count_tensor(tensor: Tensor, near_zero_threshold: float = NEAR_ZERO_THRESHOLD) -> tuple[int, int, int, float]:
    """Return the number of weights, exact zeros, near-zeros and the Euclidean norm of one whole tensor."""
    return tensor.numel(), *_numbers(_to_host(_counts([held(tensor).weight], near_zero_threshold))[0])


def counted_bytes(tensors: int) -> int:
    """Return the bytes of the all-reduce that adds up the counts of the shards of some tensors."""
    return 3 * 8 * tensors


def counting_temporaries(largest: int) -> int:
    """Return the bytes of temporaries, at most, of counting on a GPU, from the weights of the largest tensor."""
    return max(_TEMPORARIES * min(largest, _CHUNK), largest)  # a mask of the whole tensor


def _distinct_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Floating-point parameters, each piece of memory once even if two parameters share it."""
    seen = set()
    for name, param in model.named_parameters():
        if not param.is_floating_point():
            continue
        if not is_sharded(param) and param.numel() and param.device.type != "meta":
            storage = param.untyped_storage().data_ptr(), param.storage_offset(), tuple(param.shape), param.stride()
            if storage in seen:
                continue
            seen.add(storage)
        yield clean_name(name), param


def _counts(tensors: Sequence[Tensor], near_zero_threshold: float) -> list[Tensor]:
    """For each tensor an int64 tensor on its device: exact zeros, weights below the threshold, bits of norm²."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(number)
    counted: dict[int, Tensor] = {}
    for (device, dtype), numbers in alike.items():
        if not has_triton(device):
            continue
        from ..optim.gpu.count import count_zeros, countable  # imports triton, which takes its time

        numbers = [number for number in numbers if countable(tensors[number])]
        if numbers:
            weights = [tensors[number] for number in numbers]
            norms = torch._foreach_norm(weights, 2, dtype=torch.promote_types(dtype, torch.float32))
            squares = torch.stack(norms).double().square().view(torch.int64)
            rows = torch.cat([count_zeros(weights, near_zero_threshold), squares.unsqueeze(1)], 1)
            counted |= dict(zip(numbers, rows.unbind(0), strict=True))
    return [
        counted[number] if number in counted else _count(tensor, near_zero_threshold)
        for number, tensor in enumerate(tensors)
    ]


def _count(weights: Tensor, near_zero_threshold: float) -> Tensor:
    """Count one tensor for :func:`_counts` by plain operations."""
    zeros = weights.numel() - torch.count_nonzero(weights)
    below = torch.zeros((), dtype=torch.int64, device=weights.device)
    for piece in weights.reshape(-1).split(_CHUNK):
        below += (piece.abs() < near_zero_threshold).sum()
    norm = torch.linalg.vector_norm(weights, dtype=torch.promote_types(weights.dtype, torch.float32))
    return torch.stack([zeros, below, norm.double().square().view(torch.int64)])


def _counts_of_changes(
    params: Sequence[Tensor], optimizer: Any, near_zero_threshold: float
) -> tuple[list[Groups], list[Tensor]]:
    """What :func:`_counts` counts, of the changes of parameters, and the processes that hold shards of each."""
    trained = {
        id(param): group
        for group, tensors in zip(optimizer.param_groups, group_params(optimizer), strict=True)
        for param in tensors
    }
    owners, counts = [], []
    for param in params:
        group = trained.get(id(param))
        tensor = held(param) if group is None else ranked(param, optimizer)
        unchanged = group is None or (decays_to_base(group) and tensor.base is None)
        owners.append(tensor.groups)
        weight = tensor.weight.detach()
        if tensor.base is not None:
            counts.append(_count_changes(weight.to(param.dtype), tensor.base.to(param.dtype), near_zero_threshold))
        elif unchanged:
            counts.append(torch.tensor([weight.numel(), weight.numel(), 0], device=weight.device))
        else:
            count = _count(weight, near_zero_threshold)
            counts.append(torch.cat([torch.zeros_like(count[:2]), count[2:]]))
    return owners, counts


def _count_changes(weights: Tensor, base: Tensor, near_zero_threshold: float) -> Tensor:
    """Count one tensor for :func:`_counts_of_changes`."""
    dtype = torch.promote_types(weights.dtype, torch.float32)
    counts = torch.zeros(2, dtype=torch.int64, device=weights.device)
    square = torch.zeros((), dtype=torch.float64, device=weights.device)
    for piece, origin in zip(weights.reshape(-1).split(_CHUNK), base.reshape(-1).split(_CHUNK), strict=True):
        change = piece.to(dtype) - origin.to(dtype)
        counts += torch.stack([(piece == origin).sum(), (change.abs() < near_zero_threshold).sum()])
        square += torch.linalg.vector_norm(change).double().square()
    return torch.cat([counts, square.reshape(1).view(torch.int64)])


def _add_shards(owners: Sequence[Groups], counts: list[Tensor]) -> None:
    """Add up the counts of parameters over the processes that hold shards of them, in place in the list."""
    sharded: dict[Groups, list[int]] = {}
    for number, groups in enumerate(owners):
        if groups:
            sharded.setdefault(groups, []).append(number)
    for groups, numbers in sharded.items():
        device = counts[numbers[0]].device
        here = torch.stack([counts[number].to(device) for number in numbers], 1)
        # A float64 holds whole numbers up to 2^53, which is more than any number of weights.
        summed = all_sum(torch.cat([here[:2].double(), here[2:].view(torch.float64)]), groups)
        rows = torch.cat([summed[:2].to(torch.int64), summed[2:].view(torch.int64)])
        for number, row in zip(numbers, rows.unbind(1), strict=True):
            counts[number] = row


def _numbers(row: Sequence[int]) -> tuple[int, int, float]:
    """Exact zeros, near-zeros and the Euclidean norm, from a row of :func:`_counts`."""
    zeros, below, bits = row
    square = struct.unpack("<d", struct.pack("<q", bits))[0]
    return zeros, max(below - zeros, 0), math.sqrt(square)


def _to_host(rows: list[Tensor]) -> list[list[int]]:
    """Values of small integer tensors, with one transfer from each device."""
    by_device: dict[torch.device, list[int]] = {}
    for number, row in enumerate(rows):
        by_device.setdefault(row.device, []).append(number)
    values: list[list[int]] = [[] for _ in rows]
    for numbers in by_device.values():
        flat = torch.cat([rows[number] for number in numbers]).tolist()
        for number in numbers:
            values[number], flat = flat[: len(rows[number])], flat[len(rows[number]) :]
    return values
