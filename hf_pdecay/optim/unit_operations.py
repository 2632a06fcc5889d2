"""Operations on units in plain torch: mean squares, which units are alive, and multiplication by factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from .bases import change, decayed
from .decay import shrink_factor
from .distributed import Span, all_sum, common_groups, first_index, local, span_of
from .foreach import chunk_size
from .rounding import LOW_PRECISION, noise_bits, stochastic_round
from .units import Member, Units, unit_size


def mean_squares(
    units: Units[int], params: Sequence[Tensor], values: Mapping[int, Tensor] | Sequence[Tensor] | None = None
) -> Tensor:
    """Return the mean square of each unit, summed over all processes, on the device of the first member.

    ``values`` replace the weights: by the index of a parameter, a tensor of the shape of this process's weights.
    """
    device = params[units.members[0].param].device
    spans = {member.param: span_of(params[member.param]) for member in units.members}
    total: Tensor | float = 0.0
    for member in units.members:
        value, span = (params if values is None else values)[member.param].detach(), spans[member.param]
        here = weights_here(value, member, span)
        if span is None:
            sums = _square_sums(here.narrow(member.dim, member.offset, units.count * member.size), member.dim)
        else:
            sums = _square_sums(here, member.dim)
            sums = _of_whole(sums, member, units.count, params[member.param].shape[member.dim], span)
        if member.size > 1:
            sums = sums.view(-1, member.size).sum(1)
        total = sums.to(device) + total
    total = all_sum(torch.as_tensor(total), common_groups(list(spans.values())))
    return total / unit_size(units, params)


class Values:
    """Values of the weights of layers, such as their changes, computed once for layers in the same parameters.

    Args:
        make: Returns the values of a parameter, a tensor of the shape of this process's weights.
    """

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self._make = make
        self._known: dict[int, Tensor] = {}  # by the id of a parameter; of the last layer alone, to save memory

    def of(self, units: Units[int], params: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the values of the parameters in which the units of a layer lie, by their indices."""
        ids = {member.param: id(params[member.param]) for member in units.members}
        self._known = {key: self._known[key] for key in ids.values() if key in self._known}
        for index, key in ids.items():
            if key not in self._known:
                self._known[key] = self._make(params[index])
        return {index: self._known[key] for index, key in ids.items()}


def alive_units(units: Units[int], params: Sequence[Tensor], values: Mapping[int, Tensor] | None = None) -> Tensor:
    """Return which units have a non-zero weight. All processes that hold shards must call it, and get the same.

    ``values`` replace the weights, as in :func:`mean_squares`.
    """
    device = params[units.members[0].param].device
    alive = torch.zeros(units.count, dtype=torch.bool, device=device)
    for member in units.members:
        value = None if values is None else values[member.param]
        alive |= alive_here(params[member.param], member, units.count, value).to(device)
    groups = common_groups([span_of(params[member.param]) for member in units.members])
    return all_sum(alive.to(torch.int32), groups) > 0


def alive_here(param: Tensor, member: Member[Any], count: int, values: Tensor | None = None) -> Tensor:
    """Return which of ``count`` units have a non-zero weight in the part of a parameter that this process holds.

    ``values`` replace the weights that it holds.
    """
    span = span_of(param)
    weights = weights_here(param.detach() if values is None else values, member, span)
    if span is None:
        weights = weights.narrow(member.dim, member.offset, count * member.size)
    nonzero = (weights != 0).transpose(0, member.dim)
    nonzero = nonzero.flatten(1).any(1) if nonzero.dim() > 1 else nonzero
    if span is not None:
        nonzero = _of_whole(nonzero, member, count, param.shape[member.dim], span)
    return nonzero.view(count, -1).any(1)


def weights_here(weights: Tensor, member: Member[Any], span: Span | None) -> Tensor:
    """Return this process's weights of a parameter, or of a matrix in it, as a view: none if another has the matrix."""
    here = local(weights)
    if member.matrix is None:
        return here
    place = member.matrix - first_index(span, 0)
    return here.narrow(0, place, 1) if 0 <= place < len(here) else here.narrow(0, 0, 0)


def _of_whole(here: Tensor, member: Member[Any], count: int, length: int, span: Span) -> Tensor:
    """Values for all indices in which the units lie, from those of this process; 0 for the others."""
    whole = here.new_zeros(length)
    first = first_index(span, member.dim)
    whole[first : first + len(here)] = here
    return whole.narrow(0, member.offset, count * member.size)


def _square_sums(weights: Tensor, dim: int) -> Tensor:
    """The sum of the squares at each index of a dimension, in float32, or in float64 for float64 weights."""
    dtype = torch.promote_types(weights.dtype, torch.float32)
    others = [other for other in range(weights.dim()) if other != dim]
    if not others:
        return weights.to(dtype).square()
    if not weights.is_cpu or weights.stride(dim) == max(weights.stride()):
        return torch.linalg.vector_norm(weights, dim=others, dtype=dtype).square_()
    # torch's norm along any but the last dimension takes ten times as long on a CPU.
    sums = torch.zeros(weights.shape[dim], dtype=dtype)
    for piece, _ in _pieces(weights, dim):
        sums += piece.to(dtype).square().sum(others)
    return sums


def _pieces(weights: Tensor, dim: int, block: int = 1) -> Iterator[tuple[Tensor, slice]]:
    """Views of a bounded number of weights, each with its slice of dimension ``dim``, a multiple of ``block`` long."""
    size = chunk_size(weights.device)
    whole = slice(None)
    if weights.numel() <= size:
        yield weights, whole
        return
    axis = max(range(weights.dim()), key=weights.stride)
    step = max(1, size * weights.shape[axis] // weights.numel())
    if axis == dim:
        step = -(-step // block) * block
    for start in range(0, weights.shape[axis], step):
        extent = min(step, weights.shape[axis] - start)
        yield weights.narrow(axis, start, extent), slice(start, start + extent) if axis == dim else whole


def scale(
    weights: Tensor,
    dim: int,
    factor: Tensor,
    noise: tuple[int, int | Tensor],
    first: int = 0,
    base: Tensor | None = None,
) -> None:
    """Multiply weights, or their changes from a base, by factors along a dimension, in place.

    ``noise`` has the place of the tensor and its step, ``first`` the place of the first weight, for the random bits.
    """
    shape = [1] * weights.dim()
    shape[dim] = -1
    bases = repeat((None, None)) if base is None else _pieces(base, dim)
    for (piece, span), (base_piece, _) in zip(_pieces(weights, dim), bases, strict=False):
        _multiply(piece, factor[span].view(shape), *noise, first, base_piece)
        first += piece.numel()


def _multiply(
    piece: Tensor, factor: Tensor, noise_place: int, step: int | Tensor, first: int, base: Tensor | None = None
) -> None:
    """Multiply weights or changes, with stochastic rounding in low precision; subnormal results become 0."""
    low = piece.dtype in LOW_PRECISION
    working = piece.to(torch.float32) if low else piece
    if base is not None:
        bits = noise_bits(step, noise_place, first, piece.numel(), piece.device) if low else None
        rounded = None if bits is None else partial(stochastic_round, dtype=piece.dtype, noise=bits)
        # A unit lives as one, so it does not matter whether single changes are rounded to 0.
        nothing = torch.zeros((), dtype=working.dtype, device=piece.device)
        piece.copy_(decayed(working, nothing, factor, base, rounded))
        return
    working.mul_(factor)
    tiny = torch.finfo(working.dtype).tiny
    torch.ops.aten.hardshrink.out(working, tiny * (1 - 2.0**-20), out=working)
    if low:
        noise = noise_bits(step, noise_place, first, piece.numel(), piece.device)
        piece.copy_(stochastic_round(working, piece.dtype, noise))


def decay_weakest(
    weights: Tensor,
    before: Tensor,
    dim: int,
    blocks: tuple[int, int],
    p_norm: float,
    alpha_lambda: float | Tensor,
    finite: bool | Tensor,
    noise: tuple[int, int | Tensor],
    base: Tensor | None = None,
) -> None:
    """Decay the weights that were the M - N weakest of M before the step, or changed least, each by its own factor."""
    first = 0
    tensors = (weights, before) if base is None else (weights, before, base)
    cut = [_pieces(tensor.movedim(dim, -1), tensor.dim() - 1, blocks[1]) for tensor in tensors]
    for (piece, _), (was, _), *rest in zip(*cut, strict=True):
        base_piece = rest[0][0] if rest else None
        magnitude = change(was, base_piece, torch.promote_types(was.dtype, torch.float32)).abs()
        factor = shrink_factor(magnitude, p_norm, alpha_lambda)
        stays = ~weakest(magnitude, blocks)
        if isinstance(finite, Tensor):
            stays |= ~finite.to(stays.device)
        _multiply(piece, factor.masked_fill_(stays, 1), *noise, first, base_piece)
        first += piece.numel()


def weakest(scores: Tensor, blocks: tuple[int, int], *, exact: bool = False) -> Tensor:
    """Return which scores are among the M - N least of their block of M along the last dimension.

    Args:
        scores: At least 0, of any shape whose last dimension is divisible by M.
        blocks: N and M.
        exact: Take exactly M - N, also between equal scores. Otherwise a score stays if it equals one that stays.
    """
    n, m = blocks
    split = scores.unflatten(-1, (-1, m))
    if exact:
        order = split.argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(split, dtype=torch.bool).scatter_(-1, order[..., n:], True).flatten(-2)
    if blocks == (2, 4):
        a, b, c, d = split.unbind(-1)
        lower = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
        least = torch.maximum(torch.minimum(torch.maximum(a, b), torch.maximum(c, d)), lower).unsqueeze(-1)
    else:
        least = split.topk(n, -1).values[..., -1:]
    return (split < least).flatten(-2)
