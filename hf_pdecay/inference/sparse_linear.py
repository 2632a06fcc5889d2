"""A linear layer that stores and multiplies only the weights that are not zero."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..optim.cpu.native import load


SOURCE = Path(__file__).with_name("sparse_product.cpp")


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with W in compressed sparse rows (CSR), for inference on a CPU.

    Values are held and summed in float32, whatever the layer's dtype; x and y are of that dtype. In a state dict the
    weight is dense, so that a model which holds such layers is saved and loaded as any other.

    Args:
        weight: Weights of shape (out_features, in_features), of float32, bfloat16 or float16, on a CPU.
        bias: Of shape (out_features,), or None.
        transposed: Whether a state dict has the weight as (in_features, out_features), as HF's ``Conv1D`` does.

    Raises:
        ValueError: If the weight is not such a matrix.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    _empty: Tensor
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
        weight = weight.detach()
        places = weight != 0
        ends = torch.zeros(self.out_features + 1, dtype=torch.int32)
        ends[1:] = places.sum(1).cumsum(0)
        columns = torch.arange(self.in_features, dtype=torch.int32).expand_as(weight)[places]
        self.register_buffer("starts", ends, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("values", weight[places].float(), persistent=False)
        # Takes part in `.to(dtype)`, as the values do only to come back to float32.
        self.register_buffer("_empty", torch.empty(0, dtype=weight.dtype), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer's activations."""
        return self._empty.dtype

    @property
    def weight(self) -> Tensor:
        """The weight in the shape that the dense one had, to be looked at; made dense for who computes with it."""
        return _DenseWhenUsed(self)

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that are zero."""
        return 1 - self.values.numel() / max(self.out_features * self.in_features, 1)

    def dense_weight(self) -> Tensor:
        """Return the weight as an ordinary tensor of the shape that the dense one had."""
        weight = torch.zeros(self.out_features, self.in_features, dtype=self.dtype, device=self.values.device)
        rows = torch.arange(self.out_features, device=self.values.device).repeat_interleave(self.starts.diff())
        weight[rows, self.columns.long()] = self.values.to(self.dtype)
        return weight.t().contiguous() if self.transposed else weight

    def forward(self, x: Tensor) -> Tensor:
        """Multiply.

        Args:
            x: Activations of shape (…, in_features).

        Returns:
            A tensor of shape (…, out_features), of the layer's dtype.

        Raises:
            RuntimeError: If a gradient through the layer is asked for, or it is traced or exported.
        """
        # The product is no operation that a graph could hold: a trace would keep what it came to. torch 2.6 does not
        # tell of an export.
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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, _, missing, _, errors = args
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is None:
            missing.append(f"{prefix}weight")
        elif weight.shape != self.weight.shape:
            errors.append(
                f"size mismatch for {prefix}weight: {tuple(weight.shape)} is given, {tuple(self.weight.shape)} is here."
            )
        else:
            self._hold((weight.t() if self.transposed else weight).to(self.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return what is shown between the parentheses."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, sparsity={self.sparsity:.1%}"


def refusal(weight: Tensor) -> str | None:
    """Return why a weight cannot be one of a :class:`SparseLinear`, or None."""
    if weight.dim() != 2:
        return f"it has {weight.dim()} dimensions, not 2"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"it is a {type(weight).__name__}"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it is of {weight.dtype}, not of float32, bfloat16 or float16"
    if not weight.is_cpu:
        return f"it is on {weight.device}, not on a CPU"
    if weight.numel() >= 1 << 31:
        return f"its {weight.numel()} weights are more than 32-bit places can tell apart"
    return None


def product(starts: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return x Wᵀ + b for W in CSR.

    By one C++ function where it can be compiled, else, or elsewhere than on a CPU, by torch's own product.

    Args:
        starts: Where each row of W begins among its values: int32 of shape (out + 1,).
        columns: Columns of the values, int32.
        values: Values of W that are not zero, row by row, float32.
        bias: float32 of shape (out,), or None.
        x: float32 of shape (n, in), contiguous.
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
    library.hf_pdecay_sparse_product(
        starts.data_ptr(),
        columns.data_ptr(),
        values.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out,
        size,
        x.data_ptr(),
        n,
        y.data_ptr(),
        scratch.data_ptr(),
        threads,
    )
    return y


class _DenseWhenUsed(Tensor):
    """A weight that tells its dtype, device and shape for nothing, and is made dense in each operation that takes it.

    Some modules compute with the weights of their layers themselves, as Mamba's do.

    Args:
        layer: The layer whose weight it is.
    """

    @staticmethod
    def __new__(cls, layer: SparseLinear) -> _DenseWhenUsed:
        """Make a tensor without memory."""
        sizes = (layer.out_features, layer.in_features)
        shape = sizes[::-1] if layer.transposed else sizes
        made: _DenseWhenUsed = Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=layer.values.device)
        return made

    def __init__(self, layer: SparseLinear) -> None:
        self.layer = layer

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # By these a change would go to a dense weight that nobody keeps, without a word.
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
        args, kwargs = tree_map_only(cls, lambda each: each.layer.dense_weight(), (args, kwargs or {}))
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
