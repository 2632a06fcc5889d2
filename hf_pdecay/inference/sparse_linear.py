"""A linear layer for CPUs that stores and multiplies only its non-zero weights, with their columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu_linear import CpuLinear
from .kernels import address, kept_of, kind_of, library
from .packed_weight import PackedWeight


_NARROW = 1 << 16  # columns that 16 bits address


class SparseLinear(CpuLinear):
    """y = x Wᵀ + b with W in compressed sparse rows (CSR), for inference on a CPU: for very sparse weights.

    A non-zero weight takes the bytes of its value and 2 for its column (4 beyond 65,536 columns). Sums are in float32,
    whatever the dtypes; x and y have the layer's dtype. In a state dict the weight is dense.

    Args:
        weight: Weights of shape (out_features, in_features), of float32, bfloat16 or float16, on a CPU.
        bias: Of shape (out_features,), or None.
        transposed: Whether a state dict has the weight as (in_features, out_features), as HF's ``Conv1D`` does.
        values: The dtype in which non-zero weights are held: float32, bfloat16 or float16; None for the weight's.

    Raises:
        ValueError: If the layer cannot hold the weight.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    form = "csr"
    _parts = ("starts", "columns", "values")

    @classmethod
    def _refusal(cls, weight: Tensor, values: torch.dtype | None) -> str | None:
        if weight.numel() >= 1 << 31:
            return f"its {weight.numel()} weights are more than 32-bit indices can address"
        return super()._refusal(weight, values)

    @staticmethod
    def values_of(held_as: torch.dtype | None) -> torch.dtype | None:
        """Return the dtype for values where one is asked for: bfloat16 for int8, whose scales no column follows."""
        return torch.bfloat16 if held_as == torch.int8 else held_as

    def _compress(self, weight: Tensor | PackedWeight) -> None:
        ends = torch.zeros(self.out_features + 1, dtype=torch.int32)
        if isinstance(weight, PackedWeight):
            starts, columns, values = weight.rows()
            ends.copy_(starts)
        else:
            numbers = torch.arange(self.in_features, dtype=torch.int32)
            if self.in_features <= _NARROW:
                numbers = numbers.to(torch.int16)  # whose bits C++ reads without a sign; torch cannot pickle uint16
            kept = weight != 0
            values, columns = kept_of(weight, kept), kept_of(numbers.expand_as(weight), kept)
            ends[1:] = kept.sum(1).cumsum(0)
        self.register_buffer("starts", ends, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("values", values.to(self._held_as), persistent=False)

    def _dense(self) -> Tensor:
        weight = torch.zeros(self.out_features, self.in_features, dtype=self.dtype, device=self.values.device)
        rows = torch.arange(self.out_features, device=self.values.device).repeat_interleave(self.starts.diff())
        weight[rows, _unsigned(self.columns)] = self.values.to(self.dtype)
        return weight

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that are zero."""
        return 1 - self.values.numel() / max(self.out_features * self.in_features, 1)

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return product(self.starts, self.columns, self.values, self._float_bias(), x.float().contiguous())


def _unsigned(columns: Tensor) -> Tensor:
    return columns.long() & (_NARROW - 1) if columns.dtype == torch.int16 else columns.long()


def product(starts: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return x Wᵀ + b for W in CSR, by compiled C++ on a CPU if possible, else by torch's own product.

    ``starts`` has the index of the first value of each row of W, int32 of shape (out + 1,). ``columns`` are int32, or
    int16 whose bits have no sign; ``values`` are float32, bfloat16 or float16. ``bias`` of shape (out,) and ``x`` of
    shape (n, in), contiguous, are float32.
    """
    n, size = x.shape
    out = len(starts) - 1
    compiled = library() if x.is_cpu and values.is_cpu else None
    if compiled is None:
        weight = torch.sparse_csr_tensor(
            starts.long(), _unsigned(columns), values.float(), (out, size), check_invariants=False
        )
        y = torch.sparse.mm(weight, x.t()).t().contiguous()
        return y if bias is None else y.add_(bias)
    y = torch.empty(n, out)
    if not y.numel():
        return y
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * size * compiled.hf_pdecay_block_rows() if n > 1 else 0)
    compiled.hf_pdecay_sparse_product(
        *(kind_of(values), columns.dtype == torch.int16, address(starts), address(columns), address(values)),
        *(address(bias), out, size, address(x), n, address(y), address(scratch), threads),
    )
    return y
