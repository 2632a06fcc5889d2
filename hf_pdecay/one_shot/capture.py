"""What matrices are multiplied by, and what comes out, seen by the products themselves, whichever module asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


Key = tuple[str, int]
"""A parameter's name and the number of the matrix in it."""


class _Watch(TorchFunctionMode):
    """Sees all products with some matrices.

    Args:
        targets: The parameters of interest.

    Attributes:
        sums: What a subclass adds up, by matrix.
    """

    def __init__(self, targets: Iterable[Target]) -> None:
        super().__init__()
        self.sums: dict[Key, Tensor] = {}
        self._whole: dict[int, Target] = {}
        self._one: dict[int, tuple[Target, int]] = {}
        for target in targets:
            matrices = target.matrices
            if len(matrices) > 1:
                self._whole[target.param.data_ptr()] = target
            for number, matrix in enumerate(matrices):
                self._one[matrix.data_ptr()] = target, number

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func not in _PRODUCTS:
            return func(*args, **given)
        inputs, weight = (args[place] if len(args) > place else given.get(name) for place, name in _PRODUCTS[func])
        keys: list[Key] = []
        flipped = False
        if isinstance(inputs, Tensor) and isinstance(weight, Tensor):
            if _PRODUCTS[func] == _INNER and inputs.data_ptr() in self._one and weight.dim() > 1:
                inputs, weight, flipped = weight.mT, inputs, True  # W X, with the rows as columns
            keys = self._keys(inputs, weight)
        if keys and isinstance(inputs, Tensor):
            self._take_inputs(keys, inputs)
        output = func(*args, **given)
        return self._take_output(keys, output, flipped) if keys else output

    def _keys(self, inputs: Tensor, weight: Tensor) -> list[Key]:
        """The matrices that are multiplied: none, one, or all of a stack."""
        start = weight.data_ptr()
        if start in self._whole and weight.dim() == 3 and weight.numel() == self._whole[start].param.numel():
            target = self._whole[start]
            matrices = target.matrices
            if inputs.shape[-1] == matrices[0].shape[1]:
                return [(target.name, number) for number in range(len(matrices))]
        elif start in self._one:
            target, number = self._one[start]
            matrix = target.matrices[number]
            if weight.numel() == matrix.numel() and inputs.shape[-1] == matrix.shape[1]:
                return [(target.name, number)]
        return []

    def _take_inputs(self, keys: Sequence[Key], inputs: Tensor) -> None:
        """See the inputs of matrices; of several, dimension 0 is theirs, or they share one."""

    def _take_output(self, keys: Sequence[Key], output: Tensor, flipped: bool) -> Tensor:
        """See the output, and return what the model goes on with; ``flipped``: its columns are the rows."""
        return output

    def _add(self, key: Key, summed: Tensor) -> None:
        if key in self.sums:
            self.sums[key] += summed
        else:
            self.sums[key] = summed.clone()


class Capture(_Watch):
    """Adds up, over all products with a matrix, its inputs' sums of squares or their Hessian XᵀX.

    Args:
        targets: The parameters of interest.
        hessian: Whether to add up Hessians; else sums of squares.

    Attributes:
        sums: By matrix, in float32 (float64 for float64 inputs).
    """

    def __init__(self, targets: Iterable[Target], hessian: bool) -> None:
        super().__init__(targets)
        self._hessian = hessian
        # Several matrices often have one input, as those of queries, keys and values.
        self._last: tuple[Tensor, int, Tensor] | None = None

    def _take_inputs(self, keys: Sequence[Key], inputs: Tensor) -> None:
        if len(keys) == 1:
            self._add(keys[0], self._summed(inputs))
            return
        stack = inputs if inputs.dim() == 3 else inputs.unsqueeze(0)
        for key, rows in zip(keys, stack.expand(len(keys), -1, -1), strict=True):
            self._add(key, self._summed(rows))

    def _summed(self, inputs: Tensor) -> Tensor:
        if self._last is not None and self._last[0] is inputs and self._last[1] == inputs._version:
            return self._last[2]
        rows = inputs.reshape(-1, inputs.shape[-1])
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            summed = rows.T @ rows if self._hessian else rows.square().sum(0)
        self._last = inputs, inputs._version, summed
        return summed


class GradientCapture(_Watch):
    """Adds up, over all products with a matrix, the squares of its inputs and of its outputs' gradients.

    The parameters need no gradients: the first outputs that depend on none begin the graph.

    Attributes:
        sums: Of the gradients, by matrix, of shape (outputs,), in float32 (float64 for float64 gradients).
        inputs: Of the inputs, by matrix, of shape (inputs,).
        counts: The number of rows that reached each matrix.
    """

    def __init__(self, targets: Iterable[Target]) -> None:
        super().__init__(targets)
        self._inputs = Capture(targets, hessian=False)
        self.inputs = self._inputs.sums
        self.counts: dict[Key, int] = {}

    def _take_inputs(self, keys: Sequence[Key], inputs: Tensor) -> None:
        self._inputs._take_inputs(keys, inputs.detach())
        each = inputs.numel() // inputs.shape[-1] // (len(keys) if len(keys) > 1 and inputs.dim() == 3 else 1)
        for key in keys:
            self.counts[key] = self.counts.get(key, 0) + each

    def _take_output(self, keys: Sequence[Key], output: Tensor, flipped: bool) -> Tensor:
        begins = not output.requires_grad
        if begins:
            output.requires_grad_()

        def add(gradient: Tensor) -> None:
            whole = gradient.mT if flipped else gradient
            for key, part in zip(keys, whole.unbind(0) if len(keys) > 1 else [whole], strict=True):
                rows = part.reshape(-1, part.shape[-1])
                self._add(key, rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(0))

        output.register_hook(add)
        return output.clone() if begins else output  # a leaf must not change in place
