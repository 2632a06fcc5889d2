"""Sums over groups of weights, and products with a factor for each, in plain torch operations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .decay import shrink_factor
from .foreach import chunk_size
from .rounding import LOW_PRECISION, noise_bits, stochastic_round
from .units import Member


def square_sums(weights: Tensor, place: Member[int], count: int) -> Tensor:
    """Return the sum of the squares of each group's weights in one parameter, in float32, or float64 where they are.

    Args:
        weights: The parameter.
        place: Where in it the groups lie.
        count: Number of groups.

    Returns:
        A tensor of shape ``(count,)``.
    """
    dim = place.dim
    part = weights.detach().narrow(dim, place.offset, count * place.size)
    dtype = torch.promote_types(part.dtype, torch.float32)
    others = [each for each in range(part.dim()) if each != dim]
    if not others:
        found = part.to(dtype).square()
    elif not part.is_cpu or part.stride(dim) == max(part.stride()):
        found = torch.linalg.vector_norm(part, dim=others, dtype=dtype).square_()
    else:
        # torch's norm along any but the last dimension takes ten times as long on a CPU.
        found = torch.zeros(part.shape[dim], dtype=dtype)
        for piece, _ in _pieces(part, dim):
            found += piece.to(dtype).square().sum(others)
    return _by_group(found, place.size)


def _by_group(sums: Tensor, size: int) -> Tensor:
    """Sums of groups from those of indices, ``size`` of which are one group."""
    return sums.view(-1, size).sum(1) if size > 1 else sums


def _pieces(part: Tensor, dim: int, block: int = 1) -> Iterator[tuple[Tensor, slice]]:
    """Yield views of a bounded number of weights, each with the part of dimension ``dim`` that it has.

    Where they divide that dimension, it is in multiples of ``block``.
    """
    size = chunk_size(part.device)
    whole = slice(None)
    if part.numel() <= size:
        yield part, whole
        return
    axis = max(range(part.dim()), key=part.stride)
    step = max(1, size * part.shape[axis] // part.numel())
    if axis == dim:
        step = -(-step // block) * block
    for start in range(0, part.shape[axis], step):
        extent = min(step, part.shape[axis] - start)
        yield part.narrow(axis, start, extent), slice(start, start + extent) if axis == dim else whole


def scale(part: Tensor, dim: int, factor: Tensor, noise_place: int, step: int | Tensor) -> None:
    """Multiply weights by factors along a dimension, in place."""
    first = 0
    shape = [1] * part.dim()
    for piece, span in _pieces(part, dim):
        shape[dim] = -1
        _multiply(piece, factor[span].view(shape), noise_place, step, first)
        first += piece.numel()


def _multiply(piece: Tensor, factor: Tensor, noise_place: int, step: int | Tensor, first: int) -> None:
    """Multiply weights in place: in float32 and with stochastic rounding in low precision.

    What falls below the smallest normal number becomes 0, as a weight would else stay subnormal for long.
    """
    low = piece.dtype in LOW_PRECISION
    working = piece.to(torch.float32) if low else piece
    working.mul_(factor)
    tiny = torch.finfo(working.dtype).tiny
    torch.ops.aten.hardshrink.out(working, tiny * (1 - 2.0**-20), out=working)
    if low:
        noise = noise_bits(step, noise_place, first, piece.numel(), piece.device)
        piece.copy_(stochastic_round(working, piece.dtype, noise))


def shrink_weakest(
    weights: Tensor,
    before: Tensor,
    dim: int,
    blocks: tuple[int, int],
    p_norm: float,
    alpha_lambda: float | Tensor,
    finite: bool | Tensor,
    noise: tuple[int, int | Tensor],
) -> None:
    """Shrink those weights that were the M - N weakest of M before the step, each by its own factor."""
    first = 0
    old = before.movedim(dim, -1)
    for (piece, _), (was, _) in zip(
        _pieces(weights.movedim(dim, -1), weights.dim() - 1, blocks[1]),
        _pieces(old, old.dim() - 1, blocks[1]),
        strict=True,
    ):
        magnitude = was.abs().to(torch.promote_types(was.dtype, torch.float32))
        factor = shrink_factor(magnitude, p_norm, alpha_lambda)
        stays = ~weakest(magnitude, blocks)
        if isinstance(finite, Tensor):
            stays |= ~finite.to(stays.device)
        _multiply(piece, factor.masked_fill_(stays, 1), *noise, first)
        first += piece.numel()


def weakest(scores: Tensor, blocks: tuple[int, int], *, exact: bool = False) -> Tensor:
    """Return which of each M consecutive scores along the last dimension are among the M - N least.

    Args:
        scores: Of any shape whose last dimension is divisible by M; at least 0.
        blocks: N and M.
        exact: Whether of equal scores as many are taken as it takes; otherwise none that equals one that stays.

    Returns:
        A bool tensor of the shape of ``scores``.
    """
    n, m = blocks
    split = scores.unflatten(-1, (-1, m))
    if exact:
        order = split.argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(split, dtype=torch.bool).scatter_(-1, order[..., n:], True).flatten(-2)
    if blocks == (2, 4):
        a, b, c, d = split.unbind(-1)
        larger, other = torch.maximum(a, b), torch.maximum(c, d)
        least = torch.maximum(
            torch.minimum(larger, other), torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
        ).unsqueeze(-1)
    else:
        least = split.topk(n, -1).values[..., -1:]
    return (split < least).flatten(-2)
