"""Wanda and SparseGPT in float64 on one matrix, weight by weight, written from the formulas of the papers.

Wanda, https://huggingface.co/papers/2306.11695: S = |W| · ‖X_j‖₂, and in each row the lowest S become zero.

SparseGPT, https://huggingface.co/papers/2301.00774: the columns are taken from left to right. With F the columns that
are not taken yet, beginning with j, and H_F the rows and columns F of the damped H = XᵀX:

    score  w_j² / [H_F⁻¹]_jj                          of the weights at the start of a block of columns
    update w_F ← w_F − w_j / [H_F⁻¹]_jj · [H_F⁻¹]_{:,j}   for each weight that becomes zero

Each H_F is inverted anew, so nothing here uses a Cholesky factor.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]


def wanda64(weight: Array, inputs: Array, zeros_of_row: int) -> Array:
    """Return a matrix (outputs, inputs) with so many zeros in each row."""
    norms = np.sqrt((inputs**2).sum(axis=0))
    pruned = weight.copy()
    for row in pruned:
        for place in sorted(range(row.size), key=lambda place: abs(row[place]) * norms[place])[:zeros_of_row]:
            row[place] = 0.0
    return pruned


def wanda_blocks64(weight: Array, inputs: Array, n: int, m: int) -> Array:
    """Return a matrix with at most N of M consecutive inputs."""
    pieces = [wanda64(weight[:, at : at + m], inputs[:, at : at + m], m - n) for at in range(0, weight.shape[1], m)]
    return np.concatenate(pieces, axis=1)


def sparsegpt64(
    weight: Array, inputs: Array, sparsity: float | None, blocks: tuple[int, int] | None = None, width: int = 128
) -> Array:
    """Return a matrix with a fraction of zeros in each block of columns, or at most N of M consecutive inputs."""
    hessian = inputs.T @ inputs
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    inverses = [np.linalg.inv(hessian[column:, column:]) for column in range(len(hessian))]
    pruned = weight.copy()
    chosen = np.zeros(weight.shape, dtype=bool)
    size = blocks[1] if blocks else width
    for column in range(weight.shape[1]):
        if column % size == 0:
            here = range(column, min(column + size, weight.shape[1]))
            scores = np.array([pruned[:, each] ** 2 / inverses[each][0, 0] for each in here]).T
            if blocks:
                for row in range(len(weight)):
                    chosen[row, column + np.argsort(scores[row])[: blocks[1] - blocks[0]]] = True
            else:
                assert sparsity is not None
                count = round(sparsity * scores.size)
                for place in np.argsort(scores, axis=None)[:count]:
                    chosen[place // len(here), column + place % len(here)] = True
        for row in range(len(weight)):
            if chosen[row, column]:
                inverse = inverses[column]
                pruned[row, column:] -= pruned[row, column] / inverse[0, 0] * inverse[0]
                pruned[row, column] = 0.0
    return pruned


def gptq64(weight: Array, inputs: Array, scales: Array, codes: tuple[int, int]) -> Array:
    """Return a matrix rounded by GPTQ, https://huggingface.co/papers/2210.17323, with a scale for each row.

    The update is that of SparseGPT, where w_j changes by w_j - q_j in place of w_j. What it adds to a zero is a part of
    that weight's own change: q_j is 0 there.
    """
    hessian = inputs.T @ inputs
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    changed, result = weight.copy(), np.zeros_like(weight)
    for column in range(weight.shape[1]):
        inverse = np.linalg.inv(hessian[column:, column:])
        for row in range(len(weight)):
            if weight[row, column]:
                code = np.clip(np.rint(changed[row, column] / scales[row]), *codes)
                result[row, column] = code * scales[row]
            error = changed[row, column] - result[row, column]
            changed[row, column:] -= error / inverse[0, 0] * inverse[0]
    return result
