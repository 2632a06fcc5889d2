"""Base of the linear layers that stand in for dense ones at inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .packed_weight import PackedWeight


class InferenceLinear(nn.Module):
    """y = x Wᵀ + b with W in a compressed form; in a state dict, W is dense. ValueError if the layer cannot hold W."""

    # What the result calls it.
    form = "dense"
    # Whether weight and bias of the dense layer are trained.
    trained: tuple[bool, bool] = True, True
    # What swapping changed on other modules: the module, an attribute and its value before.
    changed: tuple[tuple[nn.Module, str, Any], ...] = ()
    # The parameter that other modules share with the dense layer, in a tuple that hides it from nn.Module, or nothing.
    tied: tuple[nn.Parameter, ...] = ()

    def __init__(
        self,
        weight: Tensor | PackedWeight,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
        values: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self._held_as = values or weight.dtype
        self._hold(weight)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def refusal(cls, weight: Tensor | PackedWeight, values: torch.dtype | None = None) -> str | None:
        """Return why the layer cannot hold a weight, with values of a dtype, or None."""
        if isinstance(weight, PackedWeight):
            weight = weight.as_row()
        if weight.dim() != 2:
            return f"it has {weight.dim()} dimensions, not 2"
        if type(weight) not in (Tensor, nn.Parameter):
            return f"it is a {type(weight).__name__}"
        return cls._refusal(weight, values)

    @classmethod
    def _refusal(cls, weight: Tensor, values: torch.dtype | None) -> str | None:
        """Why the layer cannot hold a matrix, or None."""
        raise NotImplementedError

    @staticmethod
    def values_of(held_as: torch.dtype | None) -> torch.dtype | None:
        """Return the dtype for values where one is asked for; None for the weight's."""
        return held_as

    def _compress(self, weight: Any) -> None:
        """Hold a weight, a tensor or what a layer on a CPU may get, a :class:`PackedWeight`."""
        raise NotImplementedError

    def _dense(self) -> Tensor:
        """The dense weight of shape (out_features, in_features)."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer's activations."""
        raise NotImplementedError

    def _hold(self, weight: Tensor | PackedWeight) -> None:
        reason = self.refusal(weight, self._held_as)
        if reason is not None:
            raise ValueError(f"Invalid weight: {reason}.")
        self.out_features, self.in_features = weight.shape
        self._compress(weight.detach())

    def dense_weight(self) -> Tensor:
        """Return the weight as an ordinary tensor of the dense layer's shape."""
        if self.tied:
            return self.tied[0].detach()
        weight = self._dense()
        return weight.t().contiguous() if self.transposed else weight

    def _placed(self, weight: Tensor) -> Tensor:
        """A weight of a state dict, in the layer's dtype."""
        return weight.to(self.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, _, missing, _, errors = args
        weight = state_dict.pop(f"{prefix}weight", None)
        sizes = (self.out_features, self.in_features)
        shape = sizes[::-1] if self.transposed else sizes
        if weight is None:
            missing.append(f"{prefix}weight")
        elif weight.shape != shape:
            errors.append(f"size mismatch for {prefix}weight: {tuple(weight.shape)} is given, {shape} is here.")
        else:
            self._hold(self._placed(weight.t() if self.transposed else weight))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return the text between the parentheses."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
