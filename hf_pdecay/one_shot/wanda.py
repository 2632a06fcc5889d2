"""Pruning by magnitude, and by Wanda: magnitude times the norm of the input."""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import Amount, amount_of, check_zeros, float_of, lowest, outside_blocks, scores, share


def wanda(weight: Tensor, inputs: Tensor, *, sparsity: float | None = None, pattern: str | None = None) -> Tensor:
    """Prune a matrix by Wanda, https://huggingface.co/papers/2306.11695: the other weights stay as they are.

    The score of a weight is its magnitude times the Euclidean norm of its input over all rows. Scores are compared
    within each output.

    Args:
        weight: Of shape (outputs, inputs).
        inputs: Of shape (..., inputs): what the matrix is multiplied by.
        sparsity: Fraction of zeros in the result; the rows differ by at most one zero.
        pattern: N:M, such as ``"2:4"``, in place of a sparsity: at most N of M consecutive inputs stay.

    Returns:
        The pruned matrix, in the dtype of ``weight``.

    Raises:
        ValueError: If an argument is invalid, or the matrix has more zeros than that already.
    """
    amount = amount_of(weight.shape, sparsity, pattern)
    check_zeros(int((weight == 0).sum()), amount, weight.numel(), "weight")
    norms = float_of(inputs.reshape(-1, weight.shape[1])).norm(dim=0)
    return weight.masked_fill(wanda_mask(weight, norms, amount), 0.0)


def wanda_mask(weight: Tensor, norms: Tensor, amount: Amount) -> Tensor:
    """Return a mask of the weights that become zero, from the norm of each input."""
    zero = weight == 0
    values = scores(float_of(weight), norms, zero)
    if not isinstance(amount, int):
        return outside_blocks(values, amount) | zero
    outputs, inputs = weight.shape
    return lowest(values, share(amount, [inputs] * outputs, zero.sum(1).tolist()))


def magnitude_mask(weight: Tensor, amount: Amount) -> Tensor:
    """Return a mask of the smallest weights of a whole matrix."""
    zero = weight == 0
    values = scores(float_of(weight), torch.ones((), device=weight.device), zero)
    if not isinstance(amount, int):
        return outside_blocks(values, amount) | zero
    return lowest(values.reshape(1, -1), [amount]).view(weight.shape)
