"""The step in plain torch operations: its path without host scalars, for accelerators, and its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_pdecay import AdamWLp
from hf_pdecay.optim import foreach
from hf_pdecay.optim.dormancy import is_awake, wake_on_device
from hf_pdecay.optim.tensor_step import Hyperparameters, TensorStep
from tests.helpers.memory import PeakMemory


P_NORMS = [0.1, 0.5, 0.8, 1.0, 1.5, 1.9, 2.0, 2.5, 3.0, 4.0]
LOW = [torch.bfloat16, torch.float16]
DEFAULTS: dict[str, Any] = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "p_norm": 0.8,
    "lambda_p": 0.05,
    "keep_zeros": False,
    "maximize": False,
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Bundle:
    """The tensors of one call: some weights with zeros, a scalar, a tensor that is asleep."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        matrix = normal(9, 7)
        matrix[::2, 1] = 0
        self.params = [matrix.to(dtype), torch.tensor(0.3, dtype=dtype), torch.zeros(6, dtype=dtype)]
        self.exp_avgs = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.params]
        self.steps = [torch.tensor(0.0) for _ in self.params]
        self.dormants: list[torch.Tensor | None] = [None, None, torch.tensor(True)]

    def tensors(self) -> list[torch.Tensor]:
        dormants = [d for d in self.dormants if d is not None]
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.steps, *dormants]

    def grads(self, seed: int) -> list[torch.Tensor]:
        return [normal(*p.shape, seed=seed + 10 * i).to(p.dtype) for i, p in enumerate(self.params)]

    def step(
        self,
        seed: int,
        grads: list[torch.Tensor] | None = None,
        finite: bool | torch.Tensor = True,
        on_device: bool = False,
        **options: Any,
    ) -> None:
        """One step, on request as on a device that the host does not wait for."""
        hyper = Hyperparameters(**{**DEFAULTS, **options})
        look = wake_on_device if on_device else is_awake
        tensors = zip(self.params, grads or self.grads(seed), self.exp_avgs, self.exp_avg_sqs, self.steps, strict=True)
        for place, (param, grad, exp_avg, exp_avg_sq, count) in enumerate(tensors):
            dormant = self.dormants[place]
            awake = True if dormant is None else look(param, dormant)
            step = TensorStep(param, grad, exp_avg, exp_avg_sq, count, awake, hyper, place)
            if on_device:
                foreach.step_on_device(step, finite)
            else:
                foreach.step([step], finite)


class OpLog(TorchDispatchMode):
    """The names of all operations that run in it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


# --- without host scalars


@pytest.mark.parametrize("p_norm", P_NORMS)
@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.0}, {"keep_zeros": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_device_equals_host(p_norm: float, options: dict[str, Any], dtype: torch.dtype) -> None:
    host, device = Bundle(dtype), Bundle(dtype)
    for seed in range(6):
        host.step(seed, p_norm=p_norm, **options)
        device.step(seed, p_norm=p_norm, **options, on_device=True, finite=torch.tensor(True))
        for a, b in zip(host.tensors(), device.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
            assert torch.equal(a == 0, b == 0)


@pytest.mark.parametrize("p_norm", [0.8, 1.0, 3.0])
@pytest.mark.parametrize("dtype", LOW)
def test_on_device_equals_host_in_low_precision(p_norm: float, dtype: torch.dtype) -> None:
    host, device = Bundle(dtype), Bundle(dtype)
    host.step(0, p_norm=p_norm)
    device.step(0, p_norm=p_norm, on_device=True, finite=torch.tensor(True))
    for a, b in zip(host.tensors(), device.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps if a.dtype == dtype else 0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_on_device_without_lambda_p_equals_host(dtype: torch.dtype) -> None:
    host, device = Bundle(dtype), Bundle(dtype)
    for seed in range(6):
        host.step(seed, lambda_p=0.0, eps=1e-4)
        device.step(seed, lambda_p=0.0, eps=1e-4, on_device=True, finite=torch.tensor(True))
    for a, b in zip(host.tensors(), device.tensors(), strict=True):
        eps = torch.finfo(dtype).eps if a.is_floating_point() else 0.0
        torch.testing.assert_close(a, b, rtol=max(4 * eps, 1e-5), atol=max(1e-2 * eps, 1e-7))


@pytest.mark.parametrize("p_norm", [0.5, 0.8, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
def test_on_device_never_waits_for_the_device(p_norm: float, dtype: torch.dtype, lr: float | torch.Tensor) -> None:
    bundle = Bundle(dtype)
    grads = bundle.grads(0)
    finite = torch.tensor(True)
    for options in ({}, {"keep_zeros": True}, {"lambda_p": 0.0}, {"maximize": True}):
        with OpLog() as log:
            bundle.step(0, grads, p_norm=p_norm, lr=lr, on_device=True, finite=finite, **options)
        waits = ("_local_scalar_dense", "item", "is_nonzero", "equal.", "nonzero", "masked_select")
        found = [name for name in log.names if any(wait in name for wait in waits) and "not_equal" not in name]
        assert log.names and not found


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
@pytest.mark.parametrize("lambda_p", [0.0, 0.05])
def test_finite_false_writes_nothing(on_device: bool, dtype: torch.dtype, lambda_p: float) -> None:
    bundle = Bundle(dtype)
    bundle.step(0)
    before = [t.clone() for t in bundle.tensors()]
    for bad in (float("nan"), float("inf")):
        grads = [torch.full_like(p, bad) for p in bundle.params]
        bundle.step(0, grads, lambda_p=lambda_p, on_device=on_device, finite=torch.tensor(False))
        bundle.step(0, grads, lambda_p=lambda_p, finite=False)
    for tensor, old in zip(bundle.tensors(), before, strict=True):
        if tensor.dtype != torch.bool:  # that a tensor has woken may be noted at any time
            assert torch.equal(tensor, old)


@pytest.mark.parametrize("on_device", [True, False])
def test_finite_false_wakes_no_tensor(on_device: bool) -> None:
    bundle = Bundle()
    bundle.step(0, on_device=on_device, finite=torch.tensor(False))
    assert bundle.dormants[2] is not None and bool(bundle.dormants[2])
    assert [int(step) for step in bundle.steps] == [0, 0, 0]
    bundle.step(0, on_device=on_device, finite=torch.tensor(True))
    assert bool((bundle.params[2] != 0).all())


@pytest.mark.parametrize("p_norm", P_NORMS)
def test_on_device_with_lr_0_and_products_that_underflow(p_norm: float) -> None:
    for lr, lambda_p in ((0.0, 10.0), (1e-30, 1e-30), (5e-324, 1.0), (1e-45, 1.0)):
        bundle = Bundle()
        before = [p.clone() for p in bundle.params]
        options: dict[str, Any] = {"lr": lr, "lambda_p": lambda_p, "p_norm": p_norm, "weight_decay": 0.1}
        bundle.step(0, on_device=True, finite=torch.tensor(True), **options)
        for p, old in zip(bundle.params, before, strict=True):
            assert bool(p.isfinite().all())
            if lr == 0:
                assert torch.equal(p, old)


def test_on_device_wakes_a_sleeping_tensor() -> None:
    bundle = Bundle()
    for seed in range(3):
        bundle.step(seed, on_device=True, finite=torch.tensor(True))
        assert bool((bundle.params[2] != 0).all())
    assert bundle.dormants[2] is not None and not bool(bundle.dormants[2])


def test_on_device_continues_from_the_checkpoint_of_a_sleeping_tensor() -> None:
    p = torch.nn.Parameter(torch.zeros(6))
    p.grad = torch.zeros(6)
    optimizer = AdamWLp([p])
    optimizer.step()
    fresh = AdamWLp([p])
    fresh.load_state_dict(optimizer.state_dict())
    state = fresh.state[p]
    weight = p.detach()
    awake = wake_on_device(weight, state["dormant"])
    tensors = weight, torch.ones(6), state["exp_avg"], state["exp_avg_sq"], state["step"]
    foreach.step_on_device(TensorStep(*tensors, awake, Hyperparameters(**DEFAULTS), 0), torch.tensor(True))
    assert bool((weight < 0).all())


# --- memory

BIG = 12_000_000
LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": lambda: torch.full((BIG,), 0.5),
    "transposed": lambda: torch.full((4000, 3000), 0.5).t(),
    "channels_last": lambda: torch.full((1500, 500, 4, 4), 0.5).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"keep_zeros": True, "lambda_p": 0.0}], ids=str)
@pytest.mark.parametrize("backend", ["auto", "foreach"])
def test_step_needs_no_more_than_a_bounded_chunk(
    layout: str, dtype: torch.dtype, options: dict[str, Any], backend: str
) -> None:
    p = torch.nn.Parameter(LAYOUTS[layout]().to(dtype))
    p.grad = torch.full_like(p, 0.1)
    optimizer = AdamWLp([p], maximize=True, backend=backend, **options)
    optimizer.step()
    with PeakMemory() as memory:
        optimizer.step()
    assert memory.peak < 0.35 * BIG * 4, f"{memory.peak / (BIG * 4):.2f} of the float32 size of the tensor"
    assert memory.alive < 1000
    if backend == "foreach":
        assert memory.peak > 0


def test_peak_memory_sees_a_copy() -> None:
    p = torch.zeros(1000)
    with PeakMemory() as memory:
        _ = (p + 1).mul_(2).view(10, 100)[0] * 3
    assert memory.peak >= 4000
    assert memory.alive <= 400


def test_no_copy_of_the_parameters_is_kept() -> None:
    p = torch.nn.Parameter(normal(5000).to(torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = AdamWLp([p])
    optimizer.step()
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq", "dormant"}
    assert all(value.dtype in (torch.bfloat16, torch.float32, torch.bool) for value in optimizer.state[p].values())
    assert optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == torch.bfloat16
    rest = {key: value for key, value in vars(optimizer).items() if key not in ("state", "param_groups")}
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    assert all(leaf.numel() < 100 for leaf in tree_leaves((rest, group)) if isinstance(leaf, torch.Tensor))
