"""Whether a step's gradients are finite, and the count of the steps that were skipped because they were not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .distributed import is_dtensor


def grads_finite(grads: Sequence[Tensor]) -> bool | Tensor:
    """Whether all gradients are finite: a bool on a CPU, else a 0-dim tensor, for which the host does not wait."""
    grads = [grad for grad in grads if grad.numel()]
    # NaN and infinity come through a sum, and this one is the cheapest reduction that torch has. A sum that overflowed
    # by itself is looked at again below.
    if all(grad.is_cpu for grad in grads) and math.isfinite(sum(grad.sum().item() for grad in grads)):
        return True
    finite = torch.nn.utils.get_total_norm(grads, norm_type=math.inf).isfinite()
    return bool(finite) if finite.is_cpu else finite


def finite_by_norm(norm: Tensor | float | None) -> bool | Tensor | None:
    """Whether the norm of all gradients says that they are finite; None if it does not say.

    Args:
        norm: What was left at the optimizer; a norm on a CPU that is not finite may have overflowed, and says nothing.
    """
    if norm is None or (isinstance(norm, Tensor) and is_dtensor(norm)):
        return None
    finite = torch.as_tensor(norm).isfinite()
    if finite.device.type != "cpu":
        return finite
    return True if finite else None


def count_skipped(groups: Iterable[dict[str, Any]], finite: bool | Tensor) -> None:
    """Count a skipped step in the groups that have ``skip_nonfinite`` set."""
    for group in groups:
        if not group["skip_nonfinite"]:
            continue
        skipped = group["skipped_steps"]
        if isinstance(finite, Tensor):
            # In place, so that the replays of a CUDA graph count too.
            if not isinstance(skipped, Tensor):
                skipped = torch.full((), skipped, dtype=torch.int64, device=finite.device)
            group["skipped_steps"] = skipped.to(finite.device).add_(~finite)
        else:
            group["skipped_steps"] = skipped + 1


def skipped_steps(groups: Iterable[dict[str, Any]]) -> int:
    """Return the number of steps that were skipped."""
    return max((int(group["skipped_steps"]) for group in groups), default=0)


def check_dense(params: Iterable[Tensor], name: str) -> None:
    """Raise ValueError, in the name of the optimizer, if a gradient is sparse."""
    for param in params:
        if param.grad is not None and param.grad.is_sparse:
            raise ValueError(
                f"{name} does not take sparse gradients: set sparse=False on the embedding, or give its parameters "
                "to torch.optim.SparseAdam."
            )
