"""Pruning a matrix that is rounded to few bits in training from then on: zeros and codes are chosen together."""

from __future__ import annotations

import torch
from torch import Tensor

from ..low_bit.grid import BLOCK
from .gptq import codes_by_hessian
from .grid import Grid
from .selection import Amount, float_of
from .sparsegpt import prune_by_hessian


WITH_CODES = (8, 4)
"""Widths whose codes are chosen with the zeros."""


def prune_to_codes(
    weight: Tensor, hessian: Tensor, amount: Amount, outputs: Tensor | None, bits: int, block: int = BLOCK
) -> Tensor:
    """Prune a matrix by its Hessian, and give the other weights values that rounding in training leaves as they are.

    SparseGPT prunes, and GPTQ spreads the error of the codes over the weights that stay. So training need not repair
    what rounding to nearest would break: at a low learning rate few codes change in a short run. What GPTQ rounds to 0
    counts as pruned. The last code is that of the largest weight of each block, as in
    :func:`~hf_pdecay.low_bit.transform.round_blocks`.

    Args:
        weight: Of shape (outputs, inputs).
        hessian: Of its inputs, of any positive scale.
        amount: The number of zeros, which is not exceeded; or N and M of a pattern, whose blocks may have more zeros.
        outputs: How much each output's squared error matters, of shape (outputs,); None for all the same.
        bits: 8 or 4.
        block: Inputs that share a scale.

    Returns:
        The matrix, in the dtype of ``weight``.
    """
    grid = Grid(bits, block, by_largest=True)
    pruned = prune_by_hessian(weight, hessian.clone(), amount, outputs)
    found, scales = codes_by_hessian(pruned, hessian.clone(), grid)
    if isinstance(amount, int) and (beyond := int((found == 0).sum()) - amount) > 0:
        fewer = max(amount - beyond, int((weight == 0).sum()))
        pruned = prune_by_hessian(weight, hessian.clone(), fewer, outputs)
        found, scales = codes_by_hessian(pruned, hessian.clone(), grid)
        beyond = int((found == 0).sum()) - amount
        if beyond > 0:
            # The largest of those that were rounded to 0 get the code next to it.
            of_each = scales.repeat_interleave(block, 0)[: weight.shape[1]].T
            sizes = (float_of(pruned).abs() / of_each).masked_fill_((found != 0) | (pruned == 0), -1)
            chosen = sizes.view(-1).topk(beyond).indices
            found.view(-1)[chosen] = (of_each * pruned.sign()).reshape(-1)[chosen].to(found.dtype)
    held = found.to(weight.dtype)
    least = torch.full_like(held, torch.finfo(weight.dtype).tiny).copysign_(held)
    return torch.where((held == 0) & (found != 0), least, held).masked_fill_(found == 0, 0)
