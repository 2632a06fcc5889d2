"""A linear layer for CPUs that stores and multiplies only its non-zero weights."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..optim.cpu.native import load
from .base import InferenceLinear


SOURCE = Path(__file__).with_name("sparse_product.cpp")


class SparseLinear(InferenceLinear):
    """y = x Wᵀ + b with W in compressed sparse rows (CSR), for inference on a CPU.

    Values are held and summed in float32, whatever the layer's dtype; x and y have that dtype. In a state dict the
    weight is dense.

    Args:
        weight: Weights of shape (out_features, in_features), of float32, bfloat16 or float16, on a CPU.
        bias: Of shape (out_features,), or None.
        transposed: Whether a state dict has the weight as (in_features, out_features), as HF's ``Conv1D`` does.

    Raises:
        ValueError: If the layer cannot hold the weight.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    _empty: Tensor

    @staticmethod
    def _refusal(weight: Tensor) -> str | None:
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it has {weight.dtype}, not float32, bfloat16 or float16"
        if not weight.is_cpu:
            return f"it is on {weight.device}, not on a CPU"
        if weight.numel() >= 1 << 31:
            return f"its {weight.numel()} weights are more than 32-bit indices can address"
        return None

    def _compress(self, weight: Tensor) -> None:
        kept = weight != 0
        ends = torch.zeros(self.out_features + 1, dtype=torch.int32)
        ends[1:] = kept.sum(1).cumsum(0)
        columns = torch.arange(self.in_features, dtype=torch.int32).expand_as(weight)[kept]
        self.register_buffer("starts", ends, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("values", weight[kept].float(), persistent=False)
        # `.to(dtype)` converts it; the values come back to float32.
        self.register_buffer("_empty", torch.empty(0, dtype=weight.dtype), persistent=False)

    def _dense(self) -> Tensor:
        weight = torch.zeros(self.out_features, self.in_features, dtype=self.dtype, device=self.values.device)
        rows = torch.arange(self.out_features, device=self.values.device).repeat_interleave(self.starts.diff())
        weight[rows, self.columns.long()] = self.values.to(self.dtype)
        return weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer's activations."""
        return self._empty.dtype

    @property
    def weight(self) -> Tensor:
        """The weight in the dense layer's shape; it becomes dense in operations that use it."""
        return _DenseWhenUsed(self)

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that are zero."""
        return 1 - self.values.numel() / max(self.out_features * self.in_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply activations of shape (…, in_features) to (…, out_features), in the layer's dtype.

        Raises RuntimeError if a gradient through the layer is computed, or the layer is traced or exported.
        """
        # The product cannot be traced: a trace would record its result as a constant. torch 2.6 has no `is_exporting`.
        if torch.jit.is_tracing() or getattr(torch.compiler, "is_exporting", bool)():
            raise RuntimeError("SparseLinear cannot be traced or exported: call to_dense_inference(model) first.")
        if torch.is_grad_enabled() and x.requires_grad:
            result: Tensor = _NoBackward.apply(x, self._multiply)
            return result
        return self._multiply(x)

    @torch.compiler.disable
    def _multiply(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise RuntimeError(f"x of shape {tuple(x.shape)} for a layer of in_features={self.in_features}.")
        if x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type):
            raise RuntimeError(f"x of {x.dtype} for a layer of {self.dtype}.")
        rows = x.detach().reshape(x.shape[:-1].numel(), self.in_features).float().contiguous()
        y = product(self.starts, self.columns, self.values, self._bias(), rows)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else self.dtype
        return y.to(dtype).view(*x.shape[:-1], self.out_features)

    def _bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.detach().float().contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)
        self.values = self.values.float()
        return self

    def extra_repr(self) -> str:
        """Return the text between the parentheses."""
        return f"{super().extra_repr()}, sparsity={self.sparsity:.1%}"


def product(starts: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return x Wᵀ + b for W in CSR, by compiled C++ on a CPU if possible, else by torch's own product.

    ``starts`` has the index of the first value of each row of W, int32 of shape (out + 1,). ``columns`` are int32;
    ``values``, ``bias`` of shape (out,) and ``x`` of shape (n, in), contiguous, are float32.
    """
    n, size = x.shape
    out = len(starts) - 1
    library = _library() if x.is_cpu and values.is_cpu else None
    if library is None:
        weight = torch.sparse_csr_tensor(starts, columns, values, (out, size), check_invariants=False)
        y = torch.sparse.mm(weight, x.t()).t().contiguous()
        return y if bias is None else y.add_(bias)
    y = torch.empty(n, out)
    if not y.numel():
        return y
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * size * library.hf_pdecay_block_rows() if n > 1 else 0)
    matrix = (starts.data_ptr(), columns.data_ptr(), values.data_ptr(), None if bias is None else bias.data_ptr())
    library.hf_pdecay_sparse_product(*matrix, out, size, x.data_ptr(), n, y.data_ptr(), scratch.data_ptr(), threads)
    return y


class _DenseWhenUsed(Tensor):
    """A weight without memory that becomes dense in each operation that uses it.

    Some modules, such as Mamba's, compute with their layers' weights directly.
    """

    @staticmethod
    def __new__(cls, layer: SparseLinear) -> _DenseWhenUsed:
        """Make a tensor without memory."""
        sizes = (layer.out_features, layer.in_features)
        shape = sizes[::-1] if layer.transposed else sizes
        weight: _DenseWhenUsed = Tensor._make_wrapper_subclass(
            cls, shape, dtype=layer.dtype, device=layer.values.device
        )
        return weight

    def __init__(self, layer: SparseLinear) -> None:
        self.layer = layer

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # These would silently change a temporary dense copy.
    def _refuse(self, *_: Any) -> NoReturn:
        raise RuntimeError("The weight of a SparseLinear cannot be changed: call to_dense_inference(model) first.")

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
        raise RuntimeError("SparseLinear has no gradient: call to_dense_inference(model) before training.")


@functools.cache
def _library() -> ctypes.CDLL | None:
    library, _ = load((SOURCE,), "SparseLinear", "product")
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.hf_pdecay_block_rows.restype = ctypes.c_int
        library.hf_pdecay_sparse_product.restype = None
        library.hf_pdecay_sparse_product.argtypes = (
            *(pointer, pointer, pointer, pointer, number, number),
            *(pointer, number, pointer, pointer, ctypes.c_int),
        )
    return library
