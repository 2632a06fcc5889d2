"""optim/rounding.py: stochastic rounding to bfloat16 and float16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pdecay import AdamWLp
from hf_pdecay.optim.rounding import noise_bits, stochastic_round


quick = settings(derandomize=True, deadline=None, max_examples=200)

LOW = [torch.bfloat16, torch.float16]
MAGNITUDE = st.builds(lambda e, m: m * 10.0**e, st.integers(-45, 3), st.floats(1.0, 9.99))
FINITE = st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), MAGNITUDE, MAGNITUDE.map(lambda x: -x))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rounding(x: torch.Tensor, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return stochastic_round(x, dtype, noise_bits(seed, 0, 0, x.numel(), x.device))


def neighbours(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest finite value of ``dtype`` that is <= x and the smallest that is >= x, as float64."""
    largest = torch.finfo(dtype).max
    near = x.double().clamp(-largest, largest).float().to(dtype)
    near = torch.where(near.isinf(), torch.full_like(near, largest).copysign(near), near)
    infinity = torch.full_like(near, float("inf"))
    below = torch.where(near.double() > x.double(), torch.nextafter(near, -infinity), near)
    above = torch.where(near.double() < x.double(), torch.nextafter(near, infinity), near)
    return below.double().clamp(-largest, largest), above.double().clamp(-largest, largest)


@pytest.mark.parametrize("dtype", LOW)
@quick
@given(values=st.lists(FINITE, min_size=1, max_size=16), seed=st.integers(0, 2**31))
def test_result_is_one_of_the_two_neighbours(dtype: torch.dtype, values: list[float], seed: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    rounded = rounding(x, dtype, seed)
    below, above = neighbours(x, dtype)
    assert rounded.dtype == dtype and rounded.shape == x.shape
    assert bool(rounded.isfinite().all())
    assert bool(((rounded.double() == below) | (rounded.double() == above)).all()), (x, rounded, below, above)


@pytest.mark.parametrize("dtype", LOW)
def test_every_value_of_the_dtype_stays_exact(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    for seed in range(3):
        assert torch.equal(rounding(every.float(), dtype, seed), every)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "value", [1.001, -1.001, 0.3, 1e-3, -7e-5, 3e-6, 4e-8, -1e-8, 257.3, 12345.6, -40000.1, 1e-39, -3e-41]
)
def test_mean_is_the_value(dtype: torch.dtype, value: float) -> None:
    count = 200_000
    x = torch.full((count,), value, dtype=torch.float32)
    rounded = rounding(x, dtype).double()
    below, above = neighbours(x[:1], dtype)
    gap = float(above - below)
    chance = (float(x[0]) - float(below)) / gap if gap else 0.0
    deviation = gap * (max(chance * (1 - chance), 1e-5) / count) ** 0.5
    # float16 below 1e-8 needs more random bits than a 24-bit uniform has; 5 deviations besides
    assert abs(float(rounded.mean()) - float(x[0])) <= 5 * deviation + 2**-15 * gap


@pytest.mark.parametrize("dtype", LOW)
def test_rounding_is_not_all_in_one_direction(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    x = torch.full((10_000,), 1.0 + step / 2)
    assert 0.45 < float((rounding(x, dtype) > 1).double().mean()) < 0.55


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.float16, [65504.0, 65505.0, 65519.0, 65520.0, 65536.0, 1e5, 3.4e38]),
        (torch.bfloat16, [3.3895313892515355e38, 3.39e38, 3.4e38, 3.4028234663852886e38]),
    ],
)
def test_finite_values_saturate(dtype: torch.dtype, values: list[float]) -> None:
    x = torch.tensor(values).repeat(50)
    for sign in (1.0, -1.0):
        rounded = rounding(sign * x, dtype)
        assert torch.equal(rounded, torch.full_like(rounded, sign * torch.finfo(dtype).max))


@pytest.mark.parametrize("dtype", LOW)
def test_nan_stays_nan(dtype: torch.dtype) -> None:
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    x = torch.cat([patterns, torch.tensor([float("nan")])]).repeat(64)
    assert bool(rounding(x, dtype).isnan().all())


@pytest.mark.parametrize("backend", ["compiled", "foreach"])
def test_nan_and_infinity_in_the_stores_of_the_backends(backend: str) -> None:
    """A NaN stays one, whatever its payload; an infinity becomes the largest finite value, as all beyond the range."""
    patterns = [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, 0x7FFF8000, -0x8000]
    nan = torch.tensor(patterns, dtype=torch.int32).repeat(64).view(torch.float32)
    infinite = torch.tensor([float("inf"), float("-inf")]).repeat(64)
    param = torch.nn.Parameter(torch.ones(len(nan) + len(infinite)))
    optimizer = AdamWLp([param], lr=0.1, moments="bfloat16", backend=backend, skip_nonfinite=False)
    param.grad = torch.cat([nan, infinite])
    optimizer.step()
    largest = torch.finfo(torch.bfloat16).max
    for name, signs in (("exp_avg", infinite.sign()), ("exp_avg_sq", torch.ones_like(infinite))):
        moment = optimizer.state[param][name]
        assert moment.dtype == torch.bfloat16
        assert bool(moment[: len(nan)].isnan().all())
        assert torch.equal(moment[len(nan) :].float(), signs * largest)
    assert bool(param[: len(nan)].isnan().all())


@pytest.mark.parametrize("dtype", LOW)
def test_no_zero_is_negative(dtype: torch.dtype) -> None:
    """Also not what is rounded to zero."""
    rounded = rounding(torch.tensor([0.0, -0.0, -1e-45, -1e-10]).repeat(50), dtype)
    assert not bool((rounded.signbit() & (rounded == 0)).any())


def test_noise_depends_on_step_tensor_and_place_only() -> None:
    cpu = torch.device("cpu")
    whole = noise_bits(7, 3, 0, 1000, cpu)
    assert torch.equal(whole[400:], noise_bits(7, 3, 400, 600, cpu))
    assert torch.equal(whole, noise_bits(torch.tensor(7.0), 3, 0, 1000, cpu))
    for step, index in ((8, 3), (7, 4), (7, 3 + (1 << 20))):
        assert float((noise_bits(step, index, 0, 1000, cpu) == whole).double().mean()) < 0.01


def test_noise_has_even_and_independent_bits() -> None:
    noise = noise_bits(1, 0, 0, 1 << 16, torch.device("cpu"))
    assert int(noise.min()) >= 0 and int(noise.max()) < 1 << 32
    bits = torch.stack([(noise >> k) & 1 for k in range(32)]).double() - 0.5
    correlation = bits @ bits.T * 4 / bits.shape[1]
    assert float(bits.mean(1).abs().max()) < 0.5 * 6 / 256
    assert float((correlation - torch.eye(32)).abs().max()) < 6 / 256
    following = torch.stack([(noise_bits(2, 0, 0, 1 << 16, torch.device("cpu")) >> k) & 1 for k in range(32)])
    assert float((bits @ (following.double() - 0.5).T * 4 / bits.shape[1]).abs().max()) < 6 / 256


@pytest.mark.parametrize("dtype", LOW)
def test_global_generator_and_input_stay_untouched(dtype: torch.dtype) -> None:
    x = torch.randn(100, generator=generator(1))
    before, state = x.clone(), torch.get_rng_state()
    rounding(x, dtype)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", LOW)
def test_shapes_and_views(dtype: torch.dtype) -> None:
    assert rounding(torch.tensor(1.001), dtype).shape == ()
    assert rounding(torch.zeros(0, 3), dtype).shape == (0, 3)
    view = torch.randn(6, 8, generator=generator(1))[::2, ::3]
    rounded = rounding(view, dtype)
    below, above = neighbours(view, dtype)
    assert rounded.shape == view.shape
    assert bool(((rounded.double() == below) | (rounded.double() == above)).all())


@pytest.mark.parametrize("dtype", LOW)
def test_neighbouring_elements_round_independently(dtype: torch.dtype) -> None:
    x = torch.full((100_000,), 1.0 + torch.finfo(dtype).eps / 2)
    up = (rounding(x, dtype) > 1).double() - 0.5
    for lag in (1, 2, 3, 4, 8, 16, 32, 64, 1024):
        assert abs(float((up[lag:] * up[:-lag]).mean())) < 0.25 * 0.02
