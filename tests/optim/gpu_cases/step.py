"""What the Triton kernel computes: cases that test_gpu_kernels.py runs in processes of their own.

The kernel runs in Triton's interpreter, on tensors of a CPU, or compiled on a GPU, which TRITON_INTERPRET decides when
triton is imported.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hf_pdecay import AdamWLp
from hf_pdecay.optim import foreach
from hf_pdecay.optim.gpu import step as gpu_step
from hf_pdecay.optim.rounding import LOW_PRECISION
from tests.helpers.gpu_steps import (
    BF16,
    F16,
    F32,
    F64,
    P_NORMS,
    PAIRS,
    SIZES,
    SOME_PAIRS,
    WRITTEN,
    assert_like_foreach,
    cloned,
    hyper,
    made,
    needs_kernel,
    normal,
    ulp,
)
from tests.helpers.reference.adamw_lp64 import Hyper, Reference


# --- the arithmetic


def check_against_reference(weights: torch.Tensor, settings: Hyper, dtype: torch.dtype) -> None:
    """Two steps, each from the optimizer's own state, against the formulas in float64."""
    parameter = torch.nn.Parameter(weights.to(dtype))
    options = dataclasses.asdict(settings)
    betas = options.pop("beta1"), options.pop("beta2")
    optimizer = AdamWLp([parameter], betas=betas, backend="triton", **options)
    for seed in range(2):
        grad = normal(weights.numel(), seed + 10).to(dtype)
        state = optimizer.state[parameter]
        before = parameter.detach().double().cpu().numpy()
        reference = Reference(before)
        if state:
            moments = state["exp_avg"].double().cpu().numpy(), state["exp_avg_sq"].double().cpu().numpy()
            reference = Reference(before, *moments, int(state["step"]), dormant=False)
        expected = torch.from_numpy(reference.step(grad.double().tolist(), settings))
        parameter.grad = grad
        optimizer.step()
        actual = parameter.detach().double().cpu()
        eps, rtol, atol = (2.3e-16, 1e-11, 1e-280) if dtype == F64 else (1e-7, 5e-5, 1e-22)
        scale, factor = torch.from_numpy(reference.scale), torch.from_numpy(reference.factor)
        allowed = 16 * eps * scale * factor + rtol * expected.abs() + atol
        if dtype in LOW_PRECISION:
            allowed += ulp(expected.abs() + allowed, dtype)
        assert bool(((actual - expected).abs() <= allowed).all()), (actual - expected, allowed)
        assert bool((actual[factor == 0] == 0).all()), "a factor of 0 gives exact 0"
        assert int(optimizer.state[parameter]["step"]) == reference.steps
        for name in ("exp_avg", "exp_avg_sq"):
            exact = torch.from_numpy(getattr(reference, name))
            found = optimizer.state[parameter][name]
            assert found.dtype == dtype
            span = 4 * torch.finfo(dtype).eps * (exact.abs() + grad.double().cpu().abs()) + torch.finfo(dtype).tiny
            assert bool(((found.double().cpu() - exact).abs() <= span).all()), name


@needs_kernel
class TestArithmetic:
    @pytest.mark.parametrize(
        ("dtype", "p_norm"),
        [*((F32, p_norm) for p_norm in P_NORMS), *((d, p) for d in (F64, BF16, F16) for p in (0.5, 2.0, 3.0))],
        ids=str,
    )
    def test_equals_the_reference(self, p_norm: float, dtype: torch.dtype) -> None:
        weights = normal(60, 3)
        weights[::9] = 0
        weights[1::9] *= 1e-3
        weights[2::9] *= 1e-6
        weights[3] = -0.0
        for options in (
            {"weight_decay": 0.3, "keep_zeros": True, "beta1": 0.0},
            {"maximize": True, "beta1": 0.4, "beta2": 0.95, "eps": 1e-3, "lr": 0.3, "lambda_p": 2.0},
        ):
            check_against_reference(weights, Hyper(**{"lr": 0.01, "p_norm": p_norm, **options}), dtype)

    @pytest.mark.parametrize(
        ("pair", "p_norm"),
        [(pair, p) for pair in PAIRS for p in P_NORMS if pair[0] == pair[1] != F16 or p in (0.8, 3.0)],
        ids=str,
    )
    def test_equals_foreach(self, p_norm: float, pair: tuple[torch.dtype, torch.dtype]) -> None:
        assert_like_foreach([made(300, pair, hyper(p_norm=p_norm))])

    @pytest.mark.parametrize("pair", PAIRS, ids=str)
    @pytest.mark.parametrize(
        "options", [{"maximize": True, "weight_decay": 0.0}, {"keep_zeros": True, "lr": 1.0, "eps": 1e-3}], ids=str
    )
    def test_options_equal_foreach(self, options: dict[str, Any], pair: tuple[torch.dtype, torch.dtype]) -> None:
        assert_like_foreach([made(300, pair, hyper(**options))])

    @pytest.mark.parametrize("pair", SOME_PAIRS, ids=str)
    def test_equals_foreach_at_every_place(self, pair: tuple[torch.dtype, torch.dtype]) -> None:
        assert_like_foreach([made(size, pair, seed=size) for size in (*SIZES[:-1], 9000)])

    @pytest.mark.parametrize("p_norm", P_NORMS)
    def test_weights_at_the_ends_of_float32(self, p_norm: float) -> None:
        ends = torch.tensor([1e-45, -1e-45, 1e-42, -3e-40, 1.17e-38, 1.18e-38, 1e-30, 0.0, -0.0, 1e4, -1e15, 3e38])
        for alpha_lambda in (1e-2, 1e-10, 1e-30):
            settings = hyper(lr=1.0, lambda_p=alpha_lambda, p_norm=p_norm, weight_decay=0.0)
            each = made(len(ends), settings=settings)._replace(param=ends.clone())
            for name in ("grad", "exp_avg", "exp_avg_sq"):
                getattr(each, name).zero_()
            gpu_step.Batch([each]).step()
            w = ends.double()
            expected = w / (1 + alpha_lambda * w.abs() ** (p_norm - 2))
            expected[(w == 0) | (alpha_lambda * w.abs() ** (p_norm - 2) > 2.0**126)] = 0
            torch.testing.assert_close(each.param.double(), expected, rtol=1e-4, atol=3e-38)
            decayed = w.float() / (1 + alpha_lambda * w.abs() ** (p_norm - 2)).float() != w.float()
            assert bool((each.param[decayed & (expected.abs() < 1.17e-38)] == 0).all())
            assert not bool(each.param[each.param == 0].signbit().any())

    @pytest.mark.parametrize("p_norm", [1.9, 2.0, 2.5])
    @pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
    def test_zero_weights(self, p_norm: float, dtype: torch.dtype) -> None:
        each = made(5, (dtype, dtype), hyper(p_norm=p_norm, lambda_p=50.0))
        each.param.zero_()
        undecayed = cloned(each)._replace(hyper=hyper(p_norm=p_norm, lambda_p=0.0))
        gpu_step.Batch([each, undecayed]).step()
        assert bool((undecayed.param != 0).all())
        factor = 0.0 if p_norm < 2 else 1.0 if p_norm > 2 else 1 / 1.5
        eps = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(each.param.double(), undecayed.param.double() * factor, rtol=max(eps, 1e-6), atol=0)

    @pytest.mark.parametrize("p_norm", [0.8, 3.0])
    @pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
    def test_keep_zeros(self, p_norm: float, dtype: torch.dtype) -> None:
        for lambda_p, awake in ((0.05, True), (0.05, False), (0.05, torch.tensor(False)), (0.0, True)):
            each = made(70, (dtype, dtype), hyper(p_norm=p_norm, lambda_p=lambda_p, keep_zeros=True))
            zeros = each.param == 0
            gpu_step.Batch([each._replace(awake=awake)]).step()
            assert bool((each.param[zeros] == 0).all()) and not bool(each.param[zeros].signbit().any())
            assert bool((each.param[~zeros] != 0).any())

    @pytest.mark.parametrize("p_norm", [0.1, 2.0, 3.0])
    @pytest.mark.parametrize("lr", [0.0, 1e-30, 5e-324])
    def test_products_that_underflow_decay_nothing(self, p_norm: float, lr: float) -> None:
        settings = hyper(lr=lr, lambda_p=1.0 if lr < 1e-40 else 1e-30, p_norm=p_norm)
        for rate in (lr, torch.tensor(lr)):
            each = made(50, settings=dataclasses.replace(settings, lr=rate))
            before = each.param.clone()
            gpu_step.Batch([each]).step()
            torch.testing.assert_close(each.param, before, rtol=0, atol=1e-28)
            assert torch.equal(each.param[before != 0], before[before != 0])

    def test_a_tiny_decay_leaves_large_weights_alone(self) -> None:
        each = made(3000, settings=hyper(lr=1e-4, lambda_p=1e-6, p_norm=1.0, weight_decay=0.0))
        each.param.add_(1.0)
        each.grad.zero_()
        each.exp_avg.zero_()
        before = each.param.clone()
        for _ in range(3):
            gpu_step.Batch([each]).step()
        assert torch.equal(each.param, before)

    @pytest.mark.parametrize("eps", [0.0, 1e-8])
    @pytest.mark.parametrize("pair", SOME_PAIRS, ids=str)
    def test_finite_gradients_give_finite_weights(self, eps: float, pair: tuple[torch.dtype, torch.dtype]) -> None:
        extremes = torch.tensor([1e-45, 1e-38, 1e-30, 1e-19, 1e-8, 1e-4, 1.0, 100.0, 6e4])
        values = torch.cat([extremes, -extremes, torch.zeros(1)])
        w, g = (part.reshape(-1).to(pair[0]) for part in torch.meshgrid(values, values, indexing="ij"))
        each = made(w.numel(), pair, hyper(p_norm=0.1, eps=eps), steps=0)._replace(param=w.clone(), grad=g)
        each.exp_avg.zero_()
        each.exp_avg_sq.zero_()
        for _ in range(2):
            gpu_step.Batch([each]).step()
            nothing = (g == 0) & (eps == 0)
            assert bool(each.param[~nothing].isfinite().all())

    @pytest.mark.parametrize("pair", PAIRS, ids=str)
    def test_a_nonfinite_gradient_shows(self, pair: tuple[torch.dtype, torch.dtype]) -> None:
        each = made(40, pair)
        each.grad[3], each.grad[5], each.grad[7] = float("nan"), float("inf"), -float("inf")
        assert_like_foreach([each])
        assert each.param.isnan().nonzero().flatten().tolist() == [3, 5, 7]

    def test_second_moments_beyond_float16_saturate(self) -> None:
        each = made(40, (F16, F16))
        each.grad.mul_(1e4)
        each.exp_avg_sq.fill_(6e4)
        assert_like_foreach([each])
        assert float(each.exp_avg_sq.max()) == 65504

    @pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01), torch.tensor([0.01], dtype=F64)], ids=str)
    def test_lr_may_be_a_tensor(self, lr: float | torch.Tensor) -> None:
        assert_like_foreach([made(100, settings=hyper(lr=lr))])

    @pytest.mark.parametrize("steps", [0, 1, 10, 1000, 100_000, 16_000_000])
    def test_counts_and_corrections(self, steps: int) -> None:
        for beta1, beta2 in ((0.9, 0.999), (0.0, 0.95), (0.99, 0.9999)):
            each = made(30, settings=hyper(beta1=beta1, beta2=beta2), steps=steps)
            assert_like_foreach([each])
            assert int(each.step) == steps + 1

    @pytest.mark.parametrize("pair", [(F32, F32), (BF16, BF16), (F64, F64)], ids=str)
    def test_a_first_moment_without_memory_is_the_gradient(self, pair: tuple[torch.dtype, torch.dtype]) -> None:
        each = made(30, pair, hyper(beta1=0.0))
        each.exp_avg.mul_(1e20)
        gpu_step.Batch([each]).step()
        assert torch.equal(each.exp_avg, each.grad)

    def test_tensors_asleep(self) -> None:
        for awake in (False, torch.tensor(False), torch.tensor(True)):
            steps = [made(60, seed=seed)._replace(awake=awake) for seed in range(3)]
            plain = [cloned(each)._replace(awake=True, hyper=hyper(lambda_p=0.0)) for each in steps]
            assert_like_foreach(steps)
            gpu_step.Batch(plain).step()
            decayed = any(not torch.equal(a.param, b.param) for a, b in zip(steps, plain, strict=True))
            assert decayed == bool(awake)


# --- rounding


@needs_kernel
class TestRounding:
    @pytest.mark.parametrize("pair", [pair for pair in PAIRS if set(pair) & set(LOW_PRECISION)], ids=str)
    def test_random_bits_are_those_of_foreach(self, pair: tuple[torch.dtype, torch.dtype]) -> None:
        for place in (5, (5000 << 20) + 3):
            each = made(1500, pair, seed=place % 1000)._replace(place=place)
            other = cloned(each)._replace(place=place + 1)
            assert_like_foreach([each])
            gpu_step.Batch([other]).step()
            low = [name for name in WRITTEN[:3] if getattr(each, name).dtype in LOW_PRECISION]
            assert all(float((getattr(each, name) != getattr(other, name)).double().mean()) > 0.1 for name in low)

    def test_small_values_of_float16(self) -> None:
        each = made(5000, (F16, F16))
        each.param.mul_(1e-5)
        each.exp_avg.mul_(1e-6)
        each.exp_avg_sq.mul_(1e-7)
        each.grad.mul_(1e-4)
        assert_like_foreach([each._replace(hyper=hyper(lr=1e-6, lambda_p=1e-4))])

    @pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
    def test_large_values_saturate(self, dtype: torch.dtype) -> None:
        each = made(2000, (dtype, dtype), hyper(lr=1e3, weight_decay=-0.5, eps=1e-3))
        each.param.fill_(torch.finfo(dtype).max)
        each.param[::2].neg_()
        assert_like_foreach([each])
        assert bool(each.param.isfinite().all()) and float(each.param.max()) == torch.finfo(dtype).max

    @pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
    def test_without_decay_rounds_to_the_nearest(self, dtype: torch.dtype) -> None:
        for scale in (1.0, 1e-6):
            each = made(5000, (dtype, dtype), hyper(lambda_p=0.0, lr=0.01 * scale, eps=1e-3))
            each.param.mul_(scale)
            wide = cloned(each)
            wide = wide._replace(**{name: getattr(wide, name).float() for name in ("grad", *WRITTEN)})
            gpu_step.Batch([each]).step()
            foreach.step([wide])
            for name in ("param", "exp_avg", "exp_avg_sq"):
                nearest = getattr(wide, name).to(dtype)
                assert int((getattr(each, name) != nearest).sum()) <= 10, name

    def test_channels_last_counts_elements_as_they_lie(self) -> None:
        each = made(4 * 3 * 5 * 5, (BF16, BF16))
        flat = cloned(each)
        four = [getattr(each, name).view(4, 5, 5, 3).permute(0, 3, 1, 2) for name in (*WRITTEN[:3], "grad")]
        last = each._replace(**dict(zip((*WRITTEN[:3], "grad"), four, strict=True)))
        assert last.param.is_contiguous(memory_format=torch.channels_last)
        assert gpu_step.Batch.refusal(last) is None
        gpu_step.Batch([last]).step()
        gpu_step.Batch([flat]).step()
        assert torch.equal(each.param, flat.param)


# --- tables and launches
