"""Units in the Triton kernels: cases that test_gpu_kernels.py runs in processes of their own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from hf_pdecay import AdamWLp
from hf_pdecay.optim.decay import shrink_factor
from hf_pdecay.optim.gpu import step as gpu_step
from hf_pdecay.optim.gpu import units as gpu_units
from hf_pdecay.optim.tensor_step import Structure, fuses
from hf_pdecay.optim.units import Member, Units
from tests.helpers.gpu_steps import (
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    INTERPRETED,
    Launches,
    made,
    needs_compiler,
    needs_kernel,
    normal,
)
from tests.optim import test_unit_decay


on_a_cpu = pytest.mark.skipif(not INTERPRETED, reason="makes its tensors on a CPU")

# Rows of 3 of a matrix of long rows, columns of one of many, the middle of a convolution, and a bias.
SHAPES = [(12, 1100), (70, 133), (5, 6, 3, 3), (40, 2, 8, 8), (7,)]
UNITS = [
    Units("row", 4, (Member(0, 0, 3), Member(4, 0, 1, 2))),
    Units("row", 60, (Member(1, 1, 2, 5),)),
    Units("row", 3, (Member(2, 1, 2), Member(3, 0, 4, 20))),
    Units("row", 2, (Member(3, 0, 1, 3), Member(4, 0))),
]


def weights(dtype: torch.dtype) -> list[torch.Tensor]:
    return [(normal(torch.Size(shape).numel(), k) * 0.3).view(shape).to(dtype) for k, shape in enumerate(SHAPES)]


def expected_norms(params: list[torch.Tensor]) -> torch.Tensor:
    """In float64, group by group."""
    found = []
    for each in UNITS:
        for group in range(each.count):
            parts = []
            for place in each.members:
                first = place.offset + group * place.size
                parts.append(params[place.param].double().narrow(place.dim, first, place.size).flatten())
            found.append(torch.cat(parts).square().mean().sqrt())
    return torch.stack(found)


@needs_kernel
class TestUnits:
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    def test_norms_and_factors(self, dtype: torch.dtype) -> None:
        params = weights(dtype)
        params[1][:, 5:7] = 0
        made_of = gpu_units.UnitFactors(params, UNITS)
        norms = made_of.norms()
        torch.testing.assert_close(norms.double(), expected_norms(params), rtol=1e-5, atol=0)
        assert float(norms[4]) == 0
        for p_norm, alpha_lambda in ((0.8, 0.05), (1.5, 0.3), (2.0, 0.1), (3.0, 2.0)):
            for strength in (alpha_lambda, torch.tensor(alpha_lambda, device=DEVICE)):
                made_of.fill(p_norm, strength)
                right = shrink_factor(norms.double(), p_norm, alpha_lambda)
                if p_norm < 2:
                    right[norms == 0] = 0
                torch.testing.assert_close(made_of.factors().double(), right, rtol=1e-5, atol=1e-30)
        table = made_of.tables[1]
        torch.testing.assert_close(table[5:125], made_of.factors()[4:64].repeat_interleave(2), rtol=0, atol=0)
        assert bool((table[:5] == 1).all()) and bool((table[125:] == 1).all())

    def test_no_decay_and_groups_that_sleep(self) -> None:
        params = weights(F32)
        params[1][:, 5:9] = 0
        made_of = gpu_units.UnitFactors(params, UNITS)
        made_of.norms()
        dormant = torch.zeros(69, dtype=torch.bool, device=DEVICE)
        dormant[4] = True
        made_of.fill(0.8, 0.0, dormant)
        right = torch.ones(69, device=DEVICE)
        right[5] = 0  # dead for good
        assert torch.equal(made_of.factors(), right)

    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    @pytest.mark.parametrize("group", ["neuron", "row", "column", "2:4"])
    @pytest.mark.parametrize("rate", ["number", "tensor"])
    def test_an_optimizer_does_as_with_plain_operations(self, rate: str, group: str, dtype: torch.dtype) -> None:
        found = []
        for backend in ("triton", "foreach"):
            shapes = SHAPES if group == "neuron" else [(24, 40), (3, 1032), (16, 8, 3, 3)]
            if group == "2:4":
                shapes = [(24, 40), (3, 1032)]
            params = [
                torch.nn.Parameter((normal(torch.Size(shape).numel(), k) * 0.3).view(shape).to(dtype))
                for k, shape in enumerate(shapes)
            ]
            lr = 0.02 if rate == "number" else torch.tensor(0.02, device=DEVICE)
            groups: list[dict[str, Any]] = [{"params": params, "group": group}]
            if group == "neuron":
                members = [
                    {"count": each.count, "members": [asdict(place) for place in each.members]} for each in UNITS
                ]
                groups[0]["units"] = members
            options: dict[str, Any] = {"eps": 1e-3, "moments": "float32"}
            optimizer = AdamWLp(groups, lr=lr, lambda_p=0.5, weight_decay=0.1, backend=backend, **options)
            for seed in range(3):
                for k, param in enumerate(params):
                    param.grad = normal(param.numel(), 10 * seed + k).view(param.shape).to(dtype)
                optimizer.step()
            if backend == "triton":
                assert optimizer._cache.last is not None
                shares = optimizer._cache.last.shares
                shrunk = [share.indices[index] for share in shares for index in share.backend.shrunk]
                assert sorted(shrunk) == list(range(len(params)))
            found.append([param.detach().float() for param in params])
        eps = 1e-5 if dtype == F32 else 8 * torch.finfo(dtype).eps
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=eps, atol=eps / 10)

    def test_a_skipped_step_writes_nothing_and_nan_is_seen(self) -> None:
        params = [torch.nn.Parameter(each) for each in weights(F32)[:2]]
        optimizer = AdamWLp([{"params": params, "group": "row"}], lr=0.1, lambda_p=1.0, backend="triton")
        for step in range(3):
            for param in params:
                param.grad = torch.ones_like(param)
            if step == 2:
                params[1].grad[3, 3] = float("nan")  # type: ignore[index]
            before = [param.detach().clone() for param in params]
            optimizer.step()
        assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
        assert optimizer.skipped_steps == 1

    def test_what_is_left_to_plain_operations(self) -> None:
        assert not gpu_units.UnitFactors.takes(normal(8, 0).double())
        assert not gpu_units.UnitFactors.takes(torch.zeros(4, 4, 2, device=DEVICE)[..., 0])
        three = Structure(made(8).hyper, 0, blocks=(3, 4))
        assert not fuses(made(8)._replace(structure=three))


@needs_kernel
@on_a_cpu
class TestByReference:
    """The cases of test_unit_decay.py, which compare with float64."""

    @pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
    def test_coupled_groups_shrink_as_one(self, dtype: torch.dtype) -> None:
        test_unit_decay.test_coupled_groups_shrink_as_one("triton", dtype)

    @pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
    @pytest.mark.parametrize("kind", ["2:4", "1:4"])
    def test_n_of_m_shrinks_the_weakest(self, kind: str, dtype: torch.dtype) -> None:
        test_unit_decay.test_n_of_m_shrinks_the_weakest(kind, (6, 16), "triton", dtype)

    def test_a_dead_group_stays_dead(self) -> None:
        test_unit_decay.test_a_dead_group_stays_dead_and_one_that_began_so_may_learn("triton")

    def test_ranks_whose_b_is_zero(self) -> None:
        test_unit_decay.test_ranks_whose_b_is_zero_decay_by_their_a("triton")

    @pytest.mark.parametrize("kind", ["row", "2:4"])
    def test_zeros_are_kept(self, kind: str) -> None:
        test_unit_decay.test_zeros_are_kept_where_that_was_asked_for(kind, "triton")

    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_a_checkpoint_goes_on_to_the_bit(self, dtype: torch.dtype) -> None:
        test_unit_decay.test_a_checkpoint_goes_on_to_the_bit("triton", dtype)


@needs_compiler
class TestCompiledUnits:
    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_compiles_for_cuda(
        self, dtype: torch.dtype, launches: tuple[Launches, Launches], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from triton.backends.compiler import GPUTarget

        from tests.optim.gpu_cases.launch import compiled

        kernels = {name: Launches(getattr(gpu_units, name), False) for name in ("square_sums", "norms", "factors")}
        for name, kernel in kernels.items():
            monkeypatch.setattr(gpu_units, name, kernel)
        made_of = gpu_units.UnitFactors(weights(dtype), UNITS)
        made_of.norms()
        made_of.fill(0.8, 0.1)
        made_of.fill(0.8, torch.tensor(0.1), torch.zeros(69, dtype=torch.bool))
        each = made(1024, (dtype, dtype))._replace(param=normal(1024, 0).view(8, 128).to(dtype))
        each = each._replace(**{name: getattr(each, name).view(8, 128) for name in ("grad", "exp_avg", "exp_avg_sq")})
        for structure in (Structure(each.hyper, 0, torch.ones(8)), Structure(each.hyper, 1, blocks=(2, 4))):
            gpu_step.Batch([each._replace(structure=structure)]).step()
        for kernel in (*kernels.values(), launches[1]):
            assert kernel.calls
            for _, *launch in kernel.calls:
                assembly = compiled(kernel.kernel, *launch, GPUTarget("cuda", 80, 32))
                assert "ptx" in assembly
