"""The backends of the step against the float64 reference and each other, at every size and in every layout.

Stated tolerances of one step from the optimizer's own state, with ``scale`` the magnitudes that the step added up:

- float32: 16 · 1e-7 · scale · factor + 5e-5 · |result| + 1e-22; backend "reference" rounds once:
  1.2e-7 · |result| + 1.2e-38
- float64: 16 · 2.3e-16 · scale · factor + 1e-11 · |result| + 1e-280
- bfloat16 and float16: one of the two neighbours of such a value
- moments: 4 · epsilon of what they are stored as, relative to the terms
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pdecay import AdamWLp
from tests.helpers.reference.adamw_lp64 import Hyper, Reference
from tests.optim.test_adamw_lp import build, grad_value, reference_at, tolerance, ulp, weight_value


quick = settings(derandomize=True, deadline=None, max_examples=50)

BACKENDS = ["compiled", "foreach", "reference"]
FAST = ["compiled", "foreach"]
LOW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *LOW]
# All that backend "compiled" does.
PAIRS: list[tuple[torch.dtype, str | None]] = [
    (torch.float32, None),
    (torch.float32, "bfloat16"),
    (torch.float64, None),
    (torch.float64, "bfloat16"),
    (torch.bfloat16, None),
    (torch.bfloat16, "float32"),
    (torch.float16, None),
    (torch.float16, "float32"),
]
MOMENTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

hypers = st.builds(
    Hyper,
    lr=st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.floats(1e-5, 1e-2)),
    beta1=st.sampled_from([0.9, 0.9, 0.0, 0.5, 0.99]),
    beta2=st.sampled_from([0.999, 0.999, 0.0, 0.95]),
    eps=st.sampled_from([1e-8, 1e-8, 1e-6]),
    weight_decay=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    p_norm=st.one_of(st.sampled_from([0.1, 0.5, 0.8, 1.0, 1.5, 1.999, 2.0, 3.0, 4.0, 10.0]), st.floats(0.1, 4.0)),
    lambda_p=st.one_of(st.just(0.0), st.floats(1e-6, 10.0), st.floats(1e-3, 0.1)),
    keep_zeros=st.booleans(),
    maximize=st.booleans(),
)


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[float], list[list[float]]]:
    """Weights and the gradients of one to three steps; gradients up to 100, whose squares float16 can hold."""
    size = draw(st.integers(1, 9))
    weights = draw(st.lists(weight_value, min_size=size, max_size=size))
    values = grad_value.map(lambda g: max(-100.0, min(100.0, g)))
    return weights, draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=1, max_size=3))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def allowed_error(reference: Reference, expected: torch.Tensor, dtype: torch.dtype, backend: str) -> torch.Tensor:
    allowed = tolerance(reference, dtype)
    if backend == "reference" and dtype == torch.float32:
        allowed = 1.2e-7 * expected.abs() + torch.finfo(dtype).tiny
    return allowed + ulp(expected.abs() + allowed, dtype) if dtype in LOW else allowed


def lost(reference: Reference) -> torch.Tensor:
    """Where float16 holds the second moment as 0, which is no divisor: anything finite is right there."""
    return torch.from_numpy(reference.denominator) < 2.0**-12


def check_steps(
    weights: list[float],
    grads: list[list[float]],
    hyper: Hyper,
    dtype: torch.dtype,
    moments: str | None,
    backend: str,
) -> None:
    kept = dtype if moments is None or dtype == torch.float64 else MOMENTS[moments]
    if backend == "foreach" and dtype in LOW and kept == dtype and hyper.lambda_p == 0:
        hyper = dataclasses.replace(hyper, lambda_p=1e-4)  # is torch's AdamW then, which rounds after every operation
    parameter, optimizer = build(
        torch.tensor(weights, dtype=torch.float64).to(dtype), hyper, backend=backend, moments=moments
    )
    dormant: bool | None = None
    largest = torch.finfo(dtype).max
    for values in grads:
        parameter.grad = torch.tensor(values, dtype=torch.float64).to(dtype)
        before = parameter.detach().clone()
        reference = reference_at(parameter, optimizer, dormant)
        expected = torch.from_numpy(reference.step(parameter.grad.tolist(), hyper)).clamp(-largest, largest)
        dormant = reference.dormant
        optimizer.step()
        actual = parameter.detach().double()
        assert bool(actual.isfinite().all()), "finite input gives finite output"
        allowed = allowed_error(reference, expected, dtype, backend)
        if kept == torch.float16:
            allowed[lost(reference)] = 2 * largest
        assert bool(((actual - expected).abs() <= allowed).all()), (actual, expected, allowed)
        zero = torch.from_numpy(reference.factor == 0)
        assert bool((actual[zero] == 0).all()), "a factor of 0 gives exact 0"
        if hyper.keep_zeros:
            assert bool((actual[before == 0] == 0).all())
        state = optimizer.state[parameter]
        assert int(state["step"]) == reference.steps
        info = torch.finfo(kept)
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == kept
            exact = torch.from_numpy(getattr(reference, name)).clamp(-info.max, info.max)
            scale = torch.tensor(values, dtype=torch.float64).abs() if name == "exp_avg" else exact.abs()
            error = (state[name].double() - exact).abs()
            # A multiple of the epsilon is right for one rounding in bfloat16, and for three in float32.
            assert bool((error <= 4 * info.eps * (exact.abs() + scale) + info.tiny).all()), (name, error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "moments"), PAIRS)
@quick
@given(run=runs(), hyper=hypers)
def test_steps_equal_the_reference(
    backend: str,
    dtype: torch.dtype,
    moments: str | None,
    run: tuple[list[float], list[list[float]]],
    hyper: Hyper,
) -> None:
    check_steps(*run, hyper, dtype, moments, backend)


@pytest.mark.parametrize("backend", ["foreach", "reference"])
@quick
@given(run=runs(), hyper=hypers)
def test_float16_weights_with_bfloat16_moments(
    backend: str, run: tuple[list[float], list[list[float]]], hyper: Hyper
) -> None:
    check_steps(*run, hyper, torch.float16, "bfloat16", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "moments"), [(torch.float16, "float32"), (torch.float32, "bfloat16")])
def test_large_gradients_reach_moments_that_can_hold_their_squares(
    backend: str, dtype: torch.dtype, moments: str
) -> None:
    """0.001 · 2e4² is beyond float16, but neither float32 nor bfloat16 moments are float16."""
    hyper = Hyper(lr=0.01, lambda_p=0.1)
    check_steps([0.5, -0.5, 0.1], [[2e4, -2e4, 1e4]] * 3, hyper, dtype, moments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p_norm", [0.1, 0.8, 1.999, 2.0, 4.0, 10.0])
@pytest.mark.parametrize(
    ("lr", "lambda_p"), [(0.0, 10.0), (1e-30, 1e-30), (5e-324, 10.0), (1e-45, 1.0), (1.0, 1e-60), (1.0, 10.0)]
)
def test_products_that_underflow_stay_finite(
    backend: str, dtype: torch.dtype, p_norm: float, lr: float, lambda_p: float
) -> None:
    weight = torch.tensor([0.0, -0.0, 1e-45, -1e-38, 1e-30, 1e-7, 1.0, -1e4], dtype=torch.float64).to(dtype)
    parameter, optimizer = build(weight, Hyper(lr=lr, lambda_p=lambda_p, p_norm=p_norm), backend=backend)
    for scale in (0.0, 1.0, 1e4):
        parameter.grad = torch.full_like(parameter, scale)
        optimizer.step()
        assert bool(parameter.isfinite().all()), parameter
    if lr == 0:
        assert torch.equal(parameter, weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exponent", [30, 31, 32, 37, 38])
@pytest.mark.parametrize("p_norm", [0.5, 1.9, 2.0, 2.05, 2.5])
def test_weights_up_to_the_end_of_float32(backend: str, exponent: int, p_norm: float) -> None:
    weight = 10.0**exponent
    check_steps([weight, -weight, 3.0 * 10.0 ** (exponent - 1)], [[1.0, -1.0, 0.5]], Hyper(lr=0.1, p_norm=p_norm,
        lambda_p=0.3), torch.float32, None, backend)  # fmt: skip


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("p_norm", [0.1, 0.5, 0.8, 1.0, 1.5, 1.9, 2.0, 2.5, 4.0])
def test_trajectory_equals_the_reference(backend: str, p_norm: float) -> None:
    hyper = Hyper(lr=1e-3, p_norm=p_norm, lambda_p=0.05, weight_decay=0.1)
    weight = normal(130, seed=3) * 0.5
    parameter, optimizer = build(weight, hyper, backend=backend)
    reference = Reference(weight.double().numpy())
    for seed in range(40):
        parameter.grad = normal(130, seed=100 + seed) + 0.3
        optimizer.step()
        reference.step(parameter.grad.tolist(), hyper)
    expected = torch.from_numpy(reference.weight)
    # Near the collapse relative errors amplify: absolute on the scale of lr.
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=2e-3 * hyper.lr)


# --- every size, every place, every number of threads

BIG_SIZES = [131071, 131072, 131073, 262145]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_blocks_in_one_call(backend: str, dtype: torch.dtype) -> None:
    hyper = Hyper(lr=0.02, p_norm=0.8, lambda_p=0.5, weight_decay=0.1)
    sizes = [*range(1, 131), 4095, 4096, 4097]
    params = [torch.nn.Parameter(normal(size, seed=size, dtype=dtype)) for size in sizes]
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = normal(param.numel(), seed=1000 + param.numel(), dtype=dtype)
    AdamWLp(params, lr=0.02, p_norm=0.8, lambda_p=0.5, weight_decay=0.1, backend=backend).step()
    reference = Reference(torch.cat(before).double().numpy())
    grads = torch.cat([param.grad for param in params if param.grad is not None])
    expected = torch.from_numpy(reference.step(grads.tolist(), hyper))
    actual = torch.cat([param.detach() for param in params]).double()
    right = (actual - expected).abs() <= allowed_error(reference, expected, dtype, backend)
    if dtype == torch.float16:
        right |= lost(reference)
    assert bool(right.all())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_chunks_at_every_place(backend: str, dtype: torch.dtype) -> None:
    """Against backend "reference", which the tests above hold to the independent one."""
    results: dict[str, torch.Tensor] = {}
    for name in (backend, "reference"):
        params = [torch.nn.Parameter(normal(size, seed=size, dtype=dtype)) for size in BIG_SIZES]
        for param in params:
            grad = normal(param.numel(), seed=1 + param.numel(), dtype=dtype)
            param.grad = grad.clamp(min=0) + 0.01  # float16 holds the square of 0.01
        AdamWLp(params, lr=0.02, lambda_p=0.5, weight_decay=0.1, backend=name).step()
        results[name] = torch.cat([param.detach() for param in params]).double()
    actual, expected = results[backend], results["reference"]
    # |terms| are below 10, and the stated tolerances are relative to them
    allowed = 5e-5 * expected.abs() + 1.6e-5 if dtype != torch.float64 else 1e-11 * expected.abs() + 4e-14
    if dtype in LOW:
        allowed = allowed + ulp(expected.abs(), dtype)
    assert bool(((actual - expected).abs() <= allowed).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_gives_the_same_result_at_every_place(backend: str, dtype: torch.dtype) -> None:
    """What runs in vector registers, and what is left over at the end, in blocks and in chunks."""
    for size in (1, 7, 63, 65, 127, 4099, 131077):
        param = torch.nn.Parameter(torch.full((size,), 0.0371, dtype=dtype))
        param.grad = torch.full_like(param, 0.27)
        optimizer = AdamWLp([param], lr=0.01, lambda_p=0.3, p_norm=0.7, weight_decay=0.1, backend=backend)
        optimizer.step()
        optimizer.step()
        assert len(param.unique()) == 1, size
        if size == 1:
            alone = param.item()
        assert param[0].item() == alone


@pytest.mark.parametrize(("dtype", "moments"), PAIRS)
def test_number_of_threads_does_not_matter(
    dtype: torch.dtype, moments: str | None, threads: Callable[[int], None]
) -> None:
    results = []
    for number in (1, 2, 3):
        threads(number)
        params = [torch.nn.Parameter(normal(n, seed=n, dtype=dtype)) for n in (1, 63, 4097, 0, 40_001, 262_145)]
        optimizer = AdamWLp(params, lr=0.02, lambda_p=0.5, moments=moments, backend="compiled")
        for seed in range(2):
            for param in params:
                param.grad = normal(param.numel(), seed=seed, dtype=dtype)
            optimizer.step()
        found = [torch.cat([param.detach() for param in params])]
        found += [torch.cat([optimizer.state[p][name] for p in params]) for name in ("exp_avg", "exp_avg_sq")]
        results.append(found)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_one_call_do_not_matter_to_each_other(backend: str, dtype: torch.dtype) -> None:
    sizes = (5, 4097, 0, 130, 70_000)
    results = []
    for alone in (False, True):
        params = [torch.nn.Parameter(normal(n, seed=n, dtype=dtype)) for n in sizes]
        optimizer = AdamWLp(params, lr=0.02, lambda_p=0.5, backend=backend)
        for some in [[param] for param in params] if alone else [params]:
            for param in params:
                param.grad = None
            for param in some:
                param.grad = normal(param.numel(), seed=7, dtype=dtype)
            optimizer.step()
        results.append(params)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# --- the same random bits

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.view(20, 30, 10, 10).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda t: t.view(20, 30, 4, 5, 5).to(memory_format=torch.channels_last_3d),
    "transposed": lambda t: t.view(100, 600).t(),
}


@pytest.mark.parametrize(("dtype", "moments"), [*((d, m) for d in LOW for m in (None, "float32")),
                                                (torch.float32, "bfloat16")])  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backends_round_with_the_same_random_bits(dtype: torch.dtype, moments: str | None, layout: str) -> None:
    """Other bits would give another neighbour in a third of the places; rounding in float32 in one of a thousand."""
    found: dict[str, list[torch.Tensor]] = {}
    for backend in BACKENDS:
        first, second = normal(300, seed=1, dtype=dtype), LAYOUTS[layout](normal(60_000, seed=2, dtype=dtype))
        params = [torch.nn.Parameter(first), torch.nn.Parameter(second)]
        optimizer = AdamWLp(params, lr=0.003, lambda_p=0.1, moments=moments, backend=backend)
        params[0].grad, params[1].grad = first * 0.3, LAYOUTS[layout](normal(60_000, seed=3, dtype=dtype))
        optimizer.step()
        state = optimizer.state[params[1]]
        found[backend] = [params[1].detach(), state["exp_avg"], state["exp_avg_sq"]]
    compared = [0] if moments == "float32" else [1, 2] if dtype == torch.float32 else [0, 1, 2]
    for backend, tensors in found.items():
        for index in compared:
            share = (tensors[index] != found["foreach"][index]).double().mean().item()
            assert share < 0.01, f"{backend} and foreach differ in {share:.1%} of tensor {index}"


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", [(300_001,), (400, 800)])
def test_chunks_continue_the_random_bits(backend: str, shape: tuple[int, ...]) -> None:
    """Also of a transposed weight, which is cut along its longer side: every place has bits of its own."""
    found = {}
    for name in (backend, "reference"):
        weight = normal(*shape, seed=2, dtype=torch.bfloat16)
        param = torch.nn.Parameter(weight if len(shape) == 1 else weight.view(800, 400).t())
        param.grad = torch.full_like(param, 0.3)
        AdamWLp([param], lr=0.003, lambda_p=0.1, backend=name).step()
        found[name] = param.detach()
    share = (found[backend] != found["reference"]).double().mean().item()
    assert share < 0.01, f"{share:.1%} differ"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_weights_decay_in_the_mean(backend: str, dtype: torch.dtype) -> None:
    hyper = Hyper(lr=0.1, p_norm=0.8, lambda_p=1e-3)
    parameter, optimizer = build(torch.ones(20_000, dtype=dtype), hyper, backend=backend)
    parameter.grad = torch.zeros_like(parameter)
    exact = Reference(torch.ones(1).numpy())
    for _ in range(250):
        optimizer.step()
        exact.step([0.0], hyper)
    decayed = 1 - float(exact.weight[0])
    values = parameter.detach().double()
    assert decayed > 0.02
    assert 1 - float(values.mean()) == pytest.approx(decayed, rel=0.02)
    # Independent roundings: their variances add up, they do not repeat themselves from place to place.
    assert 0 < float(values.std()) < math.sqrt(250) * torch.finfo(dtype).eps
    pairs = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
    assert abs(float(pairs)) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("moments_of", [torch.float32, torch.bfloat16])
def test_bfloat16_second_moments_do_not_stall(backend: str, moments_of: torch.dtype) -> None:
    """They rise to 1 - 0.999^300 and then fall by 0.999^300: in bfloat16 rounded to the nearest, neither happens."""
    parameter = torch.nn.Parameter(torch.ones(5_000, dtype=moments_of))
    optimizer = AdamWLp([parameter], lr=1e-4, moments="bfloat16", backend=backend)
    state = optimizer.state[parameter]
    for grad, expected in ((1.0, 1 - 0.999**300), (0.0, (1 - 0.999**300) * 0.999**300)):
        parameter.grad = torch.full_like(parameter, grad)
        for _ in range(300):
            optimizer.step()
        state = optimizer.state[parameter]
        assert state["exp_avg_sq"].dtype == torch.bfloat16
        assert state["exp_avg_sq"].double().mean().item() == pytest.approx(expected, rel=0.02)
        assert state["exp_avg"].double().mean().item() == pytest.approx(grad, rel=0.02, abs=1e-12)
