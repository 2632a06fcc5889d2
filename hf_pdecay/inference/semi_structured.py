"""A linear layer with 2:4 weights, for the sparse matrix units of NVIDIA's GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .base import InferenceLinear


_DTYPES = (torch.float16, torch.bfloat16)
_MULTIPLES = (32, 64)  # of rows and columns; both of torch's libraries accept them
_LEAST_CAPABILITY = (8, 0)


class SemiStructuredLinear(InferenceLinear):
    """y = x Wᵀ + b with at most 2 non-zero weights in each 4 of W, for inference on a GPU.

    The product is torch's (``torch.sparse.to_sparse_semi_structured``). In a state dict the weight is dense.

    Args:
        weight: Weights of shape (out_features, in_features), of float16 or bfloat16, on a GPU.
        bias: Of shape (out_features,), or None.
        transposed: Whether a state dict has the weight as (in_features, out_features), as HF's ``Conv1D`` does.

    Raises:
        ValueError: If the layer cannot hold the weight.
    """

    form = "2:4"

    @classmethod
    def _refusal(cls, weight: Tensor, values: torch.dtype | None) -> str | None:
        if weight.dtype not in _DTYPES:
            return f"it has {weight.dtype}; 2:4 needs float16 or bfloat16"
        if not weight.is_cuda:
            return f"it is on {weight.device}, not on a GPU"
        if torch.version.cuda is None or torch.cuda.get_device_capability(weight.device) < _LEAST_CAPABILITY:
            return "the GPU has no sparse matrix units; NVIDIA's have them from compute capability 8.0 on"
        if any(size % multiple for size, multiple in zip(weight.shape, _MULTIPLES, strict=True)):
            return f"its shape {tuple(weight.shape)} is not a multiple of {_MULTIPLES}"
        if not is_two_of_four(weight):
            return "its weights are not 2:4"
        return None

    def _compress(self, weight: Tensor) -> None:
        self._packed = torch.sparse.to_sparse_semi_structured(weight.contiguous())

    def _dense(self) -> Tensor:
        weight: Tensor = self._packed.to_dense()
        return weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer's activations."""
        return self._packed.dtype

    def _placed(self, weight: Tensor) -> Tensor:
        return weight.to(self._packed.device, self.dtype)

    @property
    def weight(self) -> Tensor:
        """The compressed weight: torch's own tensor type, of shape (out_features, in_features)."""
        return self._packed

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Multiply activations of shape (…, in_features), of the weight's dtype, to (…, out_features)."""
        # For more than two dimensions, torch's linear uses operations that the compressed form does not support.
        rows = x.reshape(-1, self.in_features)
        y = functional.linear(rows, self._packed, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SemiStructuredLinear:
        moved = fn(torch.empty(0, dtype=self.dtype, device=self._packed.device))
        if moved.dtype != self.dtype or moved.device != self._packed.device:
            raise RuntimeError(
                f"A layer with 2:4 weights of {self.dtype} on {self._packed.device} cannot become {moved.dtype} on "
                f"{moved.device}: call to_dense_inference(model) first."
            )
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """Return the text between the parentheses."""
        return f"{super().extra_repr()}, 2:4"


def is_two_of_four(weight: Tensor) -> bool:
    """Whether each 4 consecutive weights along the last dimension have at most 2 non-zero ones."""
    if weight.shape[-1] % 4:
        return False
    return bool((weight.detach().unflatten(-1, (-1, 4)) != 0).sum(-1).max() <= 2) if weight.numel() else True
