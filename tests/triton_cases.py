"""The Triton kernel: cases that tests/test_triton.py runs in processes of their own.

In all classes but the last the kernel runs in Triton's interpreter, on tensors of a CPU, which TRITON_INTERPRET decides
when triton is imported. In the last it is compiled for GPUs that need not be there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from hf_pdecay import AdamWLp
from hf_pdecay.optim import foreach, triton_step
from hf_pdecay.optim.adamw_lp import adamw_lp
from hf_pdecay.optim.rounding import LOW_PRECISION
from hf_pdecay.optim.tensor_step import Hyperparameters, TensorStep
from tests.reference.adamw_lp64 import Hyper, Reference


P_NORMS = [0.1, 0.5, 0.8, 1.0, 1.5, 1.9, 2.0, 2.5, 3.0, 4.0]
SIZES = [1, 7, 1023, 1024, 1025, 70000]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PAIRS = [*((a, b) for a in (F32, BF16, F16) for b in (F32, BF16, F16)), (F64, F64)]
SOME_PAIRS = [(F32, F32), (F32, BF16), (BF16, BF16), (F16, F16), (F64, F64)]
PLAIN = Hyperparameters(1e-2, 0.9, 0.999, 1e-8, 0.1, 0.8, 0.05, keep_zeros=False, maximize=False)
WRITTEN = ("param", "exp_avg", "exp_avg_sq", "step")

needs_interpreter = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
needs_compiler = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs TRITON_INTERPRET=0")


def hyper(**changes: Any) -> Hyperparameters:
    return dataclasses.replace(PLAIN, **changes)


def normal(numel: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * scale


def made(
    numel: int,
    pair: tuple[torch.dtype, torch.dtype] = (F32, F32),
    settings: Hyperparameters = PLAIN,
    seed: int = 0,
    steps: int = 4,
) -> TensorStep:
    """A tensor in the midst of training, a seventh of whose weights are zeros."""
    weight = normal(numel, seed, 0.1)
    weight[::7] = 0
    return TensorStep(
        weight.to(pair[0]),
        normal(numel, seed + 1).to(pair[0]),
        normal(numel, seed + 2, 0.1).to(pair[1]),
        normal(numel, seed + 3).square().to(pair[1]),
        torch.tensor(float(steps)),
        True,
        settings,
        (3 << 20) + seed,
    )


def cloned(each: TensorStep) -> TensorStep:
    return each._replace(**{name: getattr(each, name).clone() for name in (*WRITTEN, "grad")})


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring values of ``dtype``, in float64."""
    info = torch.finfo(dtype)
    return values.abs().double().clamp(min=info.tiny).log2().floor().exp2() * info.eps


def assert_like_foreach(steps: Sequence[TensorStep], finite: bool | torch.Tensor = True, rare: float = 2e-3) -> None:
    """One step by the kernel and by foreach: equal but for float32's rounding, of which few roundings tell."""
    theirs = [cloned(each) for each in steps]
    triton_step.step(steps, finite)
    foreach.step(theirs, finite, capturable=True)
    for a, b in zip(steps, theirs, strict=True):
        assert torch.equal(a.step, b.step)
        for name in ("param", "exp_avg", "exp_avg_sq"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype
            assert torch.equal(x.isnan(), y.isnan()), name
            if x.dtype in LOW_PRECISION:
                different = (x != y) & ~x.isnan()
                assert int(different.sum()) <= 2 + rare * x.numel(), (name, int(different.sum()), x.numel())
                allowed = 1.01 * ulp(y, x.dtype) + 1e-7  # the latter where terms cancel
                assert bool(((x.double() - y.double()).abs() <= allowed)[different].all()), name
            else:
                rtol, atol = (2e-5, 1e-7) if x.dtype == F32 else (1e-12, 1e-14)
                torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)
            if name == "param" and x.dtype not in LOW_PRECISION and b.awake is not False and b.hyper.lambda_p:
                assert not bool(x[x == 0].signbit().any()), "zeros have one bit pattern"


class Launches:
    """Stands in for a kernel: notes the launches, and does them."""

    def __init__(self, kernel: Any, does: bool = True) -> None:
        self.kernel, self.does = kernel, does
        self.calls: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.calls.append((grid, args, options))
            if self.does:
                self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> tuple[Launches, Launches]:
    """The launches of the first and of the second kernel."""
    does = os.environ.get("TRITON_INTERPRET") == "1"
    prepare, update = Launches(triton_step._prepare, does), Launches(triton_step._update, does)
    monkeypatch.setattr(triton_step, "_prepare", prepare)
    monkeypatch.setattr(triton_step, "_update", update)
    return prepare, update


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
        before = parameter.detach().double().numpy()
        reference = Reference(before)
        if state:
            moments = state["exp_avg"].double().numpy(), state["exp_avg_sq"].double().numpy()
            reference = Reference(before, *moments, int(state["step"]), dormant=False)
        expected = torch.from_numpy(reference.step(grad.double().tolist(), settings))
        parameter.grad = grad
        optimizer.step()
        actual = parameter.detach().double()
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
            span = 4 * torch.finfo(dtype).eps * (exact.abs() + grad.double().abs()) + torch.finfo(dtype).tiny
            assert bool(((found.double() - exact).abs() <= span).all()), name


@needs_interpreter
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
            triton_step.step([each])
            w = ends.double()
            expected = w / (1 + alpha_lambda * w.abs() ** (p_norm - 2))
            expected[(w == 0) | (alpha_lambda * w.abs() ** (p_norm - 2) > 2.0**126)] = 0
            torch.testing.assert_close(each.param.double(), expected, rtol=1e-4, atol=3e-38)
            assert not bool(each.param[each.param == 0].signbit().any())

    @pytest.mark.parametrize("p_norm", [1.9, 2.0, 2.5])
    @pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
    def test_zero_weights(self, p_norm: float, dtype: torch.dtype) -> None:
        each = made(5, (dtype, dtype), hyper(p_norm=p_norm, lambda_p=50.0))
        each.param.zero_()
        undecayed = cloned(each)._replace(hyper=hyper(p_norm=p_norm, lambda_p=0.0))
        triton_step.step([each, undecayed])
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
            triton_step.step([each._replace(awake=awake)])
            assert bool((each.param[zeros] == 0).all()) and not bool(each.param[zeros].signbit().any())
            assert bool((each.param[~zeros] != 0).any())

    @pytest.mark.parametrize("p_norm", [0.1, 2.0, 3.0])
    @pytest.mark.parametrize("lr", [0.0, 1e-30, 5e-324])
    def test_products_that_underflow_decay_nothing(self, p_norm: float, lr: float) -> None:
        settings = hyper(lr=lr, lambda_p=1.0 if lr < 1e-40 else 1e-30, p_norm=p_norm)
        for rate in (lr, torch.tensor(lr)):
            each = made(50, settings=dataclasses.replace(settings, lr=rate))
            before = each.param.clone()
            triton_step.step([each])
            torch.testing.assert_close(each.param, before, rtol=0, atol=1e-28)
            assert torch.equal(each.param[before != 0], before[before != 0])

    def test_a_tiny_decay_leaves_large_weights_alone(self) -> None:
        each = made(3000, settings=hyper(lr=1e-4, lambda_p=1e-6, p_norm=1.0, weight_decay=0.0))
        each.param.add_(1.0)
        each.grad.zero_()
        each.exp_avg.zero_()
        before = each.param.clone()
        for _ in range(3):
            triton_step.step([each])
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
            triton_step.step([each])
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
        triton_step.step([each])
        assert torch.equal(each.exp_avg, each.grad)

    def test_tensors_asleep(self) -> None:
        for awake in (False, torch.tensor(False), torch.tensor(True)):
            steps = [made(60, seed=seed)._replace(awake=awake) for seed in range(3)]
            plain = [cloned(each)._replace(awake=True, hyper=hyper(lambda_p=0.0)) for each in steps]
            assert_like_foreach(steps)
            triton_step.step(plain)
            decayed = any(not torch.equal(a.param, b.param) for a, b in zip(steps, plain, strict=True))
            assert decayed == bool(awake)


# --- rounding


@needs_interpreter
class TestRounding:
    @pytest.mark.parametrize("pair", [pair for pair in PAIRS if set(pair) & set(LOW_PRECISION)], ids=str)
    def test_random_bits_are_those_of_foreach(self, pair: tuple[torch.dtype, torch.dtype]) -> None:
        for place in (5, (5000 << 20) + 3):
            each = made(1500, pair, seed=place % 1000)._replace(place=place)
            other = cloned(each)._replace(place=place + 1)
            assert_like_foreach([each])
            triton_step.step([other])
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
            triton_step.step([each])
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
        assert triton_step.refusal(last) is None
        triton_step.step([last])
        triton_step.step([flat])
        assert torch.equal(each.param, flat.param)


# --- tables and launches


@needs_interpreter
class TestLaunches:
    def test_many_tensors_take_one_launch(self, launches: tuple[Launches, Launches]) -> None:
        prepare, update = launches
        steps = [made(size, seed=size) for size in SIZES]
        assert_like_foreach(steps)
        assert [grid for grid, *_ in prepare.calls] == [(1,)]
        assert [grid for grid, *_ in update.calls] == [(sum(-(-size // triton_step._CHUNK) for size in SIZES),)]

    def test_more_tensors_than_a_program_prepares(self, launches: tuple[Launches, Launches]) -> None:
        prepare, update = launches
        assert_like_foreach([made(seed % 2, seed=seed, steps=seed) for seed in range(140)])
        assert [grid for grid, *_ in prepare.calls] == [(2,)] and len(update.calls) == 1

    def test_a_launch_for_each_kind(self, launches: tuple[Launches, Launches]) -> None:
        other = hyper(p_norm=3.0)
        steps = [
            made(10),
            made(10, (BF16, BF16)),
            made(10, (BF16, F32)),
            made(10, settings=other),
            made(10, settings=other)._replace(awake=False),
        ]
        assert_like_foreach([*steps, *(cloned(each) for each in steps)])
        assert [len(kernel.calls) for kernel in launches] == [5, 5]

    def test_tensors_without_weights(self, launches: tuple[Launches, Launches]) -> None:
        empty, some = made(0), made(5)
        assert_like_foreach([empty, some, cloned(empty), cloned(some), cloned(empty), made(0)])
        assert len(launches[1].calls) == 1
        assert_like_foreach([cloned(empty)])
        assert len(launches[1].calls) == 1
        triton_step.step([])

    def test_any_address(self) -> None:
        for pair in ((F32, F32), (BF16, BF16), (F32, BF16), (F64, F64)):
            for shift in (1, 3):
                parts: dict[str, torch.Tensor] = {}
                each = made(3000, pair)
                for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
                    whole = torch.full((3009,), 7.0, dtype=getattr(each, name).dtype)
                    parts[name] = whole
                    whole[shift : shift + 3000] = getattr(each, name)
                inside = {name: whole[shift : shift + 3000] for name, whole in parts.items()}
                if shift == 3:  # only one of them is not aligned
                    inside = {**{name: getattr(each, name) for name in inside}, "exp_avg": inside["exp_avg"]}
                steps = [each._replace(**inside), made(10, pair)]
                assert triton_step._words(steps)[0].tolist()[9::10] == [0, 1]
                assert_like_foreach(steps)
                for whole in parts.values():
                    assert bool((whole[:shift] == 7).all() and (whole[shift + 3000 :] == 7).all())

    @pytest.mark.parametrize("pair", SOME_PAIRS, ids=str)
    def test_finite_false_writes_nothing(self, pair: tuple[torch.dtype, torch.dtype]) -> None:
        steps = [made(size, pair, settings, size) for size in (3, 2000) for settings in (PLAIN, hyper(lambda_p=0.0))]
        before = [cloned(each) for each in steps]
        for finite in (torch.tensor(False), False):
            triton_step.step(steps, finite)
        for a, b in zip(steps, before, strict=True):
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in WRITTEN)
        assert_like_foreach([each for each in steps if each.hyper is PLAIN], torch.tensor(True))

    @pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
    @pytest.mark.parametrize("capturing", [False, True])
    def test_the_host_never_waits(
        self, lr: float | torch.Tensor, capturing: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("_prepare", "_update"):  # the interpreter itself reads what the kernel reads
            monkeypatch.setattr(triton_step, name, Launches(None, does=False))
        monkeypatch.setattr(triton_step, "_is_capturing", lambda device: capturing)
        names: set[str] = set()

        class OpLog(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                names.add(str(func))
                return func(*args, **(kwargs or {}))

        with OpLog():
            for settings in (hyper(lr=lr), hyper(lr=lr, keep_zeros=True), hyper(lr=lr, lambda_p=0.0)):
                steps = [made(50, pair, settings) for pair in PAIRS]
                names.clear()
                triton_step.step([each._replace(awake=torch.tensor(True)) for each in steps], torch.tensor(True))
                waits = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")
                assert names and not [name for name in names if any(wait in name for wait in waits)]

    def test_tables_are_kept_until_an_address_changes(self, launches: tuple[Launches, Launches]) -> None:
        _, update = launches
        steps = [made(10), made(20)]

        def table(settings: Hyperparameters = PLAIN) -> Any:
            triton_step.step([each._replace(hyper=settings) for each in steps])
            return update.calls[-1][1][0]

        first = table()
        assert table() is first
        assert table(hyper(lr=0.5, p_norm=3.0)) is first
        steps[1] = steps[1]._replace(grad=steps[1].grad.clone())
        second = table()
        assert second is not first and not torch.equal(second, first)
        assert table() is second
        steps[0] = steps[0]._replace(place=77)
        assert table() is not second
        assert triton_step._copied_table.cache_info().maxsize

    def test_a_gradient_that_moves_is_followed(self) -> None:
        each = made(100)
        for seed in range(4):
            each = each._replace(grad=normal(100, seed))
            assert_like_foreach([each])

    def test_tables_hold_no_tensor(self) -> None:
        import gc
        import weakref

        each = made(10)
        reference = weakref.ref(each.param)
        triton_step.step([each])
        del each
        gc.collect()
        assert reference() is None

    def test_a_table_filled_by_kernels_is_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        steps = [made(size, seed=size) for size in (1, 7, 5000)]
        words, _ = triton_step._words(steps)
        device = torch.device("cpu")
        assert torch.equal(triton_step._filled_table(words, device), triton_step._table(words, device))
        large = triton_step.array("q", [2**57 + 1, -3, 2**63 - 1, 0])
        assert triton_step._filled_table(large, device).tolist() == large.tolist()
        monkeypatch.setattr(triton_step, "_is_capturing", lambda device: True)
        kept = triton_step._copied_table.cache_info().currsize
        assert_like_foreach(steps)
        assert triton_step._copied_table.cache_info().currsize == kept

    def test_versions_are_bumped(self) -> None:
        each = made(10)
        version = each.param._version
        triton_step.step([each])
        assert each.param._version > version

    def test_refusals(self) -> None:
        each = made(4096)
        assert triton_step.refusal(each) is None
        assert all(triton_step.refusal(made(8, pair)) is None for pair in PAIRS)
        for refused, why in (
            (each._replace(exp_avg=each.exp_avg.double(), exp_avg_sq=each.exp_avg_sq.double()), "float64"),
            (each._replace(param=each.param.to("meta")), "meta"),
            (each._replace(grad=each.grad.half()), "dtype"),
            (each._replace(exp_avg_sq=each.exp_avg_sq.half()), "torch.float16"),
            (each._replace(grad=torch.zeros(2 * 4096)[::2]), "gaps"),
            (each._replace(step=each.step.double()), "float32"),
            (each._replace(step=torch.zeros(2)), "counter"),
            (each._replace(step=each.step.to("meta")), "must be on cpu"),
            (each._replace(awake=torch.tensor(True, device="meta")), "must be on cpu"),
            (each._replace(exp_avg=each.exp_avg[:-1]), "shape"),
            (each._replace(grad=torch._neg_view(each.grad)), "as they are in memory"),
        ):
            assert why in (triton_step.refusal(refused) or "")
        subclass_8bit = pytest.importorskip("torchao.optim.subclass_8bit")
        eight = subclass_8bit.OptimState8bit.zeros((4096,), signed=True, block_size=256)
        assert "8-bit" in (triton_step.refusal(each._replace(exp_avg=eight)) or "")

    @pytest.mark.parametrize("moments", [None, "bfloat16"])
    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_optimizer(self, moments: str | None, dtype: torch.dtype) -> None:
        models = []
        for backend in ("triton", "foreach"):
            parameters = [torch.nn.Parameter(normal(n, n).view(-1, 2).to(dtype)) for n in (6, 600, 3000)]
            parameters.append(torch.nn.Parameter(torch.zeros(50, dtype=dtype)))
            optimizer = AdamWLp(
                [{"params": parameters[:2], "p_norm": 1.0}, {"params": parameters[2:]}],
                lr=0.01,
                weight_decay=0.1,
                moments=moments,
                backend=backend,
            )
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
            for seed in range(3):
                for p in parameters:
                    p.grad = normal(p.numel(), seed).view_as(p).to(dtype)
                optimizer.step()
                schedule.step()
            models.append(parameters)
            assert optimizer.backends["cpu"][0] == backend
        for ours, theirs in zip(*models, strict=True):
            close = (ours - theirs).abs() <= 2e-5 if dtype == F32 else ours == theirs
            assert float(close.double().mean()) >= (1.0 if dtype == F32 else 0.99)

    def test_functional(self) -> None:
        each = made(30)
        lists = [each.param], [each.grad], [each.exp_avg], [each.exp_avg_sq], [each.step]
        options = {name: value for name, value in vars(PLAIN).items() if name != "skip_nonfinite"}
        expected = cloned(each)._replace(place=0)
        foreach.step([expected])
        adamw_lp(*lists, [None], **options, finite=torch.tensor(True), backend="triton")
        torch.testing.assert_close(each.param, expected.param, rtol=1e-5, atol=1e-7)


# --- compiled for GPUs, without one

NAMES = {F32: "fp32", F64: "fp64", BF16: "bf16", F16: "fp16"}


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], target: Any) -> dict[str, Any]:
    """The assembly of a kernel for the arguments of a launch."""
    from triton.compiler import ASTSource

    constants = {name: value for name, value in options.items() if name.isupper()}
    signature = dict.fromkeys(constants, "constexpr")
    for param, value in zip(kernel.params, args, strict=False):
        if isinstance(value, torch.Tensor):
            signature[param.name] = "*" + {**NAMES, torch.int64: "i64", torch.bool: "i1"}[value.dtype]
        elif value is None:
            signature[param.name], constants[param.name] = "constexpr", None
        else:
            signature[param.name] = {"int32": "i32", "int64": "i64"}.get(param.annotation, param.annotation)
    signature = {param.name: signature[param.name] for param in kernel.params}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    settings = {name: value for name, value in options.items() if not name.isupper()}
    return triton.compile(source, target=target, options=settings).asm  # type: ignore[no-any-return]


@needs_compiler
class TestCompiled:
    def test_works_on_gpus_only(self) -> None:
        assert "not on cpu" in (triton_step.refusal(made(5)) or "")
        with pytest.raises(ValueError, match="backend='triton' cannot do the step.*GPU, not on cpu"):
            p = torch.nn.Parameter(torch.ones(3))
            p.grad = torch.ones(3)
            AdamWLp([p], backend="triton").step()

    @pytest.mark.parametrize("pair", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F64, F64)], ids=str)
    def test_compiles_for_cuda(
        self, pair: tuple[torch.dtype, torch.dtype], launches: tuple[Launches, Launches]
    ) -> None:
        from triton.backends.compiler import GPUTarget

        triton_step.step([made(5, pair)])
        triton_step.step([made(5, pair, hyper(lambda_p=0.0))])
        for _, *launch in launches[1].calls:
            assembly = compiled(triton_step._update.kernel, *launch, GPUTarget("cuda", 80, 32))
            ptx = assembly["ptx"]
            # Of whole blocks a thread loads its eight elements by 16 bytes.
            wide = ".v2.b64" if pair[0] == F64 else ".v4.b32"
            loads = sum(2 * {F64: 4, F32: 2}.get(dtype, 1) for dtype in pair)
            assert ptx.count(f"ld.global{wide}") == loads
            assert ptx.count(f"st.global{wide}") >= 3
            # These take denormal numbers for 0, and nothing else may.
            flushing = {word for word in ptx.split() if ".ftz." in word and word.endswith(".f32")}
            assert pair[0] == F64 or flushing <= {"ex2.approx.ftz.f32", "sqrt.approx.ftz.f32"}, flushing

    @pytest.mark.parametrize("pair", [(F32, F32), (F16, F16), (F64, F64)], ids=str)
    def test_what_tensors_share_compiles_for_cuda(
        self, pair: tuple[torch.dtype, torch.dtype], launches: tuple[Launches, Launches]
    ) -> None:
        from triton.backends.compiler import GPUTarget

        if pair == (F32, F32):
            triton_step.step([made(5, pair)])
        else:
            triton_step.step([made(5, pair, hyper(lr=torch.tensor(0.1)))], torch.tensor(True))
        for _, *launch in launches[0].calls:
            assert "ptx" in compiled(triton_step._prepare.kernel, *launch, GPUTarget("cuda", 80, 32))

    @pytest.mark.parametrize("pair", [(F32, BF16)], ids=str)
    def test_compiles_for_hip(self, pair: tuple[torch.dtype, torch.dtype], launches: tuple[Launches, Launches]) -> None:
        from triton.backends.compiler import GPUTarget

        triton_step.step([made(5, pair)], torch.tensor(True))
        for kernel in launches:
            for _, *launch in kernel.calls:
                try:
                    assembly = compiled(kernel.kernel, *launch, GPUTarget("hip", "gfx942", 64))
                except Exception as error:
                    if "ld.lld" not in str(error):
                        raise
                    pytest.skip("older releases of triton bring no linker for AMD's GPUs")
                assert "amdgcn" in assembly

    def test_nothing_that_changes_is_a_constant(self) -> None:
        constants = {"PARAM", "MOMENT", "DECAY", "NEAREST", "CHUNK", "BLOCK", "ROWS"}
        for kernel in (triton_step._prepare, triton_step._update):
            for param in kernel.params:
                assert param.is_constexpr == (param.name in constants), param.name
                if not param.is_constexpr and param.name not in ("table", "shared"):
                    assert param.do_not_specialize, param.name
                if param.name not in (*constants, "table", "shared", "finite", "rate"):
                    assert param.annotation_type in ("i32", "i64"), param.name

    def test_nothing_is_compiled_again(self, launches: tuple[Launches, Launches]) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime import jit

        bind = getattr(jit, "create_function_from_signature", None)
        if bind is None:
            pytest.skip("this release of triton finds its compiled kernels another way")
        backend = make_backend(GPUTarget("cuda", 80, 32))
        for settings in (
            PLAIN,
            hyper(lr=0.0, weight_decay=0.0, eps=1.0),
            hyper(lr=5e-324, p_norm=1.0, lambda_p=16.0),
            hyper(lr=1.0, p_norm=16.0, beta1=0.0, beta2=0.5, maximize=True),
            hyper(keep_zeros=True, maximize=True),
        ):
            for count in (1, 2, 16):
                triton_step.step([made(count * 16, settings=settings, steps=count) for _ in range(count)])
        for kernel in launches:
            binder = bind(kernel.kernel.signature, kernel.kernel.params, backend)
            keys = {str(binder(*args, **options)[1:]) for _, args, options in kernel.calls}
            assert len(keys) == 1, keys
