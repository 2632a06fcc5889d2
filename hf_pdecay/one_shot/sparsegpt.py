"""SparseGPT: weights are pruned column by column, and the later ones make up for the error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .selection import Amount, amount_of, check_zeros, float_of, lowest, outside_blocks, scores, share, spread, zeroed


COLUMNS = 128  # whose mask is chosen at once
_DAMPING = 0.01  # as a fraction of the Hessian's mean diagonal


def sparsegpt(weight: Tensor, inputs: Tensor, *, sparsity: float | None = None, pattern: str | None = None) -> Tensor:
    """Prune a matrix by SparseGPT, https://huggingface.co/papers/2301.00774, which changes the other weights too.

    With H = XᵀX of the inputs X, damped by 1% of its mean diagonal, and U the upper Cholesky factor of H⁻¹, the score
    of weight w in column j is (w / Uⱼⱼ)². Each block of 128 columns gets its mask at once, for N:M each block of M
    columns. What pruning a column changes in the output is spread over the columns after it.

    Args:
        weight: Of shape (outputs, inputs).
        inputs: Of shape (..., inputs): what the matrix is multiplied by.
        sparsity: Fraction of zeros in the result.
        pattern: N:M, such as ``"2:4"``, in place of a sparsity: at most N of M consecutive inputs stay.

    Returns:
        The pruned matrix, in the dtype of ``weight``.

    Raises:
        ValueError: If an argument is invalid, or the matrix has more zeros than that already.
    """
    amount = amount_of(weight.shape, sparsity, pattern)
    check_zeros(int((weight == 0).sum()), amount, weight.numel(), "weight")
    rows = inputs.reshape(-1, weight.shape[1]).to(float_of(weight).dtype)
    return prune_by_hessian(weight, rows.T @ rows, amount)


def prune_by_hessian(weight: Tensor, hessian: Tensor, amount: Amount, outputs: Tensor | None = None) -> Tensor:
    """:func:`sparsegpt` from a Hessian of any positive scale, which is overwritten.

    ``outputs``, of shape (outputs,), says how much each output's squared error matters; all the same if None.
    """
    values = float_of(weight).clone()
    zero, mask = weight == 0, torch.zeros_like(weight, dtype=torch.bool)
    dead = hessian.diagonal() == 0
    factor = inverse_factor(hessian, dead)
    importance = factor.diagonal().reciprocal().masked_fill(dead, 0)
    width = COLUMNS if isinstance(amount, int) else max(COLUMNS // amount[1], 1) * amount[1]
    counts = _counts(amount, zero, dead, width) if isinstance(amount, int) else []

    def pruned(start: int, columns: Tensor, column: int) -> Tensor:
        here = slice(start, start + len(columns))
        chosen = mask[:, here]
        if isinstance(amount, int) and column == 0:
            piece = columns.T
            weighted = piece if outputs is None else piece * outputs.sqrt()[:, None]
            ranked = scores(weighted, importance[here], zero[:, here])
            chosen.copy_(lowest(ranked.reshape(1, -1), [counts[start // width]]).view(piece.shape))
        elif not isinstance(amount, int) and column % amount[1] == 0:
            part = slice(column, column + amount[1])
            none = zero[:, here][:, part]
            ranked = scores(columns[part].T, importance[here][part], none)
            chosen[:, part] = outside_blocks(ranked, amount) | none
        return columns[column].masked_fill(chosen[:, column], 0)

    spread_errors(values, factor, width, pruned)
    return zeroed(values, mask, weight.dtype)


def spread_errors(values: Tensor, factor: Tensor, width: int, settle: Callable[[int, Tensor, int], Tensor]) -> None:
    """Change the columns of a matrix one by one, and have the later ones make up for what that changes in the output.

    Args:
        values: Of shape (outputs, inputs); changed in place.
        factor: What :func:`inverse_factor` returned.
        width: Number of columns whose later ones are updated at once.
        settle: Returns what a column becomes, given the index of the first column of its piece, the piece as it is now,
            of shape (columns, outputs), and the column's place in it.
    """
    inputs = values.shape[1]
    for start in range(0, inputs, width):
        here = slice(start, min(start + width, inputs))
        piece, inner = values[:, here], factor[here, here]
        columns = piece.T.contiguous()  # each in one piece of memory, for speed
        errors = torch.zeros_like(columns)
        for column in range(len(columns)):
            errors[column] = (columns[column] - settle(start, columns, column)) / inner[column, column]
            columns[column:].addr_(inner[column, column:], errors[column], alpha=-1)
        piece.copy_(columns.T)
        values[:, here.stop :] -= errors.T @ factor[here, here.stop :]


def inverse_factor(hessian: Tensor, dead: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian, in which dead inputs stand alone.

    The Hessian is overwritten by the damped one. Raises ValueError if it is not positive definite.
    """
    diagonal = hessian.diagonal()
    living = diagonal[~dead]
    mean = living.mean() if living.numel() else torch.ones((), dtype=hessian.dtype, device=hessian.device)
    diagonal.masked_fill_(dead, mean).add_(_DAMPING * mean)
    for dtype in dict.fromkeys((hessian.dtype, torch.float64)):
        lower, failed = torch.linalg.cholesky_ex(hessian.to(dtype))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper.to(hessian.dtype)
    raise ValueError("Invalid inputs: their Hessian is not positive definite; they must be finite numbers.")


def _counts(amount: int, zero: Tensor, dead: Tensor, width: int) -> list[int]:
    """How many weights of each block of columns become zero: in proportion, but all that are dead or zero already."""
    outputs = zero.shape[0]
    zeros = [int(piece.sum()) for piece in zero.split(width, dim=1)]
    unused = [int(piece.sum()) for piece in (dead & ~zero).split(width, dim=1)]
    used = min(amount - sum(zeros), sum(unused))
    least = [fixed + more for fixed, more in zip(zeros, spread(used, unused), strict=True)]
    return share(amount, [outputs * piece.numel() for piece in dead.split(width)], least)
