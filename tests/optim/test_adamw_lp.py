"""AdamWLp's arithmetic against the float64 reference: one step from the optimizer's own state, and trajectories."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pdecay import AdamWLp
from tests.helpers.reference.adamw_lp64 import Hyper, Reference


quick = settings(derandomize=True, deadline=None, max_examples=100)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOW = [torch.bfloat16, torch.float16]

magnitude = st.builds(lambda e, m: m * 10.0**e, st.integers(-45, 3), st.floats(1.0, 9.99))
weight_value = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 1.0, -1.0, 1e4, -1e4]),
    magnitude,
    magnitude.map(lambda w: -w),
    st.floats(-2.0, 2.0),
)
grad_value = st.one_of(st.just(0.0), st.floats(-1e4, 1e4), st.floats(-1.0, 1.0), magnitude, magnitude.map(lambda w: -w))


@st.composite
def runs(draw: st.DrawFn, largest_grad: float = 1e4) -> tuple[list[float], list[list[float]]]:
    """Weights and the gradients of one to four steps."""
    size = draw(st.integers(1, 9))
    weights = draw(st.lists(weight_value, min_size=size, max_size=size))
    values = grad_value.map(lambda g: max(-largest_grad, min(largest_grad, g)))
    grads = draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=1, max_size=4))
    return weights, grads


hypers = st.builds(
    Hyper,
    lr=st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.floats(1e-5, 1e-2)),
    beta1=st.sampled_from([0.9, 0.9, 0.0, 0.99]),
    beta2=st.sampled_from([0.999, 0.999, 0.95]),
    weight_decay=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    p_norm=st.one_of(st.sampled_from([0.5, 0.8, 1.0, 1.5, 2.0, 3.0]), st.floats(0.1, 4.0)),
    lambda_p=st.one_of(st.just(0.0), st.floats(1e-6, 10.0), st.floats(1e-3, 0.1)),
    keep_zeros=st.booleans(),
    maximize=st.booleans(),
)


def build(weight: torch.Tensor, hyper: Hyper, **more: Any) -> tuple[torch.nn.Parameter, AdamWLp]:
    parameter = torch.nn.Parameter(weight.clone())
    options = dataclasses.asdict(hyper)
    betas = (options.pop("beta1"), options.pop("beta2"))
    return parameter, AdamWLp([parameter], betas=betas, **options, **more)


def reference_at(parameter: torch.nn.Parameter, optimizer: AdamWLp, dormant: bool | None = None) -> Reference:
    """The reference in exactly the state that the optimizer is in."""
    state = optimizer.state[parameter]
    weight = parameter.detach().double().flatten().numpy()
    if not state:
        return Reference(weight)
    return Reference(
        weight,
        state["exp_avg"].double().flatten().numpy(),
        state["exp_avg_sq"].double().flatten().numpy(),
        int(state["step"]),
        dormant,
    )


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring values of ``dtype`` at ``x``, in float64."""
    info = torch.finfo(dtype)
    return torch.maximum(x.abs(), torch.tensor(info.tiny, dtype=torch.float64)).log2().floor().exp2() * info.eps


def tolerance(reference: Reference, dtype: torch.dtype) -> torch.Tensor:
    """What rounding may change in one step: relative to the terms that were added, so that cancelling ones count."""
    eps, rtol, atol = (1e-7, 5e-5, 1e-22) if dtype != torch.float64 else (2.3e-16, 1e-11, 1e-280)
    scale, factor = torch.from_numpy(reference.scale), torch.from_numpy(reference.factor)
    return 16 * eps * scale * factor + rtol * torch.from_numpy(reference.weight).abs() + atol


def check_steps(weights: list[float], grads: list[list[float]], hyper: Hyper, dtype: torch.dtype) -> None:
    parameter, optimizer = build(torch.tensor(weights, dtype=torch.float64).to(dtype), hyper)
    dormant: bool | None = None
    for values in grads:
        grad = torch.tensor(values, dtype=torch.float64).to(dtype)
        reference = reference_at(parameter, optimizer, dormant)
        expected = torch.from_numpy(reference.step(grad.tolist(), hyper))
        dormant = reference.dormant
        parameter.grad = grad
        optimizer.step()
        actual = parameter.detach().double()
        allowed = tolerance(reference, dtype)
        if dtype in LOW:  # one of the two neighbours; what lies outside the range saturates
            expected = expected.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
            allowed += ulp(expected.abs() + allowed, dtype)
        if dtype == torch.float16:  # a second moment that float16 holds as 0 is no divisor: anything finite is right
            lost = torch.from_numpy(reference.denominator) < 2.0**-12
            allowed[lost] = 2 * torch.finfo(dtype).max
        assert bool(((actual - expected).abs() <= allowed).all()), (actual, expected, allowed)
        zero = torch.from_numpy(reference.factor == 0)
        assert bool((actual[zero] == 0).all()), "a factor of 0 gives exact 0"
        state = optimizer.state[parameter]
        assert int(state["step"]) == reference.steps
        rtol = 4 * torch.finfo(dtype).eps
        tiny = torch.finfo(dtype).tiny
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == dtype
            exact = torch.from_numpy(getattr(reference, name)).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
            scale = torch.tensor(values).abs().double() if name == "exp_avg" else exact.abs()
            found = state[name].double().clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
            assert bool(((found - exact).abs() <= rtol * (exact.abs() + scale) + tiny).all()), (name, found, exact)


@quick
@given(runs(), hypers)
def test_float32_steps_equal_the_reference(run: tuple[list[float], list[list[float]]], hyper: Hyper) -> None:
    check_steps(*run, hyper, torch.float32)


@quick
@given(runs(), hypers)
def test_float64_steps_equal_the_reference(run: tuple[list[float], list[list[float]]], hyper: Hyper) -> None:
    check_steps(*run, hyper, torch.float64)


@quick
@given(runs(largest_grad=100.0), hypers.filter(lambda h: h.lambda_p > 0))
def test_bfloat16_steps_are_neighbours_of_the_reference(
    run: tuple[list[float], list[list[float]]], hyper: Hyper
) -> None:
    check_steps(*run, hyper, torch.bfloat16)


@quick
@given(runs(largest_grad=100.0), hypers.filter(lambda h: h.lambda_p > 0))
def test_float16_steps_are_neighbours_of_the_reference(
    run: tuple[list[float], list[list[float]]], hyper: Hyper
) -> None:
    check_steps(*run, hyper, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(
    run=runs(),
    lr=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    p_norm=st.floats(0.1, 4.0),
    lambda_p=st.one_of(st.just(0.0), st.floats(0.0, 10.0)),
    weight_decay=st.floats(0.0, 1.0),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_finite_input_stays_finite(
    dtype: torch.dtype,
    run: tuple[list[float], list[list[float]]],
    lr: float,
    p_norm: float,
    lambda_p: float,
    weight_decay: float,
    flags: tuple[bool, bool],
) -> None:
    weights, grads = run
    keep_zeros, maximize = flags
    hyper = Hyper(
        lr=lr,
        p_norm=p_norm,
        lambda_p=lambda_p,
        weight_decay=weight_decay,
        keep_zeros=keep_zeros,
        maximize=maximize,
    )
    parameter, optimizer = build(torch.tensor(weights, dtype=torch.float64).to(dtype), hyper)
    for values in grads:
        parameter.grad = torch.tensor(values, dtype=torch.float64).to(dtype)
        optimizer.step()
        assert bool(parameter.isfinite().all()), parameter
        for name in ("exp_avg", "exp_avg_sq"):
            assert not bool(optimizer.state[parameter][name].isnan().any())
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize(
    ("lr", "lambda_p"), [(1e-30, 1e-30), (5e-324, 10.0), (1e-300, 1e-300), (1e-45, 1.0), (1.0, 1e-60), (1.0, 10.0)]
)
@pytest.mark.parametrize("p_norm", [0.1, 0.8, 1.0, 1.5, 1.99, 2.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_that_underflow_stay_finite(lr: float, lambda_p: float, p_norm: float, dtype: torch.dtype) -> None:
    weight = torch.tensor([0.0, 1e-45, -1e-38, 1e-30, 1e-7, 1.0, -1e4], dtype=torch.float64).to(dtype)
    parameter, optimizer = build(weight, Hyper(lr=lr, lambda_p=lambda_p, p_norm=p_norm))
    for scale in (0.0, 1.0, 1e4):
        parameter.grad = torch.full_like(parameter, scale)
        optimizer.step()
        assert bool(parameter.isfinite().all()), parameter


@pytest.mark.parametrize("p_norm", [0.1, 0.5, 0.8, 1.0, 1.5, 1.9, 2.0, 2.5, 4.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trajectory_equals_the_reference(p_norm: float, weight_decay: float, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(3)
    weight = torch.randn(40, generator=source).to(dtype) * 0.5
    hyper = Hyper(lr=1e-3, p_norm=p_norm, lambda_p=0.05, weight_decay=weight_decay)
    parameter, optimizer = build(weight, hyper)
    reference = Reference(weight.double().numpy())
    for _ in range(60):
        grad = torch.randn(40, generator=source).to(dtype) + 0.3
        parameter.grad = grad
        optimizer.step()
        reference.step(grad.tolist(), hyper)
    expected = torch.from_numpy(reference.weight)
    # near the collapse relative errors amplify: absolute on the scale of lr for float32
    rtol, atol = (1e-4, 2e-3 * hyper.lr) if dtype == torch.float32 else (1e-9, 1e-12)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("size", [300_000, 1_000_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_equal_the_reference_at_every_place(size: int, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(5)
    weight = torch.randn(size, generator=source).to(dtype)
    grad = torch.randn(size, generator=source).to(dtype)
    hyper = Hyper(lr=0.02, p_norm=0.8, lambda_p=0.5, weight_decay=0.1)
    parameter, optimizer = build(weight, hyper)
    parameter.grad = grad
    optimizer.step()
    powers = [2**k + d for k, d in itertools.product(range(10, 20), (-1, 0, 1)) if 2**k + d < size]
    places = torch.tensor([0, 1, *powers, *range(7, size, 997), size - 2, size - 1])
    reference = Reference(weight[places].double().numpy())
    expected = torch.from_numpy(reference.step(grad[places].tolist(), hyper))
    allowed = tolerance(reference, dtype)
    if dtype in LOW:
        allowed += ulp(expected.abs() + allowed, dtype)
    assert bool(((parameter.detach()[places].double() - expected).abs() <= allowed).all())


# --- the promises, one by one


@pytest.mark.parametrize("p_norm", [0.1, 0.5, 0.8, 1.0, 1.5, 1.99])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", [0.0, 1e-8, 1.0, 1e4])
def test_zero_absorbs_whatever_the_gradient(p_norm: float, dtype: torch.dtype, gradient: float) -> None:
    weight = torch.tensor([0.0, -0.0, 1.0, 0.0, -1.0], dtype=dtype)
    parameter, optimizer = build(weight, Hyper(lr=0.01, p_norm=p_norm, lambda_p=1e-3))
    for sign in (1, 1, -1, 1, 1):
        parameter.grad = torch.full_like(parameter, sign * gradient)
        optimizer.step()
        assert bool((parameter[weight == 0] == 0).all())
    assert bool((parameter[weight != 0] != 0).all())


@pytest.mark.parametrize("p_norm", [0.3, 0.5, 0.8, 1.0, 1.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_below_the_critical_one_collapse_and_large_ones_stay(p_norm: float, dtype: torch.dtype) -> None:
    lr, lambda_p = 1e-2, 1e-2
    critical = (lr * lambda_p) ** (1 / (2 - p_norm))
    small = torch.tensor([critical / 2, -critical / 2, critical / 10], dtype=torch.float64)
    weight = torch.cat([small, torch.tensor([1.0, -1.0], dtype=torch.float64)]).to(dtype)
    parameter, optimizer = build(weight, Hyper(lr=lr, p_norm=p_norm, lambda_p=lambda_p))
    parameter.grad = torch.zeros_like(parameter)
    for _ in range(40):
        optimizer.step()
    assert parameter[:3].tolist() == [0.0, 0.0, 0.0]
    assert bool((parameter[3:].abs() > 0.9).all())


@pytest.mark.parametrize("p_norm", [0.1, 0.8, 1.0, 1.5, 1.99, 2.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_warm_up_step_with_lr_0_changes_no_weight(p_norm: float, dtype: torch.dtype) -> None:
    weight = torch.tensor([0.0, 1e-40, 1e-6, -0.3, 1.0, 1e4], dtype=torch.float64).to(dtype)
    parameter, optimizer = build(weight, Hyper(lr=0.0, p_norm=p_norm, lambda_p=10.0, weight_decay=0.1))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(parameter, weight)
    assert int(optimizer.state[parameter]["step"]) == 1
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    assert bool(parameter.isfinite().all()) and not torch.equal(parameter, weight)


@pytest.mark.parametrize("alpha_lambda", [1e-4, 1e-3, 1e-2])
def test_p_2_is_adamw_to_second_order(alpha_lambda: float) -> None:
    weight = torch.tensor([0.0, 1e-6, -0.5, 1.0, 1e4], dtype=torch.float64)
    parameter, optimizer = build(weight, Hyper(lr=alpha_lambda, p_norm=2.0, lambda_p=1.0))
    rival = torch.nn.Parameter(weight.clone())
    adamw = torch.optim.AdamW([rival], lr=alpha_lambda, weight_decay=1.0)
    parameter.grad, rival.grad = torch.zeros_like(weight), torch.zeros_like(weight)
    optimizer.step()
    adamw.step()
    assert bool(((parameter - rival).abs() <= alpha_lambda**2 * weight.abs()).all())
    assert bool((parameter[2:] != weight[2:]).all())


@pytest.mark.parametrize("p_norm", [2.0, 2.5, 3.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_p_from_2_is_finite_at_zero_and_lets_zero_learn(p_norm: float, dtype: torch.dtype) -> None:
    parameter, optimizer = build(torch.tensor([0.0, 1.0], dtype=dtype), Hyper(lr=0.01, p_norm=p_norm, lambda_p=1.0))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert bool(parameter.isfinite().all())
    assert parameter[0].item() == pytest.approx(-0.01, rel=0.02)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("p_norm", [0.8, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(("alpha_lambda", "steps"), [(4e-3, 60), (1e-4, 250)])
def test_low_precision_weights_decay_in_the_mean(
    dtype: torch.dtype, p_norm: float, alpha_lambda: float, steps: int
) -> None:
    count, start = 20_000, 1.0
    hyper = Hyper(lr=0.1, p_norm=p_norm, lambda_p=alpha_lambda / 0.1)
    parameter, optimizer = build(torch.full((count,), start, dtype=dtype), hyper)
    parameter.grad = torch.zeros_like(parameter)
    exact = Reference(torch.full((1,), start).numpy())
    for _ in range(steps):
        optimizer.step()
        exact.step([0.0], hyper)
    decayed = start - float(exact.weight[0])
    values = parameter.detach().double()
    assert decayed > 0.02
    assert start - float(values.mean()) == pytest.approx(decayed, rel=0.02)
    # independent roundings: their variances add up, they do not repeat themselves from step to step
    gap = torch.finfo(dtype).eps / 2
    assert float(values.std()) < 3 * (steps * gap * alpha_lambda) ** 0.5


@pytest.mark.parametrize("dtype", LOW)
def test_mean_of_many_rounded_steps_is_the_exact_step(dtype: torch.dtype) -> None:
    hyper = Hyper(lr=3e-4, p_norm=0.8, lambda_p=0.1, weight_decay=0.01)
    for start, slope in ((0.7, 0.2), (-0.031, 0.5), (0.004, -0.3)):
        weight = torch.full((60_000,), start, dtype=dtype)
        parameter, optimizer = build(weight, hyper)
        parameter.grad = torch.full_like(parameter, slope)
        optimizer.step()
        exact = Reference(weight[:1].double().numpy())
        exact.step([float(parameter.grad[0])], hyper)
        expected = torch.from_numpy(exact.weight)
        gap = float(ulp(expected, dtype))
        assert abs(float(parameter.detach().double().mean()) - float(expected)) < 0.02 * gap
