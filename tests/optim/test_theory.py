"""p-norm decay beside two other ways to the same optimum, on sparse linear regression.

L2 decay of strength μ on w = w_1 ⋯ w_L is a penalty (μ L / 2) |w|^(2/L) (arXiv 2204.09664; for L = 2 spred, arXiv
2210.01212): with p = 2/L that is (λ_p / p) |w|^p for λ_p = μ. For p = 1 it is the lasso too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor

from hf_pdecay import AdamWLp
from hf_pdecay.optim.decay import shrink_factor


SAMPLES, FEATURES, SUPPORT = 120, 24, (1, 5, 6, 13, 20)


@dataclass(frozen=True)
class Problem:
    """Linear regression of which few features matter; the loss is half the mean square."""

    inputs: Tensor
    wanted: Tensor

    def gradient(self, weight: Tensor) -> Tensor:
        return self.inputs.t() @ (self.inputs @ weight - self.wanted) / SAMPLES

    @property
    def least_squares(self) -> Tensor:
        return torch.linalg.lstsq(self.inputs, self.wanted[:, None]).solution[:, 0]


def _problem(seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    inputs += 0.3 * torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float64)  # features are correlated
    truth = torch.zeros(FEATURES, dtype=torch.float64)
    truth[list(SUPPORT)] = torch.tensor([1.5, -1.0, 2.0, -1.2, 0.9], dtype=torch.float64)
    noise = 0.3 * torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    return Problem(inputs, inputs @ truth + noise)


def _by_sgd(problem: Problem, p_norm: float, lambda_p: float) -> Tensor:
    """Gradient descent with the decay of p norms, from the solution of least squares."""
    weight, lr = problem.least_squares, 0.02
    for _ in range(6000):
        factor = shrink_factor(weight, p_norm, lr * lambda_p)
        weight = (weight - lr * problem.gradient(weight)) * factor
    return weight


def _by_adamw(problem: Problem, p_norm: float, lambda_p: float) -> Tensor:
    """AdamWLp where noise of a known size dominates the second moment, so that Adam's metric is flat.

    Then √v̂ = σ for all weights, the update is gradient / σ, and a decay of λ_p / σ weighs as much as λ_p does alone.
    """
    weight = torch.nn.Parameter(problem.least_squares)
    sigma, steps = 1.0, 10_000
    optimizer = AdamWLp([weight], p_norm=p_norm, lambda_p=lambda_p / sigma, betas=(0.99, 0.999))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        noise = sigma * torch.randn(FEATURES, generator=generator, dtype=torch.float64)
        weight.grad = problem.gradient(weight.detach()) + noise
        optimizer.step()
    return weight.detach()


def _factored(problem: Problem, factors: int, decay: float) -> Tensor:
    """Gradient descent on the factors with plain L2 decay, from the solution of least squares."""
    start = problem.least_squares
    root = start.abs() ** (1 / factors)
    parts = torch.nn.Parameter(torch.stack([start.sign() * root, *[root.clone() for _ in range(factors - 1)]]))
    optimizer = torch.optim.SGD([parts], lr=0.02, weight_decay=decay)
    for _ in range(6000):
        optimizer.zero_grad()
        parts.prod(0).backward(problem.gradient(parts.detach().prod(0)))
        optimizer.step()
    return parts.detach().prod(0)


def _support(weight: Tensor, threshold: float = 0.0) -> set[int]:
    return set((weight.abs() > threshold).nonzero().flatten().tolist())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("factors", "strength"), [(2, 0.25), (3, 0.2)])
def test_the_decay_finds_what_the_factored_problem_finds(factors: int, strength: float, seed: int) -> None:
    problem, p_norm = _problem(seed), 2 / factors
    ours, adamw = _by_sgd(problem, p_norm, strength), _by_adamw(problem, p_norm, strength)
    theirs = _factored(problem, factors, strength)
    # Factors come near zero and never reach it. The decay does, at p = 1 the later the less sure a weight's fate is.
    assert _support(ours, 1e-3) == _support(adamw) == _support(theirs, 1e-3) == set(SUPPORT)
    assert p_norm == 1 or _support(ours) == set(SUPPORT)
    assert (ours - theirs).abs().max() < 1e-3
    # √v̂ is the root of σ² and the squared gradient, hence a few hundredths of the way too little penalty.
    assert (adamw - theirs).abs().max() < 0.04
    assert (theirs - problem.least_squares).abs().max() > 0.2


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("strength", [0.2, 0.3])
def test_for_p_1_it_is_the_lasso(strength: float, seed: int) -> None:
    problem = _problem(seed)
    lasso = Lasso(alpha=strength, fit_intercept=False, tol=1e-10, max_iter=100_000)
    lasso.fit(problem.inputs.numpy(), problem.wanted.numpy())
    exact = torch.from_numpy(np.asarray(lasso.coef_))
    ours, adamw = _by_sgd(problem, 1.0, strength), _by_adamw(problem, 1.0, strength)
    assert _support(ours, 1e-3) == _support(adamw) == _support(exact)
    assert (ours - exact).abs().max() < 1e-3
    assert (adamw - exact).abs().max() < 0.04
