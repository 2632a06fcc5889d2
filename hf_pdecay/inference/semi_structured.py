"""A linear layer whose weights are 2:4, for the sparse matrix units of NVIDIA's GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


_DTYPES = (torch.float16, torch.bfloat16)
_MULTIPLES = (32, 64)  # of rows and columns, which torch's compressed form takes with either of its libraries
_LEAST_CAPABILITY = (8, 0)


class SemiStructuredLinear(nn.Module):
    """y = x Wᵀ + b with W of at most 2 non-zero weights in each 4, for inference on a GPU.

    The product is torch's (``torch.sparse.to_sparse_semi_structured``). In a state dict the weight is dense, so that a
    model which holds such layers is saved and loaded as any other.

    Args:
        weight: Weights of shape (out_features, in_features), of float16 or bfloat16, on a GPU.
        bias: Of shape (out_features,), or None.
        transposed: Whether a state dict has the weight as (in_features, out_features), as HF's ``Conv1D`` does.

    Raises:
        ValueError: If the weight is not such a matrix.
    """

    # Whether weight and bias of the layer that this one stands for are trained.
    trained: tuple[bool, bool] = True, True

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self._hold(weight)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def _hold(self, weight: Tensor) -> None:
        refused = refusal(weight)
        if refused is not None:
            raise ValueError(f"Invalid weight: {refused}.")
        self.out_features, self.in_features = weight.shape
        self._packed = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())

    @property
    def weight(self) -> Tensor:
        """The weight, compressed: a tensor of torch's own kind, of shape (out_features, in_features)."""
        return self._packed

    def dense_weight(self) -> Tensor:
        """Return the weight as an ordinary tensor of the shape that the dense one had."""
        weight: Tensor = self._packed.to_dense()
        return weight.t().contiguous() if self.transposed else weight

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Multiply.

        Args:
            x: Activations of shape (…, in_features), of the weight's dtype.

        Returns:
            A tensor of shape (…, out_features).
        """
        # Of more than two dimensions torch's linear makes operations that the compressed form does not know.
        rows = x.reshape(-1, self.in_features)
        y = functional.linear(rows, self._packed, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SemiStructuredLinear:
        dtype, device = self._packed.dtype, self._packed.device
        moved = fn(torch.empty(0, dtype=dtype, device=device))
        if moved.dtype != dtype or moved.device != device:
            raise RuntimeError(
                f"A layer with 2:4 weights of {dtype} on {device} cannot become {moved.dtype} on {moved.device}: call "
                "to_dense_inference(model) first."
            )
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, _, missing, _, errors = args
        weight = state_dict.pop(f"{prefix}weight", None)
        shape = (self.out_features, self.in_features)
        if weight is None:
            missing.append(f"{prefix}weight")
        elif (weight.t() if self.transposed else weight).shape != shape:
            errors.append(f"size mismatch for {prefix}weight: {tuple(weight.shape)} is given, {shape} is here.")
        else:
            self._hold((weight.t() if self.transposed else weight).to(self._packed.device, self._packed.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return what is shown between the parentheses."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, 2:4"


def is_two_of_four(weight: Tensor) -> bool:
    """Whether of each 4 consecutive weights along the last dimension at most 2 are not zero."""
    if weight.shape[-1] % 4:
        return False
    return bool((weight.detach().unflatten(-1, (-1, 4)) != 0).sum(-1).max() <= 2) if weight.numel() else True


def refusal(weight: Tensor) -> str | None:
    """Return why a weight cannot be one of a :class:`SemiStructuredLinear`, or None."""
    if weight.dim() != 2:
        return f"it has {weight.dim()} dimensions, not 2"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"it is a {type(weight).__name__}"
    if weight.dtype not in _DTYPES:
        return f"it is of {weight.dtype}; 2:4 takes float16 or bfloat16"
    if not weight.is_cuda:
        return f"it is on {weight.device}, not on a GPU"
    if torch.version.cuda is None or torch.cuda.get_device_capability(weight.device) < _LEAST_CAPABILITY:
        return "the GPU has no sparse matrix units: it takes one of NVIDIA's from compute capability 8.0 on"
    if any(size % multiple for size, multiple in zip(weight.shape, _MULTIPLES, strict=True)):
        return f"its shape {tuple(weight.shape)} is not a multiple of {_MULTIPLES}"
    if not is_two_of_four(weight):
        return "its weights are not 2:4"
    return None
