"""AdamW with decoupled p-norm weight decay in float64, one element at a time, written from the formulas.

    m   = β1 m + (1 - β1) g                     g negated under ``maximize``
    v   = β2 v + (1 - β2) g²
    u   = m̂ / (√v̂ + ε)                          m̂ = m / (1 - β1ᵗ),  v̂ = v / (1 - β2ᵗ)
    w'  = (1 - α λ₂) w - α u
    w⁺  = w' · s / (s + α λ_p)                  s = |w|^(2-p), p < 2, the weight before the step
    w⁺  = w' / (1 + α λ_p |w|^(p-2))            p >= 2

Formulas from https://huggingface.co/papers/2404.10824. Slow on purpose: no vectorised shortcut shares a mistake with
the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters of one step, named as the optimizer names them."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    p_norm: float = 0.8
    lambda_p: float = 0.01
    keep_zeros: bool = False
    maximize: bool = False


def shrink_element(w: float, p_norm: float, alpha_lambda: float) -> float:
    """The factor that decay multiplies a weight ``w`` by."""
    if alpha_lambda == 0.0:
        return 1.0
    if p_norm < 2.0:
        s = abs(w) ** (2.0 - p_norm)
        return s / (s + alpha_lambda)
    return 1.0 / (1.0 + alpha_lambda * abs(w) ** (p_norm - 2.0))


def shrink(weights: Iterable[float], p_norm: float, alpha_lambda: float) -> Array:
    """`shrink_element` of each weight."""
    return np.array([shrink_element(float(w), p_norm, alpha_lambda) for w in weights], dtype=np.float64)


@dataclass
class Reference:
    """One tensor and its optimizer state, flat, in float64.

    After `step`, ``scale`` holds for each element the sum of the magnitudes that the step added up: the yardstick of
    the rounding error of any implementation, also where the terms cancel. ``factor`` is what the decay multiplied by,
    ``denominator`` is √v̂ + ε.
    """

    weight: Array
    exp_avg: Array = field(default_factory=lambda: np.zeros(0))
    exp_avg_sq: Array = field(default_factory=lambda: np.zeros(0))
    steps: int = 0
    dormant: bool | None = None

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64).reshape(-1)
        for name in ("exp_avg", "exp_avg_sq"):
            value = np.array(getattr(self, name), dtype=np.float64).reshape(-1)
            setattr(self, name, value if value.size else np.zeros_like(self.weight))
        self.scale = np.abs(self.weight)
        self.factor = np.ones_like(self.weight)
        self.denominator = np.zeros_like(self.weight)

    def step(self, grad: Iterable[float], hyper: Hyper) -> Array:
        """Take one step and return the new weights."""
        h = hyper
        whole_zero = all(w == 0.0 for w in self.weight)
        if self.dormant is None:
            self.dormant = whole_zero
        self.dormant = self.dormant and whole_zero
        self.steps += 1
        correction1 = 1.0 - h.beta1**self.steps
        correction2 = 1.0 - h.beta2**self.steps
        for i, raw in enumerate(grad):
            g = -float(raw) if h.maximize else float(raw)
            w = float(self.weight[i])
            m_before = float(self.exp_avg[i])
            m = h.beta1 * m_before + (1.0 - h.beta1) * g
            v = h.beta2 * float(self.exp_avg_sq[i]) + (1.0 - h.beta2) * g * g
            denominator = math.sqrt(v / correction2) + h.eps
            u = m / correction1 / denominator
            stepped = (1.0 - h.lr * h.weight_decay) * w - h.lr * u
            if h.keep_zeros and w == 0.0:
                factor = 0.0
            elif self.dormant:
                factor = 1.0
            else:
                factor = shrink_element(w, h.p_norm, h.lr * h.lambda_p)
            size_of_m = h.beta1 * abs(m_before) + (1.0 - h.beta1) * abs(g)
            self.scale[i] = abs(w) + h.lr * size_of_m / correction1 / denominator
            self.factor[i] = factor
            self.denominator[i] = denominator
            self.weight[i] = stepped * factor
            self.exp_avg[i] = m
            self.exp_avg_sq[i] = v
        return self.weight.copy()
