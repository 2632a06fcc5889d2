"""Whether a step's gradients are finite and dense."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .distributed import is_dtensor


def grads_finite(grads: Sequence[Tensor]) -> bool | Tensor:
    """Return whether all gradients are finite: a bool on a CPU, else a 0-dim tensor; the host does not wait."""
    grads = [grad for grad in grads if grad.numel()]
    # NaN and infinity show in a sum, the cheapest reduction of torch. It may overflow: look again below.
    if all(grad.is_cpu for grad in grads) and math.isfinite(sum(grad.sum().item() for grad in grads)):
        return True
    finite = torch.nn.utils.get_total_norm(grads, norm_type=math.inf).isfinite()
    return bool(finite) if finite.is_cpu else finite


def finite_by_norm(norm: Tensor | float | None) -> bool | Tensor | None:
    """Return whether a norm of all gradients shows that they are finite; None if it does not show."""
    if norm is None or (isinstance(norm, Tensor) and is_dtensor(norm)):
        return None
    finite = torch.as_tensor(norm).isfinite()
    if finite.device.type != "cpu":
        return finite
    return True if finite else None  # else it may have overflowed


def check_dense(params: Iterable[Tensor], name: str) -> None:
    """Raise ValueError, in the name of the optimizer, if a gradient is sparse."""
    for param in params:
        if param.grad is not None and param.grad.is_sparse:
            raise ValueError(
                f"{name} does not take sparse gradients: set sparse=False on the embedding, or give its parameters "
                "to torch.optim.SparseAdam."
            )
