"""Quantising one matrix so that every zero is kept: by rounding to nearest, and by GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor

from ..storage.codes import in_blocks
from .grid import BLOCK, Grid, find_scales
from .selection import float_of
from .sparsegpt import COLUMNS, inverse_factor, spread_errors


_SWEEPS = 3


def round_to_nearest(weight: Tensor, *, bits: float = 4, block: int = BLOCK) -> Tensor:
    """Round a matrix to whole codes times the scale of a block; every zero stays zero.

    The scale of a block is that with the least squared error of those tried.

    Args:
        weight: Of shape (outputs, inputs).
        bits: Width of the codes: 8 to 2, or 1.58 for -1, 0 and 1.
        block: Consecutive inputs that share a scale; the last block of a row may be shorter.

    Returns:
        The quantised matrix, in the dtype of ``weight``, in which each number is exactly a code times its scale.

    Raises:
        ValueError: If an argument is invalid.
    """
    return nearest(weight, Grid(bits, block))


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """:func:`round_to_nearest` on a grid."""
    blocks = in_blocks(float_of(weight), grid.block)
    scales = find_scales(blocks, grid, weight.dtype)[..., None]
    codes = (blocks / scales).round_().clamp_(*grid.codes)
    return _plain(codes.mul_(scales).flatten(1)[:, : weight.shape[1]], weight)


def gptq(weight: Tensor, inputs: Tensor, *, bits: float = 4, block: int = BLOCK) -> Tensor:
    """Quantise a matrix by GPTQ, https://huggingface.co/papers/2210.17323, so that every zero stays zero.

    Columns are rounded one after the other, and the later ones make up for the error.

    Args:
        weight: Of shape (outputs, inputs).
        inputs: Of shape (..., inputs): what the matrix is multiplied by.
        bits: As for :func:`round_to_nearest`.
        block: As for :func:`round_to_nearest`.

    Returns:
        The quantised matrix, in the dtype of ``weight``, in which each number is exactly a code times its scale.

    Raises:
        ValueError: If an argument is invalid, or the inputs are not finite.
    """
    grid = Grid(bits, block)
    rows = inputs.reshape(-1, weight.shape[1]).to(float_of(weight).dtype)
    return quantize_by_hessian(weight, rows.T @ rows, grid)


def quantize_by_hessian(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """:func:`gptq` on a grid, from a Hessian of any positive scale, which is overwritten."""
    return _plain(codes_by_hessian(weight, hessian, grid)[0], weight)


def codes_by_hessian(weight: Tensor, hessian: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return codes times their scales, in float32 or float64, and scales of shape (blocks, outputs)."""
    block, high = grid.block, grid.codes[1]
    dense, kept = float_of(weight), weight != 0
    moving, signs = kept.clone(), torch.zeros_like(dense, dtype=torch.int8)
    dead = hessian.diagonal() == 0
    factor = inverse_factor(hessian, dead)
    matter = factor.diagonal().reciprocal().square()
    found = torch.zeros_like(dense)
    scales = dense.new_ones(-(-dense.shape[1] // block), len(dense))

    def rounded(start: int, columns: Tensor, column: int) -> Tensor:
        place = start + column
        scale, stays = scales[place // block], kept[:, place]
        if place % block == 0:
            here = slice(place, min(place + block, dense.shape[1]))
            piece = columns[column : column + block].T * kept[:, here]
            scale.copy_(find_scales(piece, grid, weight.dtype, matter[here]))
            if grid.by_largest:
                most, at = piece.abs().max(1, keepdim=True)
                moving[:, here].scatter_(1, at, most == 0)
                signs[:, here].scatter_(1, at, piece.gather(1, at).sign().to(signs.dtype))
        values = (columns[column] / scale).round_().clamp_(*grid.codes).mul_(scale).mul_(stays)
        if grid.by_largest:
            values = torch.where(signs[:, place] == 0, values, signs[:, place] * high * scale)
        found[:, place] = values
        return values

    spread_errors(dense.clone(), factor, max(COLUMNS // block, 1) * block, rounded)
    for _ in range(_SWEEPS):
        _descend(dense, found, scales, hessian, grid, moving)
    return found, scales


def _descend(dense: Tensor, found: Tensor, scales: Tensor, hessian: Tensor, grid: Grid, moving: Tensor) -> None:
    """Give each weight, column by column, the code that is best for the output while the others stay.

    What zeros cannot make up for stands in the error of the others, so this spreads it over those alone. This is the
    coordinate descent of https://huggingface.co/papers/2309.01885.

    Args:
        dense: The matrix before.
        found: The quantised matrix, changed in place.
        scales: Of shape (blocks, outputs).
        hessian: The damped one.
        grid: The codes.
        moving: Which weights may get another code.
    """
    block = grid.block
    for start in range(0, dense.shape[1], block):
        here = slice(start, min(start + block, dense.shape[1]))
        inner, scale = hessian[here, here], scales[start // block]
        slopes = ((found - dense) @ hessian[:, here]).T.contiguous()
        columns = found[:, here].T.contiguous()
        moves = moving[:, here].T
        for column, old in enumerate(columns):
            best = old - slopes[column] / inner[column, column]
            new = (best / scale).round_().clamp_(*grid.codes).mul_(scale).where(moves[column], old)
            slopes.addr_(inner[column], new - old)
            old.copy_(new)
        found[:, here] = columns.T


def _plain(values: Tensor, weight: Tensor) -> Tensor:
    """The values in the dtype of a weight, with no zero negative."""
    return values.to(weight.dtype).masked_fill_(values == 0, 0)
