"""SGD with momentum and decoupled p-norm weight decay in float64, one element at a time, written from the formulas.

g⁺  = g + λ₂ w                               torch's SGD: its L2 decay is not decoupled
b   = g⁺ at the first step, else μ b + g⁺
w'  = w - α (g⁺ + μ b under ``nesterov``, else b)
w⁺  = w' times the factor of |w|             see adamw_lp64.shrink_element
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .adamw_lp64 import Array, shrink_element


@dataclass
class SgdReference:
    """One tensor, flat, in float64."""

    weight: Array
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    p_norm: float
    lambda_p: float

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64).reshape(-1)
        self.buffer = np.zeros_like(self.weight)
        self.steps = 0

    def step(self, grad: Iterable[float]) -> None:
        for i, raw in enumerate(grad):
            w = float(self.weight[i])
            g = float(raw) + self.weight_decay * w
            self.buffer[i] = g if self.steps == 0 else self.momentum * self.buffer[i] + g
            update = g + self.momentum * self.buffer[i] if self.nesterov else self.buffer[i]
            self.weight[i] = (w - self.lr * update) * shrink_element(w, self.p_norm, self.lr * self.lambda_p)
        self.steps += 1


@dataclass
class ScheduleFreeReference:
    """Schedule-free SGD (arXiv 2405.15682) with the decay of y, and of z and x by the same factors.

    y   = (1 - β) z + β x                    where gradients are taken
    z'  = z - α g
    x'  = (1 - c) x + c z'                   c = 1 / n with a constant rate
    z⁺, x⁺ = z', x' times the factor of |y|
    """

    x: Array
    lr: float
    beta: float
    p_norm: float
    lambda_p: float

    def __post_init__(self) -> None:
        self.x = np.array(self.x, dtype=np.float64).reshape(-1)
        self.z = self.x.copy()
        self.steps = 0

    @property
    def y(self) -> Array:
        """The weights that are trained."""
        return (1 - self.beta) * self.z + self.beta * self.x

    def step(self, grad: Iterable[float]) -> None:
        self.steps += 1
        y = self.y
        factors = np.array([shrink_element(float(w), self.p_norm, self.lr * self.lambda_p) for w in y])
        self.z = self.z - self.lr * np.array(list(grad), dtype=np.float64)
        self.x = (1 - 1 / self.steps) * self.x + self.z / self.steps
        self.z, self.x = self.z * factors, self.x * factors
