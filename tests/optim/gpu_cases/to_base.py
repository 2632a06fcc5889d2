"""Changes from a base in the Triton kernels: cases that test_gpu_kernels.py runs in processes of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_pdecay import AdamWLp
from hf_pdecay.optim import decay_after_step as around
from hf_pdecay.optim.bases import next_to
from hf_pdecay.optim.gpu import decay as gpu_decay
from hf_pdecay.optim.gpu import launch
from hf_pdecay.optim.gpu import step as gpu_step
from hf_pdecay.optim.gpu import units as gpu_units
from hf_pdecay.optim.tensor_step import Decay, Hyperparameters, Structure, TensorStep
from hf_pdecay.optim.units import Member, Units
from tests.helpers.gpu_steps import (
    BF16,
    F16,
    F32,
    F64,
    INTERPRETED,
    PAIRS,
    PLAIN,
    SOME_PAIRS,
    Launches,
    assert_like_foreach,
    cloned,
    hyper,
    made,
    needs_compiler,
    needs_kernel,
    normal,
)
from tests.optim.gpu_cases.launch import compiled, compiles_for_hip
from tests.optim.test_decay_to_base import by_formula, grads, run, start


on_a_cpu = pytest.mark.skipif(not INTERPRETED, reason="makes its tensors on a CPU")

DTYPES = [F32, BF16, F16, F64]
HOLDING = 1e-24


def based(
    numel: int,
    pair: tuple[torch.dtype, torch.dtype] = (F32, F32),
    settings: Hyperparameters = PLAIN,
    seed: int = 0,
) -> TensorStep:
    """A tensor in the midst of training: a third of the weights equal their base, a seventh of which are zeros."""
    each = made(numel, pair, settings, seed)
    base = each.param.clone()
    base[7::14] = -0.0
    change = normal(numel, seed + 4, 0.03).to(pair[0])
    change[::3] = 0
    change[1::9] *= 30 * torch.finfo(pair[0]).eps
    # An equal weight has the bits of its base.
    return each._replace(param=torch.where(change == 0, base, base + change), base=base)


def bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def died(each: TensorStep) -> Tensor:
    """Where a weight is bit-identical to its base."""
    assert each.base is not None
    return bits(each.param) == bits(each.base)


@needs_kernel
class TestToBase:
    @pytest.mark.parametrize("pair", PAIRS, ids=str)
    @pytest.mark.parametrize("p_norm", [0.8, 2.0, 3.0])
    def test_equals_foreach(self, p_norm: float, pair: tuple[torch.dtype, torch.dtype]) -> None:
        each = based(1500, pair, hyper(p_norm=p_norm, lr=1e-3, lambda_p=5.0))
        equal = died(each)
        assert_like_foreach([each])
        if p_norm < 2:
            assert bool(died(each)[equal].all()) and torch.equal(died(each), each.param == each.base)
            assert 10 < int((died(each) & ~equal).sum()) < 400

    @pytest.mark.parametrize("p_norm", [0.8, 3.0])
    @pytest.mark.parametrize("pair", SOME_PAIRS, ids=str)
    def test_zeros_are_kept_beside_changes(self, pair: tuple[torch.dtype, torch.dtype], p_norm: float) -> None:
        """Zeros of weights stay, also where the base is another; changes of 0 are held by the decay alone."""
        settings = hyper(p_norm=p_norm, lambda_p=0.5, keep_zeros=True, maximize=True)
        each = based(1100, pair, settings)
        each.param[::4] = 0
        zeros, equal = each.param == 0, died(each)
        assert_like_foreach([each])
        assert bool((each.param[zeros] == 0).all())
        assert torch.equal(died(each), each.param == each.base)
        assert bool(died(each)[equal & ~zeros].all()) == (p_norm < 2)

    @pytest.mark.parametrize("pair", SOME_PAIRS, ids=str)
    def test_changes_that_are_held_never_die(self, pair: tuple[torch.dtype, torch.dtype]) -> None:
        """Gradients lead back to the base, by less than the last bit and by as much as the change."""
        each = based(1100, pair, hyper(lambda_p=HOLDING, lr=1e-6, weight_decay=0.0))
        assert each.base is not None
        alive = each.param != each.base
        each.grad.copy_(each.grad.abs() * (each.param - each.base).sign())
        each.exp_avg.copy_(each.grad)
        for _ in range(3):
            assert_like_foreach([each])
            assert torch.equal(each.param != each.base, alive)
            assert bool(died(each)[~alive].all())

    def test_the_next_number(self) -> None:
        """A step of exactly the change, which does not decay, ends at the number beside the base."""
        base = torch.tensor([1.0, -1.0, 0.0, -0.0, 1.5, -1.5, -2.0, 0.25], dtype=F64).repeat(2)
        change = torch.where(torch.arange(16) < 8, 1.0, -1.0).to(F64)
        settings = hyper(lr=1.0, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0, lambda_p=HOLDING, p_norm=1.0)
        each = made(16, (F64, F64), settings)._replace(base=base, param=base + change, grad=change.clone())
        gpu_step.Batch([each]).step()
        assert torch.equal(each.param, torch.nextafter(base, change * torch.inf))

    def test_any_address_and_number(self) -> None:
        for pair in ((F32, F32), (BF16, F32), (F64, F64)):
            steps = [based(size, pair, seed=size) for size in (1, 1023, 1025, 4097)]
            each = based(3000, pair)
            assert each.base is not None
            whole = torch.full((3009,), 7.0, dtype=pair[0])
            whole[1:3001] = each.base
            steps.append(each._replace(base=whole[1:3001]))
            aligned = launch.rows_of_tensors(map(gpu_step._columns, steps))[0][9 :: launch.COLUMNS.value]
            assert aligned.tolist() == [1, 1, 1, 1, 0]
            assert_like_foreach(steps)

    def test_launches(self, launches: tuple[Launches, Launches]) -> None:
        """Beside weights that decay to zero; no base is read where nothing decays."""
        settings = hyper()
        steps = [based(50, settings=settings), made(50, settings=settings), based(50, settings=hyper(lambda_p=0.0))]
        steps.append(based(50, settings=settings)._replace(awake=False))
        assert_like_foreach([*steps, based(60, settings=settings)])
        to_base = [(options["DECAY"], options["TO_BASE"]) for *_, options in launches[1].calls]
        assert to_base == [("elements", True), ("elements", False), ("none", False), ("none", False)]
        phase = hyper(lambda_p=0.0, rounds=True)
        each = based(50, settings=phase)
        batch = gpu_step.Batch([each])
        for phase.lambda_p in (0.0, 1.0, 0.0):
            batch.step()
        assert [options["TO_BASE"] for *_, options in launches[1].calls[-3:]] == [False, True, False]

    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_without_decay_it_is_the_step_to_zero(self, dtype: torch.dtype) -> None:
        each = based(300, (dtype, dtype), hyper(lambda_p=0.0, rounds=True, keep_zeros=True))
        other = cloned(each)._replace(base=None)
        gpu_step.Batch([each]).step()
        gpu_step.Batch([other]).step()
        assert torch.equal(each.param, other.param)

    def test_tensors_asleep(self) -> None:
        for awake in (torch.tensor(False), torch.tensor(True)):
            each = based(300)._replace(awake=awake)
            each = each._replace(param=each.base.clone())  # type: ignore[union-attr]
            assert_like_foreach([each])
            assert bool(died(each).all()) == bool(awake)

    def test_finite_false_writes_nothing(self) -> None:
        each = based(300, (BF16, BF16))
        before = each.param.clone()
        gpu_step.Batch([each]).step(torch.tensor(False))
        assert torch.equal(each.param, before)

    def test_refusals(self) -> None:
        each = based(96)
        base = each.base
        assert base is not None
        assert gpu_step.Batch.refusal(each) is None
        for refused, why in (
            (each._replace(base=base.double()), "dtype"),
            (each._replace(base=base[:-1]), "shape"),
            (each._replace(base=torch.zeros(192)[::2]), "gaps"),
            (each._replace(base=base.to("meta")), f"must be on {each.param.device}"),
        ):
            assert why in (gpu_step.Batch.refusal(refused) or "")

    def test_moments_in_8_bits(self) -> None:
        pytest.importorskip("torchao")
        from tests.optim.gpu_cases import eight_bit

        for dtype in (F32, BF16):
            each = eight_bit.encoded(based(4096 + 256, (dtype, F32), hyper(lr=1e-3, lambda_p=5.0)))
            equal = died(each)
            eight_bit.assert_like_foreach([each])
            assert bool(died(each)[equal].all()) and bool((died(each) & ~equal).any())


@needs_kernel
class TestUnitsToBase:
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    @pytest.mark.parametrize("group", ["row", "column", "2:4"])
    def test_an_optimizer_does_as_with_plain_operations(self, group: str, dtype: torch.dtype) -> None:
        found = []
        shapes = [(24, 40), (3, 1032)] if group == "2:4" else [(24, 40), (3, 1032), (16, 8, 3, 3)]
        for backend in ("triton", "foreach"):
            params = [
                torch.nn.Parameter((normal(torch.Size(shape).numel(), k) * 0.3).view(shape).to(dtype))
                for k, shape in enumerate(shapes)
            ]
            bases = [param.detach().clone() for param in params]
            options: dict[str, Any] = {"decay_to": "base", "eps": 1e-3, "moments": "float32"}
            groups = [{"params": params, "group": group}]
            optimizer = AdamWLp(groups, lr=0.02, lambda_p=0.05, weight_decay=0.1, backend=backend, **options)
            for seed in range(4):
                for k, param in enumerate(params):
                    param.grad = normal(param.numel(), 10 * seed + k).view(param.shape).to(dtype)
                optimizer.step()
            if backend == "triton":
                assert optimizer._cache.last is not None
                shares = optimizer._cache.last.shares
                shrunk = [share.indices[index] for share in shares for index in share.backend.shrunk]
                assert sorted(shrunk) == list(range(len(params)))
            found.append([(param.detach() - base).float() for param, base in zip(params, bases, strict=True)])
        # A change is the difference of weights near 1, rounded three times, and in units by plain operations once more.
        atol = 1e-6 if dtype == F32 else 8 * torch.finfo(dtype).eps
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4 if dtype == F32 else 0.05, atol=atol)

    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    @pytest.mark.parametrize("dim", [0, 1])
    def test_norms_of_changes(self, dim: int, dtype: torch.dtype) -> None:
        for shape in ((12, 1100), (70, 133), (8, 6, 3, 3)):
            weight = normal(torch.Size(shape).numel(), 0).view(shape).to(dtype)
            base = (weight.float() + normal(weight.numel(), 1, 0.1).view(shape)).to(dtype)
            base.narrow(dim, 1, 1).copy_(weight.narrow(dim, 1, 1))
            units = [Units("row", shape[dim], (Member(0, dim),))]
            for moved in (base, torch.cat([base.new_zeros(1), base.flatten()])[1:].view(shape)):
                norms = gpu_units.UnitFactors([weight], units, {0: moved}).norms()
                change = (weight.double() - moved.double()).movedim(dim, 0).flatten(1)
                right = change.square().mean(1).sqrt()
                torch.testing.assert_close(norms.double(), right, rtol=1e-5, atol=0)
                assert float(norms[1]) == 0

    @pytest.mark.parametrize("lambda_p", [0.5, 0.0])
    def test_a_dead_unit_ends_at_its_base(self, lambda_p: float) -> None:
        """Also while nothing decays: a factor of 0 is one of the change."""
        settings = hyper(lambda_p=lambda_p, rounds=True)
        each = based(64, settings=settings)
        names = ("param", "grad", "exp_avg", "exp_avg_sq", "base")
        each = each._replace(**{name: getattr(each, name).view(8, 8) for name in names})
        factors = torch.ones(8)
        factors[3] = 0
        each = each._replace(structure=Structure(settings, 0, factors))
        plain = cloned(each)._replace(structure=None, base=None, hyper=hyper(lambda_p=0.0))
        gpu_step.Batch([each, plain]).step()
        assert bool(died(each)[3].all())
        others = torch.arange(8) != 3
        torch.testing.assert_close(each.param[others], plain.param[others], rtol=0, atol=1e-6)


@needs_kernel
class TestToBaseAround:
    @pytest.mark.parametrize("keep_zeros", [False, True])
    @pytest.mark.parametrize("p_norm", [0.5, 3.0])
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    def test_decays_as_plain_operations_do(self, dtype: torch.dtype, p_norm: float, keep_zeros: bool) -> None:
        for strength in (0.01, torch.tensor(0.01), torch.tensor(0.0), 1e-30, 0.0):
            for finite in (True, torch.tensor(False)):
                ours, theirs = [], []
                for size in (1, 1024, 3000):
                    each = based(size, (dtype, dtype), seed=size)
                    each.param[1::5] = 0
                    step = normal(size, 3, 0.01) * finite  # where not, there was no step
                    for some in (ours, theirs):
                        weight = (each.param.float() + step).to(dtype)
                        some.append(around.Stepped(weight, each.param, None, True, (2 << 20) + size, base=each.base))
                decay = Decay(p_norm, strength, keep_zeros, 7, finite)
                assert all(gpu_decay.takes(each) for each in ours)
                gpu_decay.decay_weights(ours, decay)
                for each in theirs:
                    around._decay_batch([each], decay)
                for a, b in zip(ours, theirs, strict=True):
                    if dtype == F32:
                        torch.testing.assert_close(a.weight, b.weight, rtol=2e-5, atol=1e-8)
                    else:
                        assert float((a.weight != b.weight).double().mean()) < 2e-3 + 1.5 / a.weight.numel()
                    if finite is True and strength:
                        same = a.weight == a.base
                        assert torch.equal(bits(a.weight)[same], bits(a.base)[same])

    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    def test_held_changes_end_at_the_next_number(self, dtype: torch.dtype) -> None:
        each = based(1024, (dtype, dtype))
        assert each.base is not None
        each.base[:4] = torch.tensor([1.0, -1.0, torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny])
        stepped = around.Stepped(each.base.clone(), each.param, None, True, 5, base=each.base)
        gpu_decay.decay_weights([stepped], Decay(0.8, 1e-30, False, 3, True))
        signs = each.param.float() - each.base.float()
        right = torch.where(signs == 0, each.base, next_to(each.base, signs))
        assert torch.equal(bits(stepped.weight), bits(right))

    def test_what_is_left_to_plain_operations(self) -> None:
        each = based(64)
        stepped = around.Stepped(each.param, each.param.clone(), None, True, 0, base=each.base)
        assert gpu_decay.takes(stepped)
        for base in (torch.zeros(128)[::2], torch.zeros(64, dtype=F16), torch.zeros(64, device="meta")):
            assert not gpu_decay.takes(stepped._replace(base=base))


@needs_kernel
@on_a_cpu
@pytest.mark.parametrize("p_norm", [0.8, 2.5])
def test_the_formula(p_norm: float) -> None:
    """Several steps against formulas in float64."""
    gradients = grads(8, (31, 37))
    param = torch.nn.Parameter(start(shape=(31, 37)))
    optimizer = AdamWLp([param], lr=1e-3, p_norm=p_norm, lambda_p=0.2, decay_to="base", backend="triton")
    run(optimizer, param, gradients)
    expected = by_formula(start(shape=(31, 37)), gradients, 1e-3, p_norm, 0.2)
    assert (param.detach().double() - expected).abs().quantile(0.99) < 4e-7
    assert bool((param == start(shape=(31, 37))).any()) == (p_norm < 2)


@needs_compiler
class TestCompiledToBase:
    @pytest.mark.parametrize("pair", [(F32, F32), (BF16, BF16), (F16, F16), (F64, F64)], ids=str)
    def test_compiles_for_cuda(
        self, pair: tuple[torch.dtype, torch.dtype], launches: tuple[Launches, Launches]
    ) -> None:
        from triton.backends.compiler import GPUTarget

        each = based(1024, pair)
        names = ("param", "grad", "exp_avg", "exp_avg_sq", "base")
        matrix = each._replace(**{name: getattr(each, name).view(8, 128) for name in names})
        structures = Structure(PLAIN, 0, torch.ones(8)), Structure(PLAIN, 1, blocks=(2, 4))
        gpu_step.Batch([each, *(matrix._replace(structure=structure) for structure in structures)]).step()
        assert [options["DECAY"] for *_, options in launches[1].calls] == ["elements", "units", "2:4"]
        for _, *arguments in launches[1].calls:
            ptx = compiled(gpu_step.update.kernel, *arguments, GPUTarget("cuda", 80, 32))["ptx"]
            # Of whole blocks a thread loads its eight elements by 16 bytes, also of the base.
            wide = ".v2.b64" if pair[0] == F64 else ".v4.b32"
            assert ptx.count(f"ld.global{wide}") >= 5 * {F64: 4, F32: 2}.get(pair[0], 1)
            # These take denormal numbers for 0, and nothing else may.
            flushing = {word for word in ptx.split() if ".ftz." in word and word.endswith(".f32")}
            assert pair[0] == F64 or flushing <= {"ex2.approx.ftz.f32", "sqrt.approx.ftz.f32"}, flushing

    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_norms_and_the_decay_around_another_optimizer_compile(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from triton.backends.compiler import GPUTarget

        sums, decay = Launches(gpu_units.square_sums, False), Launches(gpu_decay.decay_chunk, False)
        monkeypatch.setattr(gpu_units, "square_sums", sums)
        monkeypatch.setattr(gpu_units, "norms", Launches(None, False))
        monkeypatch.setattr(gpu_decay, "decay_chunk", decay)
        weight = normal(8 * 64, 0).view(8, 64).to(dtype)
        for dim in (0, 1):
            gpu_units.UnitFactors([weight], [Units("row", 8, (Member(0, dim),))], {0: weight.clone()}).norms()
        for strength in (0.1, torch.tensor(0.1)):
            stepped = around.Stepped(weight, weight.clone(), None, True, 0, base=weight.clone())
            gpu_decay.decay_weights([stepped], Decay(0.8, strength, True, 1, True))
        for kernel in (sums, decay):
            assert len(kernel.calls) == 2
            for _, *arguments in kernel.calls:
                assert arguments[1]["TO_BASE"]
                assert "ptx" in compiled(kernel.kernel, *arguments, GPUTarget("cuda", 80, 32))

    def test_compiles_for_hip(self, launches: tuple[Launches, Launches]) -> None:
        compiles_for_hip(based(64, (F32, BF16)), launches)
