"""Which form of a layer is faster on this machine."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import MODEL_ERRORS
from ..layers.matrices import Linear, is_transposed
from .base import InferenceLinear
from .bitmask_linear import BitmaskLinear
from .kernels import library
from .packed_weight import PackedWeight
from .result import MOST_SPARSITY
from .semi_structured import SemiStructuredLinear
from .sparse_linear import SparseLinear


# With fewer zeros, values of the layer's own dtype and a bitmask save too little.
_LEAST_SPARSITY = 0.4
_LEAST_FOR_COLUMNS = 0.5  # with fewer zeros, values and columns take as many bytes as the dense weight
# From here on values and columns are likely faster than a bitmask, for a few rows and for many; not for int8 values,
# nor for many rows of bfloat16.
_LIKELY_COLUMNS, _LIKELY_COLUMNS_MANY, _MANY = 0.85, 0.8, 64
_TRIED = (_LEAST_SPARSITY, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, MOST_SPARSITY)  # for layers of a model that stays dense
_CLEARLY = 1.1  # so many times as fast as the form with fewer bytes: less may be chance
_SECONDS, _ROUNDS = 0.03, 3  # the least time and number of rounds to measure a layer
_MODEL_ROUNDS = 2


def least_sparsity(weight: Tensor, held_as: torch.dtype | None) -> float:
    """Return the fraction of zeros below which a layer is not tried: none if its values become shorter."""
    return 0.0 if held_as is not None and held_as.itemsize < weight.element_size() else _LEAST_SPARSITY


def likely_form(
    weight: Tensor | PackedWeight, sparsity: float, held_as: torch.dtype | None, rows: int
) -> type[InferenceLinear]:
    """Return the form that is likely the fastest, without a measurement."""
    if weight.is_cuda:
        return SemiStructuredLinear
    least = _LIKELY_COLUMNS_MANY if rows > _MANY else _LIKELY_COLUMNS
    if held_as == torch.int8 or (rows > _MANY and weight.dtype == (held_as or weight.dtype) == torch.bfloat16):
        least = 2
    return SparseLinear if (sparsity >= least or library() is None) and _fits(weight) else BitmaskLinear


def _fits(weight: Tensor | PackedWeight) -> bool:
    return SparseLinear.refusal(weight) is None


class Timer:
    """Measures layers, one of each kind.

    Args:
        rows: Number of rows of activations.
        others: Read before each call, like other layers' weights; None for a model that fits into the caches.
    """

    def __init__(self, rows: int, others: Tensor | None) -> None:
        self.rows, self._others = rows, others
        self._known: dict[tuple[object, ...], tuple[type[InferenceLinear], float]] = {}

    def fastest(
        self, dense: Linear, weight: Tensor, sparsity: float, held_as: torch.dtype | None
    ) -> tuple[type[InferenceLinear], float]:
        """Return the fastest form of a layer, and how many times as fast as the dense one it is.

        Args:
            dense: The layer.
            weight: Its weight, of shape (out, in).
            sparsity: The fraction of its weights that are zero.
            held_as: The dtype for non-zero weights; None for the layer's.
        """
        kind = *weight.shape, weight.dtype, dense.bias is None, is_transposed(dense), round(sparsity, 2)
        if kind not in self._known:
            x = torch.randn(self.rows, weight.shape[1], device=weight.device).to(weight.dtype)
            forms = _forms(weight, sparsity)
            layers = [form(weight, dense.bias, values=form.values_of(held_as)) for form in forms]
            speedups = speedups_of(dense, layers, x, self._others)
            found = list(zip(forms, speedups, strict=True))
            best = max(found, key=lambda known: known[1])
            self._known[kind] = best if best[1] > _CLEARLY * found[0][1] else found[0]
        return self._known[kind]

    def break_even(self, dense: Linear, sparsity: float, held_as: torch.dtype | None) -> float | None:
        """Return the lowest sparsity tried, above a layer's own, at which random zeros make it faster, or None."""
        weight = dense.weight.t() if is_transposed(dense) else dense.weight
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(weight.shape, generator=generator)
        x = torch.randn(self.rows, weight.shape[1], generator=generator).to(weight.dtype)

        def faster(tried: float) -> bool:
            some = (drawn * (drawn >= tried)).to(weight.dtype)
            layers = [form(some, dense.bias, values=form.values_of(held_as)) for form in _forms(some, tried)]
            return max(speedups_of(dense, layers, x, self._others)) > 1

        higher = [tried for tried in _TRIED if tried > round(sparsity, 2)]
        first = bisect_left(higher, True, key=faster)
        return higher[first] if first < len(higher) else None


def _forms(weight: Tensor, sparsity: float) -> list[type[InferenceLinear]]:
    """The forms to measure."""
    if weight.is_cuda:
        return [SemiStructuredLinear]
    columns: list[type[InferenceLinear]] = [SparseLinear] if _fits(weight) else []
    if library() is None:
        return columns or [BitmaskLinear]
    return [BitmaskLinear, *columns] if sparsity >= _LEAST_FOR_COLUMNS else [BitmaskLinear]


def speedups_of(dense: nn.Module, layers: Sequence[nn.Module], x: Tensor, others: Tensor | None) -> list[float]:
    """Return the least time of the dense layer over that of each of some others, all called in turn for ``x``."""
    every = [dense, *layers]
    least = [float("inf")] * len(every)
    calls = 1 if x.is_cpu else 10  # on a GPU enough to hide the host's cost of a launch
    for layer in every:
        layer(x)
    end, rounds = time.perf_counter() + _SECONDS, 0
    while time.perf_counter() < end or rounds < _ROUNDS:
        rounds += 1
        for side, layer in enumerate(every):
            if others is not None:
                others.sum()
            _wait(x)
            began = time.perf_counter()
            for _ in range(calls):
                layer(x)
            _wait(x)
            least[side] = min(least[side], time.perf_counter() - began)
    return [least[0] / seconds for seconds in least[1:]]


def model_seconds(model: Any, rows: int) -> float | None:
    """Return the least time that a model of text takes for one sequence of ``rows`` tokens, or None.

    That is for other models, and for one that trains: a call would draw random numbers and move running means.
    """
    config = getattr(model, "config", None)
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if (
        model.training
        or getattr(model, "main_input_name", None) != "input_ids"
        or getattr(config, "is_encoder_decoder", False)
        or not isinstance(embeddings, nn.Embedding)
    ):
        return None
    ids = torch.zeros(1, rows, dtype=torch.long, device=embeddings.weight.device)
    least = float("inf")
    try:
        for turn in range(1 + _MODEL_ROUNDS):
            _wait(ids)
            began = time.perf_counter()
            model(input_ids=ids)
            _wait(ids)
            if turn:
                least = min(least, time.perf_counter() - began)
    except MODEL_ERRORS:  # as for more tokens than it takes
        return None
    return least


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
