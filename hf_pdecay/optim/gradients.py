"""Whether a step's gradients are finite and dense."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .distributed import is_dtensor, local


def grads_finite(grads: Sequence[Tensor]) -> bool | Tensor:
    """Return whether all gradients are finite: a bool on a CPU, else a 0-dim tensor; the host does not wait."""
    grads = [as_real(grad) for grad in grads if grad.numel()]
    # NaN and infinity show in a sum, the cheapest reduction of torch. It may overflow: look again below.
    if all(grad.is_cpu for grad in grads) and math.isfinite(sum(grad.sum().item() for grad in grads)):
        return True
    finite = torch.nn.utils.get_total_norm(grads, norm_type=math.inf).isfinite()
    return bool(finite) if finite.is_cpu else finite


def as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as pairs of real numbers, in the same memory unless it is a conjugate; others as is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def finite_by_norm(norm: Tensor | float | None) -> bool | Tensor | None:
    """Return whether a norm of all gradients shows that they are finite; None if it does not show."""
    if norm is None or (isinstance(norm, Tensor) and is_dtensor(norm)):
        return None
    finite = torch.as_tensor(norm).isfinite()
    if finite.device.type != "cpu":
        return finite
    return True if finite else None  # else it may have overflowed


def note_versions(params: Iterable[Tensor]) -> None:
    """Note on the gradients of parameters what they are now, for :func:`are_as_noted`."""
    for param in params:
        if param.grad is not None and not param.grad.is_inference():
            # On the tensor itself: a list of them would keep alive what `zero_grad` frees.
            param.grad._hf_pdecay_version = _version(param.grad)  # type: ignore[attr-defined]


def are_as_noted(params: Iterable[Tensor]) -> bool:
    """Whether all gradients of parameters are noted tensors, and no operation has written to them since."""
    grads = (param.grad for param in params if param.grad is not None)
    return all(getattr(grad, "_hf_pdecay_version", None) == _version(grad) for grad in grads)


def _version(grad: Tensor) -> int:
    """Return a number that grows with each operation that writes to a gradient; -1 where torch counts none."""
    if grad.is_inference():
        return -1
    return grad._version if type(grad) is Tensor else grad._version + local(grad)._version


def check_dense(params: Iterable[Tensor], name: str) -> None:
    """Raise ValueError, in the name of the optimizer, if a gradient is sparse."""
    for param in params:
        if param.grad is not None and param.grad.is_sparse:
            raise ValueError(
                f"{name} does not take sparse gradients: set sparse=False on the embedding, or give its parameters "
                "to torch.optim.SparseAdam."
            )
