"""Moments in 8 bits in the Triton kernels: cases that test_gpu_kernels.py runs in processes of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_pdecay import AdamWLp
from hf_pdecay.optim import foreach
from hf_pdecay.optim.gpu import step as gpu_step
from hf_pdecay.optim.tensor_step import TensorStep
from tests.helpers.eight_bit import borders, state_of
from tests.helpers.gpu_steps import (
    BF16,
    DEVICE,
    F16,
    F32,
    Launches,
    hyper,
    made,
    needs_compiler,
    needs_kernel,
    normal,
)


pytest.importorskip("torchao")


def encoded(each: TensorStep) -> TensorStep:
    return each._replace(exp_avg=state_of(each.exp_avg, True), exp_avg_sq=state_of(each.exp_avg_sq, False))


def copied(each: TensorStep) -> TensorStep:
    moments: list[Any] = [each.exp_avg.dequantize(), each.exp_avg_sq.dequantize()]  # type: ignore[operator]
    signed = state_of(moments[0], True), state_of(moments[1], False)
    for state, old in zip(signed, (each.exp_avg, each.exp_avg_sq), strict=True):
        state.codes.copy_(old.codes)  # type: ignore[attr-defined]
        state.scale.copy_(old.scale)  # type: ignore[attr-defined]
    return each._replace(
        param=each.param.clone(),
        grad=each.grad.clone(),
        step=each.step.clone(),
        exp_avg=signed[0],
        exp_avg_sq=signed[1],
    )


def assert_like_foreach(steps: list[TensorStep], finite: bool | torch.Tensor = True) -> None:
    """One step by the kernel and by plain operations: the same codes, but where the last bit of float32 decides."""
    theirs = [copied(each) for each in steps]
    gpu_step.Batch(steps).step(finite)
    for their in theirs:
        foreach.step_on_device(their, finite)
    for a, b in zip(steps, theirs, strict=True):
        eps = torch.finfo(a.param.dtype).eps if a.param.dtype != F32 else 2e-5
        torch.testing.assert_close(a.param, b.param, rtol=2 * eps, atol=1e-7 if a.param.dtype == F32 else 2e-5)
        for name in ("exp_avg", "exp_avg_sq"):
            x: Any = getattr(a, name)
            y: Any = getattr(b, name)
            torch.testing.assert_close(x.scale, y.scale, rtol=2e-6, atol=0)
            apart = (x.codes.int() - y.codes.int()).abs()
            assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 4e-3, name


@needs_kernel
class TestEightBit:
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    @pytest.mark.parametrize("p_norm", [0.8, 1.0, 3.0])
    def test_equals_foreach(self, p_norm: float, dtype: torch.dtype) -> None:
        assert_like_foreach([encoded(made(4096 + 768, (dtype, F32), hyper(p_norm=p_norm)))])

    def test_tensors_of_any_number_of_scales_beside_others(self) -> None:
        plain = made(300, seed=9)
        before = plain.param.clone()
        steps = [encoded(made(256 * count, seed=count)) for count in (1, 3, 4, 16, 17, 33)]
        theirs = [copied(each) for each in steps]
        gpu_step.Batch([*steps, plain]).step()
        for their in theirs:
            foreach.step_on_device(their)
        assert not torch.equal(plain.param, before)
        for a, b in zip(steps, theirs, strict=True):
            torch.testing.assert_close(a.param, b.param, rtol=4e-5, atol=1e-7)

    @pytest.mark.parametrize("options", [{"maximize": True}, {"keep_zeros": True, "lambda_p": 0.0}], ids=str)
    def test_options(self, options: dict[str, Any]) -> None:
        assert_like_foreach([encoded(made(1024, settings=hyper(**options)))])

    def test_a_skipped_step_writes_nothing(self) -> None:
        each = encoded(made(1024))
        before = copied(each)
        gpu_step.Batch([each]).step(torch.tensor(False, device=DEVICE))
        assert torch.equal(each.param, before.param)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(each, name).codes, getattr(before, name).codes)
            assert torch.equal(getattr(each, name).scale, getattr(before, name).scale)

    def test_values_get_torchaos_codes(self) -> None:
        """A step without memory: the first moment is the gradient and the second its square."""
        gradient = torch.cat([borders(True), borders(False).sqrt(), normal(4096, 1).cpu()]).to(DEVICE)
        param = torch.nn.Parameter(torch.ones_like(gradient))
        optimizer = AdamWLp([param], betas=(0.0, 0.0), moments="8bit", backend="triton", lr=1e-3)
        param.grad = gradient
        optimizer.step()
        state = optimizer.state[param]
        for found, expected in (
            (state["exp_avg"], state_of(gradient, True)),
            (state["exp_avg_sq"], state_of(gradient * gradient, False)),
        ):
            torch.testing.assert_close(found.scale, expected.scale, rtol=0, atol=0)
            apart = (found.codes.int() - expected.codes.int()).abs()
            # A GPU's quotient may be off in its last bit, which decides at the borders.
            assert int(apart.max()) <= 1
            assert DEVICE != "cpu" or int(apart.max()) == 0

    def test_steps_of_an_optimizer_are_done_again(self) -> None:
        param = torch.nn.Parameter(normal(1 << 14, 9))
        optimizer = AdamWLp([param], moments="8bit", backend="triton", lr=1e-3)
        for seed in range(3):
            param.grad = normal(1 << 14, seed)
            optimizer.step()
        assert optimizer._cache.last is not None
        assert type(optimizer.state[param]["exp_avg"]).__name__ == "OptimState8bit"


@needs_compiler
class TestCompiledEightBit:
    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_compiles_for_cuda(self, dtype: torch.dtype, launches: tuple[Launches, Launches]) -> None:
        from triton.backends.compiler import GPUTarget

        from tests.optim.gpu_cases.launch import compiled

        gpu_step.Batch([encoded(made(1024, (dtype, F32)))]).step()
        for _, *launch in launches[1].calls:
            assembly = compiled(gpu_step.update.kernel, *launch, GPUTarget("cuda", 80, 32))
            # Of whole blocks a thread loads its eight codes by 8 bytes, and of each moment.
            assert assembly["ptx"].count("ld.global.v2.b32") >= 2
