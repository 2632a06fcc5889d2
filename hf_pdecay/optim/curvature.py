"""The curvature of the loss by which weights are ranked: Adam's second moments, to rank 1.

The second moment v of a weight is a mean of squared gradients, a noisy one after few steps. The gradient of a matrix is
a sum of outer products, of errors at its outputs and its inputs, so the mean of v over a row times that over a column,
divided by that over all, is about v (Adafactor keeps no more, arXiv 1804.04235). It is much less noisy, as it averages
over many weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .distributed import Groups, all_sum


# Added to the means of rows: weights that never had a gradient rank below all others, and by their magnitudes.
_LEAST = 1e-30
# The least ratio of the mean of a column to that of the matrix.
_LEAST_RATIO = 1e-8
# A power of 2 that lifts the square root of both above 1, so that only weights of 0 have the score 0.
SCALE = 2.0**64


class Curvature(NamedTuple):
    """√v of the weights of a parameter, or of a shard of one, to rank 1, times ``SCALE``.

    The tensor is a stack of matrices, of one unless it has three dimensions; beyond the second, dimensions count as
    columns. That of matrix m, row i and column j is ``rows[m * n + i] * columns[m, j]`` for n rows.

    Attributes:
        rows: Of shape (matrices * rows,).
        columns: Of shape (matrices, columns).
        first: Place of the first weight in the flattened tensor.
        step: Distance from one weight to the next.
    """

    rows: Tensor
    columns: Tensor
    first: int = 0
    step: int = 1

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.columns.shape[1]

    def part(self, start: int, step: int = 1) -> Curvature:
        """Return the curvature of the weights from one on, each ``step`` after the one before."""
        return self._replace(first=self.first + start * self.step, step=self.step * step)

    def factors(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return those of the first ``count`` weights, of shape (count,)."""
        rows, columns, width = self.rows.to(dtype), self.columns.to(dtype), self.width
        per_matrix = len(rows) // max(len(columns), 1)
        if self.step == 1 and width and self.first % width == 0 and count % width == 0:
            start, end = self.first // width, (self.first + count) // width
            if len(columns) == 1:
                return (rows[start:end, None] * columns).view(-1)
            matrix = torch.arange(start, end, device=rows.device) // per_matrix
            return (rows[start:end, None] * columns[matrix]).view(-1)
        place = torch.arange(self.first, self.first + count * self.step, self.step, device=rows.device)
        row = place // width
        place -= row * width
        factors = rows[row]
        return factors.mul_(columns.view(-1)[row.div_(per_matrix, rounding_mode="floor").mul_(width).add_(place)])


def matrix_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return how many matrices, rows and columns a tensor has."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return 1, shape[0] if shape else 1, math.prod(shape[1:])


@torch.no_grad()
def curvature(second: Tensor, axes: Sequence[Groups] = ((), ()), width: int | None = None) -> Curvature:
    """Return the curvature of a tensor from its second moments.

    Args:
        second: Second moments of the weights, of their shape.
        axes: Process groups across which the rows, and the columns, of a matrix are divided.
        width: Number of columns in all, if they are divided.
    """
    matrices, rows, columns = matrix_shape(second.shape)
    table = second.reshape(matrices, rows, columns)
    by_row, by_column = all_sum(table.sum(2), axes[1]), all_sum(table.sum(1), axes[0])
    return _of_sums(by_row, by_column, all_sum(by_column.sum(1, keepdim=True), axes[1]), width or columns)


@torch.no_grad()
def curvature_of_part(second: Tensor, first: int, shape: Sequence[int], groups: Groups) -> Curvature:
    """Return the curvature of a part of a flattened tensor, of shape (count,) and maybe empty.

    Args:
        second: Second moments of the weights in the part.
        first: Place of the part's first weight in the flattened tensor.
        shape: Shape of the whole tensor.
        groups: Process groups across which the parts lie.
    """
    matrices, rows, columns = matrix_shape(shape)
    place = torch.arange(first, first + len(second), device=second.device)
    row = place // max(columns, 1)
    column = row.div(max(rows, 1), rounding_mode="floor") * columns + place - row * columns
    by_row = second.new_zeros(matrices * rows).index_add_(0, row, second)
    by_column = second.new_zeros(matrices * columns).index_add_(0, column, second)
    by_row = all_sum(by_row, groups).view(matrices, rows)
    by_column = all_sum(by_column, groups).view(matrices, columns)
    return _of_sums(by_row, by_column, by_column.sum(1, keepdim=True), columns)._replace(first=first)


def no_curvature(weight: Tensor) -> Curvature:
    """Return the curvature of weights that have no second moments, as of such that never had a gradient."""
    return curvature(torch.zeros((), dtype=torch.float32, device=weight.device).expand(weight.shape))


def _of_sums(by_row: Tensor, by_column: Tensor, total: Tensor, width: int) -> Curvature:
    rows = (by_row / max(width, 1) + _LEAST).sqrt_().view(-1)
    ratio = by_column * width / total.clamp_min(torch.finfo(total.dtype).tiny)
    return Curvature(rows, ratio.clamp_(min=_LEAST_RATIO).sqrt_() * SCALE)


def axes_of(param: Any) -> tuple[Groups, Groups]:
    """Return the process groups across which the rows, and the columns, of the matrices of a DTensor are divided."""
    axes: tuple[list[Any], list[Any]] = ([], [])
    first = 1 if param.dim() == 3 else 0  # the dimension of rows
    for dim, placement in enumerate(param.placements):
        if placement.is_shard() and placement.dim >= first:
            axes[placement.dim > first].append(param.device_mesh.get_group(dim))
    return tuple(axes[0]), tuple(axes[1])
