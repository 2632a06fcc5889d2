"""Base of the linear layers for inference on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .base import InferenceLinear
from .kernels import FLOATS
from .memory import in_large_pages
from .packed_weight import PackedWeight


_HALF = torch.finfo(torch.float16).max
_is_exporting = getattr(torch.compiler, "is_exporting", bool)  # not in torch 2.6


class CpuLinear(InferenceLinear):
    """y = x Wᵀ + b for inference on a CPU, in the layer's dtype, with sums in float32.

    Args:
        weight: Weights of shape (out_features, in_features), of float32, bfloat16 or float16, on a CPU.
        bias: Of shape (out_features,), or None.
        transposed: Whether a state dict has the weight as (in_features, out_features), as HF's ``Conv1D`` does.
        values: The dtype in which non-zero weights are held; None for the weight's.

    Raises:
        ValueError: If the layer cannot hold the weight.
    """

    # What holds the weight, and keeps its dtype when the layer's changes.
    _parts: tuple[str, ...] = ()
    _empty: Tensor

    @classmethod
    def _refusal(cls, weight: Tensor, values: torch.dtype | None) -> str | None:
        if weight.dtype not in FLOATS:
            return f"it has {weight.dtype}, not float32, bfloat16 or float16"
        if not weight.is_cpu:
            return f"it is on {weight.device}, not on a CPU"
        if values == torch.float16 and float(weight.abs().nan_to_num(0, 0).max() if weight.numel() else 0) > _HALF:
            return f"it has weights beyond {_HALF:.0f}, which float16 cannot hold"
        return None

    def _hold(self, weight: Tensor | PackedWeight) -> None:
        super()._hold(weight)
        if not isinstance(weight, PackedWeight) or self._held_as == torch.int8:  # else they lie in the pages of a file
            for part in self._parts:
                self._put(part, getattr(self, part))
        self.register_buffer("_empty", torch.empty(0, dtype=weight.dtype), persistent=False)  # `.to(dtype)` converts it

    def _put(self, part: str, held: Tensor | None) -> None:
        setattr(self, part, None if held is None else in_large_pages(held))

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """X Wᵀ + b, with x of shape (n, in_features); ``dtype`` is what the result will be rounded to."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer's activations."""
        return cast("Tensor", self._buffers["_empty"]).dtype

    @property
    def weight(self) -> Tensor:
        """The weight in the dense layer's shape; it becomes dense in operations that use it."""
        return DenseWhenUsed(self)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight in this form."""
        return sum(getattr(self, part).nbytes for part in self._parts if getattr(self, part) is not None)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply activations of shape (…, in_features) to (…, out_features), in the layer's dtype.

        Raises RuntimeError if a gradient through the layer is computed, or the layer is traced or exported.
        """
        # The product cannot be traced: a trace would record its result as a constant.
        if torch.jit.is_tracing() or _is_exporting():
            raise RuntimeError(
                f"{type(self).__name__} cannot be traced or exported: call to_dense_inference(model) first."
            )
        multiply = self._untraced if torch.compiler.is_compiling() else self._multiply
        if torch.is_grad_enabled() and x.requires_grad:
            result: Tensor = _NoBackward.apply(x, multiply)
            return result
        return multiply(x)

    @torch.compiler.disable
    def _untraced(self, x: Tensor) -> Tensor:
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        *shape, size = x.shape or (None,)
        if size != self.in_features:
            raise RuntimeError(f"x of shape {tuple(x.shape)} for a layer of in_features={self.in_features}.")
        dtype, kind = self.dtype, x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        elif x.dtype != dtype:
            raise RuntimeError(f"x of {x.dtype} for a layer of {dtype}.")
        rows = x.detach().reshape(-1 if size else x.shape[:-1].numel(), size)
        y = self._product(rows, dtype)
        return (y if y.dtype == dtype else y.to(dtype)).view(*shape, self.out_features)

    def _float_bias(self) -> Tensor | None:
        bias = self.bias
        return None if bias is None else bias.detach().float().contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CpuLinear:
        before = {part: getattr(self, part) for part in self._parts}
        super()._apply(fn, recurse)
        for part, old in before.items():
            new = getattr(self, part)
            if old is not None and new.dtype != old.dtype:
                # Values round with the layer; their scales, and integers, do not.
                self._put(part, new.to(old.dtype) if part == "values" else old.to(new.device))
        return self

    def extra_repr(self) -> str:
        """Return the text between the parentheses."""
        return f"{super().extra_repr()}, values={str(self._held_as).removeprefix('torch.')}"


class DenseWhenUsed(Tensor):
    """A weight without memory that becomes dense in each operation that uses it.

    Some modules, such as Mamba's, compute with their layers' weights directly.
    """

    @staticmethod
    def __new__(cls, layer: CpuLinear) -> DenseWhenUsed:
        """Make a tensor without memory."""
        sizes = (layer.out_features, layer.in_features)
        shape = sizes[::-1] if layer.transposed else sizes
        weight: DenseWhenUsed = Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=layer._empty.device)
        return weight

    def __init__(self, layer: CpuLinear) -> None:
        self.layer = layer

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # These would silently change a temporary dense copy.
    def _refuse(self, *_: Any) -> NoReturn:
        raise RuntimeError(
            f"The weight of a {type(self.layer).__name__} cannot be changed: call to_dense_inference(model) first."
        )

    __setitem__ = _refuse
    data = property(_refuse, _refuse)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the dense weight."""
        if func._schema.is_mutable:
            cls._refuse(args[0])
        args, kwargs = tree_map_only(cls, lambda weight: weight.layer.dense_weight(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        return multiply(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("A sparse layer has no gradient: call to_dense_inference(model) before training.")
