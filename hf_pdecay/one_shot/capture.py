"""What matrices are multiplied by, while a model runs: seen by the products themselves, whichever module asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .blocks import Target


# Where the operands of a product stand: positions and keywords.
_INNER = ((0, "input"), (1, "other"))
_PRODUCTS: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    torch.nn.functional.linear: ((0, "input"), (1, "weight")),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _INNER),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), ((0, "input"), (1, "mat2"))),
    **dict.fromkeys((torch.addmm, Tensor.addmm), ((1, "mat1"), (2, "mat2"))),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), ((1, "batch1"), (2, "batch2"))),
}


class Capture(TorchFunctionMode):
    """Adds up, over all products with a matrix, its inputs' sums of squares or their Hessian XᵀX.

    Args:
        targets: The parameters of interest.
        hessian: Whether to add up Hessians; else sums of squares.

    Attributes:
        sums: By a parameter's name and the number of the matrix in it, in float32 (float64 for float64 inputs).
    """

    def __init__(self, targets: Iterable[Target], hessian: bool) -> None:
        super().__init__()
        self.sums: dict[tuple[str, int], Tensor] = {}
        self._hessian = hessian
        self._whole: dict[int, tuple[Target, int]] = {}
        self._one: dict[int, tuple[Target, int]] = {}
        for target in targets:
            matrices = target.matrices
            if len(matrices) > 1:
                self._whole[target.param.data_ptr()] = target, target.param.numel()
            for number, matrix in enumerate(matrices):
                self._one[matrix.data_ptr()] = target, number
        # Several matrices often have one input, as those of queries, keys and values.
        self._last: tuple[Tensor, int, Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _PRODUCTS:
            inputs, weight = (args[place] if len(args) > place else given.get(name) for place, name in _PRODUCTS[func])
            if isinstance(inputs, Tensor) and isinstance(weight, Tensor):
                if _PRODUCTS[func] == _INNER and inputs.data_ptr() in self._one and weight.dim() > 1:
                    inputs, weight = weight.mT, inputs  # W X, with the rows as columns
                self._see(inputs, weight)
        return func(*args, **given)

    def _see(self, inputs: Tensor, weight: Tensor) -> None:
        start = weight.data_ptr()
        if start in self._whole and weight.dim() == 3 and weight.numel() == self._whole[start][1]:
            target = self._whole[start][0]
            matrices = target.matrices
            if inputs.shape[-1] == matrices[0].shape[1]:
                stack = inputs if inputs.dim() == 3 else inputs.unsqueeze(0)
                for number, rows in enumerate(stack.expand(len(matrices), -1, -1)):
                    self._add((target.name, number), self._summed(rows))
        elif start in self._one:
            target, number = self._one[start]
            matrix = target.matrices[number]
            if weight.numel() == matrix.numel() and inputs.shape[-1] == matrix.shape[1]:
                self._add((target.name, number), self._summed(inputs))

    def _summed(self, inputs: Tensor) -> Tensor:
        if self._last is not None and self._last[0] is inputs and self._last[1] == inputs._version:
            return self._last[2]
        rows = inputs.reshape(-1, inputs.shape[-1])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        summed = rows.T @ rows if self._hessian else rows.square().sum(0)
        self._last = inputs, inputs._version, summed
        return summed

    def _add(self, key: tuple[str, int], summed: Tensor) -> None:
        if key in self.sums:
            self.sums[key] += summed
        else:
            self.sums[key] = summed.clone()
