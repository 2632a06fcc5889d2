"""Structured p-norm decay in float64, one group and one element at a time, written from the formulas.

    r_g = √(Σ w² / |g|)                         over all members of a coupled group, the weights before the step
    w⁺  = w' · s / (s + α λ_p)                  s = r_g^(2-p), p < 2, w' the result of AdamW
    w⁺  = w' / (1 + α λ_p r_g^(p-2))            p >= 2

A group that began wholly zero has the factor 1 until it is not. N:M: of each M consecutive weights the M - N weakest
shrink by the factor of a single weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tests.helpers.reference.adamw_lp64 import Array, Hyper, Reference, shrink_element


# Where a weight of a parameter is: parameter, flat index.
Where = tuple[int, int]


def indices(shape: Sequence[int], param: int, dim: int, first: int, last: int) -> list[Where]:
    """The weights of a parameter whose index along a dimension is from ``first`` up to ``last``."""
    places = np.arange(math.prod(shape)).reshape(shape)
    return [(param, int(place)) for place in places.take(range(first, last), axis=dim).reshape(-1)]


class UnitReference:
    """Tensors in AdamW, and groups of their weights that decay as one."""

    def __init__(self, weights: Sequence[Array], groups: Sequence[Sequence[Where]]) -> None:
        self.tensors = [Reference(weight) for weight in weights]
        self.groups = [list(group) for group in groups]
        self.asleep = [self._zero(group) for group in self.groups]

    def _zero(self, group: Sequence[Where]) -> bool:
        return all(self.tensors[param].weight[place] == 0 for param, place in group)

    def step(self, grads: Sequence[Array], hyper: Hyper) -> list[Array]:
        """Take one step and return the new weights."""
        factors = [np.ones_like(tensor.weight) for tensor in self.tensors]
        for number, group in enumerate(self.groups):
            self.asleep[number] = self.asleep[number] and self._zero(group)
            square = math.fsum(self.tensors[param].weight[place] ** 2 for param, place in group)
            r = math.sqrt(square / len(group))
            factor = 1.0 if self.asleep[number] else shrink_element(r, hyper.p_norm, hyper.lr * hyper.lambda_p)
            for param, place in group:
                factors[param][place] = factor
        return self._stepped(grads, hyper, factors)

    def step_n_of_m(self, grads: Sequence[Array], hyper: Hyper, n: int, m: int) -> list[Array]:
        """Take one step in which the groups are blocks, each in its own order."""
        factors = [np.ones_like(tensor.weight) for tensor in self.tensors]
        for group in self.groups:
            assert len(group) == m
            ordered = sorted(group, key=lambda where: abs(self.tensors[where[0]].weight[where[1]]))
            for param, place in ordered[: m - n]:
                weight = float(self.tensors[param].weight[place])
                factors[param][place] = shrink_element(weight, hyper.p_norm, hyper.lr * hyper.lambda_p)
        return self._stepped(grads, hyper, factors)

    def _stepped(self, grads: Sequence[Array], hyper: Hyper, factors: Sequence[Array]) -> list[Array]:
        plain = replace(hyper, lambda_p=0.0)
        for tensor, grad, factor in zip(self.tensors, grads, factors, strict=True):
            tensor.step(grad, plain)
            tensor.weight *= factor
        return [tensor.weight.copy() for tensor in self.tensors]
