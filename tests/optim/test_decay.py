"""decay.py: shrink factors, the critical weight, the penalty, the forecast."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_pdecay.optim.decay import forecast_threshold, lambda_for_threshold, shrink_factor
from tests.helpers.reference import adamw_lp64


quick = settings(derandomize=True, deadline=None, max_examples=150)

P_ANY = st.floats(0.1, 4.0)
P_BELOW_2 = st.floats(0.1, 1.95)
ALPHA_LAMBDA = st.one_of(st.just(0.0), st.floats(1e-12, 10.0))
MAGNITUDE = st.builds(lambda e, m: m * 10.0**e, st.integers(-45, 3), st.floats(1.0, 9.99))
WEIGHT = st.one_of(st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 1.0, 1e4]), MAGNITUDE, MAGNITUDE.map(lambda w: -w))
WEIGHTS = st.lists(WEIGHT, min_size=1, max_size=12)
DTYPES = st.sampled_from([torch.float32, torch.float64])


@quick
@given(WEIGHTS, P_ANY, ALPHA_LAMBDA, DTYPES)
def test_shrink_factor_equals_the_formula(
    weights: list[float], p_norm: float, alpha_lambda: float, dtype: torch.dtype
) -> None:
    weight = torch.tensor(weights, dtype=dtype)
    factor = shrink_factor(weight, p_norm, alpha_lambda)
    expected = torch.from_numpy(adamw_lp64.shrink(weight.tolist(), p_norm, alpha_lambda))
    assert factor.dtype == dtype and factor.shape == weight.shape
    # |w|^x is exp2(x log2|w|) at best: its relative error is eps times the exponent, which is at most about 150 in
    # float32. Below atol s has left float32's normal range.
    rtol, atol = (5e-5, 1e-24) if dtype == torch.float32 else (1e-12, 1e-290)
    torch.testing.assert_close(factor.double(), expected, rtol=rtol, atol=atol)


@quick
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    P_ANY,
    st.floats(0.0, 10.0),
    DTYPES,
)
@example([0.0, 1e-45], 0.1, 1e-60, torch.float32)  # s and αλ both vanish in float32
@example([0.0, 1e-45], 1.9, 5e-324, torch.float32)
@example([0.0, 5e-324], 0.1, 5e-324, torch.float64)
@example([0.0, 1e4], 4.0, 10.0, torch.float32)
@example([0.0, 1e-45], 2.0, 10.0, torch.float32)
def test_shrink_factor_lies_between_0_and_1(
    weights: list[float], p_norm: float, alpha_lambda: float, dtype: torch.dtype
) -> None:
    factor = shrink_factor(torch.tensor(weights, dtype=dtype), p_norm, alpha_lambda)
    assert bool(((factor >= 0) & (factor <= 1)).all()), factor


@pytest.mark.parametrize("p_norm", [0.1, 0.5, 0.8, 1.0, 1.5, 1.99, 2.0, 2.5, 3.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_decay_multiplies_by_exactly_1(p_norm: float, dtype: torch.dtype) -> None:
    weight = torch.tensor([0.0, -0.0, 1e-45, -1e-38, 1e-10, -0.3, 1.0, 1e4], dtype=dtype)
    assert torch.equal(shrink_factor(weight, p_norm, 0.0), torch.ones_like(weight))


@pytest.mark.parametrize("p_norm", [0.1, 0.5, 0.8, 1.0, 1.5, 1.99])
def test_zero_has_factor_0_below_p_2(p_norm: float) -> None:
    assert shrink_factor(torch.zeros(3), p_norm, 1e-6).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("p_norm", [2.5, 3.0, 4.0])
def test_zero_has_factor_1_above_p_2(p_norm: float) -> None:
    assert shrink_factor(torch.zeros(3), p_norm, 0.1).tolist() == [1.0, 1.0, 1.0]


def test_p_2_is_the_same_factor_for_every_weight() -> None:
    weight = torch.tensor([0.0, 1e-45, 1e-3, 1.0, 1e4], dtype=torch.float64)
    for alpha_lambda in (1e-5, 1e-3, 0.1):
        factor = shrink_factor(weight, 2.0, alpha_lambda)
        torch.testing.assert_close(factor, torch.full_like(weight, 1 / (1 + alpha_lambda)), rtol=1e-15, atol=0)
        assert bool(((factor - (1 - alpha_lambda)).abs() <= alpha_lambda**2).all())  # AdamW's, to second order


@quick
@given(P_BELOW_2, st.floats(1e-8, 1.0))
def test_shrink_factor_grows_with_the_weight_below_p_2(p_norm: float, alpha_lambda: float) -> None:
    weight = torch.logspace(-12, 4, 200, dtype=torch.float64)
    assert bool((shrink_factor(weight, p_norm, alpha_lambda).diff() >= -1e-15).all())


def test_shrink_factor_is_even_and_leaves_its_input_alone() -> None:
    weight = torch.randn(65, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    assert torch.equal(shrink_factor(weight, 0.7, 0.01), shrink_factor(-weight, 0.7, 0.01))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("p_norm", [0.5, 0.8, 1.0, 1.5, 3.0])
def test_shrink_factor_of_scalars_empties_and_views(p_norm: float) -> None:
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(shrink_factor(base[::2, ::3], p_norm, 0.1), shrink_factor(base, p_norm, 0.1)[::2, ::3])
    assert shrink_factor(torch.zeros(0, 3), p_norm, 0.1).shape == (0, 3)
    assert shrink_factor(torch.tensor(2.0), p_norm, 0.1).shape == ()


# --- critical weight


def critical_weight(p_norm: float, alpha_lambda: float) -> float:
    """The magnitude at which the shrink factor is one half, as docs/update_rule.md states it."""
    return float(alpha_lambda ** (1 / (2 - p_norm)))


@quick
@given(P_BELOW_2, st.floats(1e-12, 10.0))
def test_critical_weight_is_halved(p_norm: float, alpha_lambda: float) -> None:
    critical = torch.tensor(critical_weight(p_norm, alpha_lambda), dtype=torch.float64)
    if critical > 1e-200:
        assert shrink_factor(critical, p_norm, alpha_lambda).item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("p_norm", [0.1, 0.3, 0.5, 0.8, 1.0, 1.5])
def test_repeated_shrinking_collapses_below_the_critical_weight_only(p_norm: float) -> None:
    alpha_lambda = 1e-5
    critical = critical_weight(p_norm, alpha_lambda)
    weight = torch.tensor([critical / 2, -critical / 4, 1.0], dtype=torch.float32)
    for _ in range(25):
        weight = weight * shrink_factor(weight, p_norm, alpha_lambda)
    assert weight[:2].tolist() == [0.0, 0.0]
    assert weight[2].item() > 0.999


# --- penalty and the majorise-minimise view of the update


def penalty(weight: torch.Tensor, p_norm: float, lambda_p: float) -> torch.Tensor:
    """(λ_p / p) ‖w‖_p^p."""
    return weight.abs().pow(p_norm).sum() * (lambda_p / p_norm)


QUADRATIC = {
    "curvature": st.floats(0.1, 5.0),
    "target": st.lists(st.floats(-2.0, 2.0), min_size=1, max_size=6),
    "p_norm": st.floats(0.1, 2.0, exclude_max=True),
    "lambda_p": st.floats(1e-4, 1.0),
}


@quick
@given(**QUADRATIC)
def test_gradient_step_then_shrink_never_raises_loss_plus_penalty(
    curvature: float, target: list[float], p_norm: float, lambda_p: float
) -> None:
    """|w|^p is concave in w²: its tangent majorises it, and the update is a proximal gradient step on that."""
    goal = torch.tensor(target, dtype=torch.float64)
    weight = torch.linspace(-1.5, 1.7, len(target), dtype=torch.float64)
    alpha = 1.0 / curvature  # the largest step for which the gradient step itself majorises

    def objective(w: torch.Tensor) -> float:
        loss = 0.5 * curvature * (w - goal).square().sum() + penalty(w, p_norm, lambda_p)
        return float(loss)

    values = [objective(weight)]
    for _ in range(30):
        stepped = weight - alpha * curvature * (weight - goal)
        weight = stepped * shrink_factor(weight, p_norm, alpha * lambda_p)
        values.append(objective(weight))
    for before, after in zip(values, values[1:], strict=False):
        assert after <= before + 1e-12 * (1 + abs(before))


@pytest.mark.parametrize("p_norm", [0.5, 0.8, 1.0, 1.5, 2.0, 3.0])
def test_fixed_point_is_stationary_for_loss_plus_penalty(p_norm: float) -> None:
    """At the limit a (w - b) + λ sign(w) |w|^(p-1) = 0: the factor p is in the penalty, not in the step."""
    weight, goal, curvature, lambda_p = torch.tensor([1.0], dtype=torch.float64), 1.5, 2.0, 0.1
    for _ in range(3000):
        stepped = weight - 0.2 * curvature * (weight - goal)
        weight = stepped * shrink_factor(weight, p_norm, 0.2 * lambda_p)
    w = weight.item()
    assert curvature * (w - goal) + lambda_p * math.copysign(abs(w) ** (p_norm - 1), w) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("p_norm", [0.5, 0.8, 1.0, 1.5, 2.0, 3.0])
def test_penalty_gradient_is_what_the_shrink_takes(p_norm: float) -> None:
    """For a small step (1 - factor) w = α · d(penalty)/dw to first order."""
    weight = torch.tensor([0.3, -0.7, 1.9], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(penalty(weight, p_norm, 0.1), weight)
    taken = (1 - shrink_factor(weight.detach(), p_norm, 1e-6 * 0.1)) * weight.detach()
    torch.testing.assert_close(taken, 1e-6 * gradient, rtol=1e-5, atol=0)


# --- forecast


@quick
@given(P_BELOW_2, st.floats(1e-6, 10.0), st.floats(1e-4, 100.0))
def test_forecast_equals_the_formula_and_inverts(p_norm: float, lambda_p: float, lr_sum: float) -> None:
    threshold = forecast_threshold(p_norm, lambda_p, lr_sum)
    assert threshold == pytest.approx(((2 - p_norm) * lambda_p * lr_sum) ** (1 / (2 - p_norm)), rel=1e-9)
    if 1e-100 < threshold < 1e100:
        assert lambda_for_threshold(p_norm, threshold, lr_sum) == pytest.approx(lambda_p, rel=1e-6)


@pytest.mark.parametrize("p_norm", [0.3, 0.5, 0.8, 1.0, 1.5])
def test_without_a_gradient_what_starts_below_the_forecast_dies(p_norm: float) -> None:
    lr, lambda_p, steps = 1e-3, 0.01, 2000
    threshold = forecast_threshold(p_norm, lambda_p, lr * steps)
    weight = threshold * torch.tensor([0.1, 0.5, 0.9, 1.1, 2.0], dtype=torch.float64)
    for _ in range(steps):
        weight = weight * shrink_factor(weight, p_norm, lr * lambda_p)
    assert weight[:3].tolist() == [0.0, 0.0, 0.0]
    assert bool((weight[3:] > 0).all())


def test_forecast_of_no_decay_is_0() -> None:
    assert forecast_threshold(0.8, 0.0, 1.0) == 0.0
    assert forecast_threshold(0.8, 0.01, 0.0) == 0.0


@pytest.mark.parametrize("p_norm", [2.0, 3.0])
def test_forecast_does_not_exist_from_p_2(p_norm: float) -> None:
    with pytest.raises(ValueError, match=rf"p_norm.*{p_norm}"):
        forecast_threshold(p_norm, 0.01, 1.0)
    with pytest.raises(ValueError, match=rf"p_norm.*{p_norm}"):
        lambda_for_threshold(p_norm, 0.1, 1.0)
