"""Tensors to step by the Triton kernels, a comparison of their results, and a record of their launches."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hf_pdecay.optim import foreach
from hf_pdecay.optim.gpu import step as gpu_step
from hf_pdecay.optim.rounding import LOW_PRECISION
from hf_pdecay.optim.tensor_step import Hyperparameters, TensorStep


P_NORMS = [0.1, 0.5, 0.8, 1.0, 1.5, 1.9, 2.0, 2.5, 3.0, 4.0]
SIZES = [1, 7, 1023, 1024, 1025, 70000]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PAIRS = [*((a, b) for a in (F32, BF16, F16) for b in (F32, BF16, F16)), (F64, F64)]
SOME_PAIRS = [(F32, F32), (F32, BF16), (BF16, BF16), (F16, F16), (F64, F64)]
PLAIN = Hyperparameters(1e-2, 0.9, 0.999, 1e-8, 0.1, 0.8, 0.05, keep_zeros=False, maximize=False)
WRITTEN = ("param", "exp_avg", "exp_avg_sq", "step")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
if DEVICE == "cuda":  # these cases have their process to themselves
    torch.set_default_device(DEVICE)

if INTERPRETED:
    from triton.runtime import interpreter

    patched: set[str] = set()

    def call(self: Any, *args: Any, **options: Any) -> Any:
        """Call a function from a kernel; Triton patches the language anew at each call, a third of the time in all."""
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **options)

    interpreter.InterpretedFunction.__call__ = call

needs_kernel = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs TRITON_INTERPRET=1 or a GPU")
needs_compiler = pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="needs TRITON_INTERPRET=0 and no GPU")


def hyper(**changes: Any) -> Hyperparameters:
    return dataclasses.replace(PLAIN, **changes)


def normal(numel: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.randn(numel, generator=generator, device="cpu") * scale).to(DEVICE)


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
    gpu_step.Batch(steps).step(finite)
    for their in theirs:
        foreach.step_on_device(their, finite)
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
            decays = b.awake is not False and b.hyper.lambda_p and b.base is None  # a base may be -0
            if name == "param" and x.dtype not in LOW_PRECISION and decays:
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
