"""Zeros: tensors that begin wholly zero (dormant), and keep_zeros."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from hf_pdecay import AdamWLp
from tests.helpers.reference.adamw_lp64 import Hyper, Reference


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOW = [torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, *grads: torch.Tensor) -> None:
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype)
        optimizer.step()


def close(parameter: torch.Tensor, reference: Reference) -> None:
    expected = torch.from_numpy(reference.weight).view(parameter.shape)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("p_norm", [0.3, 0.8, 1.0, 1.5, 2.0, 3.0])
def test_wholly_zero_tensor_learns_then_decays(p_norm: float) -> None:
    """LoRA's B: the first step is AdamW's, from the next one on it decays like any tensor."""
    hyper = Hyper(lr=0.05, p_norm=p_norm, lambda_p=0.2)
    parameter = torch.nn.Parameter(torch.zeros(8, 4))
    other = torch.nn.Parameter(torch.zeros(8, 4))
    optimizer = AdamWLp([parameter], lr=0.05, p_norm=p_norm, lambda_p=0.2)
    adamw = torch.optim.AdamW([other], lr=0.05, weight_decay=0.0, foreach=False)
    reference = Reference(torch.zeros(32).double().numpy())
    run(optimizer, parameter, normal(8, 4))
    run(adamw, other, normal(8, 4))
    assert torch.equal(parameter, other)
    assert bool((parameter != 0).all())
    reference.step(normal(8, 4).flatten().tolist(), hyper)
    for seed in range(1, 8):
        grad = normal(8, 4, seed=seed)
        run(optimizer, parameter, grad)
        reference.step(grad.flatten().tolist(), hyper)
        close(parameter, reference)
    run(adamw, other, *(normal(8, 4, seed=seed) for seed in range(1, 8)))
    assert bool(parameter.abs().sum() < other.abs().sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_wholly_zero_tensor_learns_in_every_dtype(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.zeros(64, dtype=dtype))
    optimizer = AdamWLp([parameter], lr=0.01, lambda_p=0.01)
    run(optimizer, parameter, torch.ones(64))
    expected = torch.full((64,), -0.01, dtype=torch.float64)
    gap = torch.finfo(dtype).eps * 2**-7
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=gap)


@pytest.mark.parametrize("dtype", LOW)
def test_wholly_zero_low_precision_tensor_rounds_stochastically(dtype: torch.dtype) -> None:
    """Also in the steps before it wakes, low-precision weights of a decayed group are computed in float32."""
    count = 40_000
    parameter = torch.nn.Parameter(torch.zeros(count, dtype=dtype))
    optimizer = AdamWLp([parameter], lr=0.011, lambda_p=0.01)
    run(optimizer, parameter, torch.full((count,), 0.3))
    gap = torch.finfo(dtype).eps * 2**-7
    assert abs(float(parameter.detach().double().mean()) + 0.011) < 0.02 * gap


def test_elements_that_got_no_gradient_stay_zero_once_the_tensor_woke() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = AdamWLp([parameter], lr=0.05, lambda_p=0.01)
    run(optimizer, parameter, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert (parameter != 0).tolist() == [True, True, False, False]
    run(optimizer, parameter, torch.ones(4), torch.ones(4))
    assert (parameter != 0).tolist() == [True, True, False, False]


def test_zero_tensor_sleeps_through_zero_gradients_and_warm_up() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = AdamWLp([parameter], lr=0.05, lambda_p=0.01)
    run(optimizer, parameter, torch.zeros(4), torch.zeros(4))
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, parameter, torch.ones(4))
    assert parameter.tolist() == [0.0] * 4
    optimizer.param_groups[0]["lr"] = 0.05
    run(optimizer, parameter, torch.ones(4))
    assert bool((parameter < 0).all())


def test_zero_tensor_learns_when_lambda_p_comes_later() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = AdamWLp([parameter], lr=0.05, lambda_p=0.0)
    run(optimizer, parameter, torch.zeros(4))
    optimizer.param_groups[0]["lambda_p"] = 0.01
    run(optimizer, parameter, torch.ones(4))
    assert bool((parameter < 0).all())


def test_negative_zeros_are_zeros() -> None:
    parameter = torch.nn.Parameter(-torch.zeros(4))
    optimizer = AdamWLp([parameter], lr=0.05, lambda_p=0.01)
    run(optimizer, parameter, torch.ones(4))
    assert bool((parameter < 0).all())


def test_tensor_that_dies_later_stays_dead() -> None:
    parameter = torch.nn.Parameter(torch.full((4,), 1e-4))
    optimizer = AdamWLp([parameter], lr=0.1, lambda_p=1.0)
    run(optimizer, parameter, *[torch.zeros(4)] * 12)
    assert parameter.tolist() == [0.0] * 4
    run(optimizer, parameter, *[torch.ones(4)] * 3)
    assert parameter.tolist() == [0.0] * 4


def test_tensor_that_woke_and_died_stays_dead() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = AdamWLp([parameter], lr=1e-3, lambda_p=0.0)
    run(optimizer, parameter, torch.ones(4), *[torch.zeros(4)] * 2)
    assert bool((parameter < 0).all())
    with torch.no_grad():
        parameter.zero_()
    optimizer.param_groups[0]["lambda_p"] = 0.1
    run(optimizer, parameter, torch.ones(4), torch.ones(4))
    assert parameter.tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_of_a_sleeping_tensor(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = AdamWLp([parameter], lr=0.05, lambda_p=0.01)
    run(optimizer, parameter, torch.zeros(4))
    assert optimizer.state[parameter]["dormant"].dtype == torch.bool
    resumed = torch.nn.Parameter(parameter.detach().clone())
    optimizer2 = AdamWLp([resumed], lr=0.05, lambda_p=0.01)
    optimizer2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer2.state[resumed]["dormant"].dtype == torch.bool
    assert optimizer2.state[resumed]["dormant"].shape == ()
    for grad in (torch.ones(4), torch.tensor([1.0, 0.0, -1.0, 0.0]), torch.ones(4)):
        run(optimizer, parameter, grad)
        run(optimizer2, resumed, grad)
        assert bool((resumed != 0).all())
        assert torch.equal(parameter, resumed)


def test_state_has_the_keys_of_adamw_and_dormant_whatever_the_weights() -> None:
    """torch.distributed.checkpoint loads what the state of an optimizer has that stepped the weights as they are."""
    parameters = [torch.nn.Parameter(torch.tensor(v)) for v in ([0.0, 0.0], [0.0, 1.0])]
    optimizer = AdamWLp(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    for parameter, dormant in zip(parameters, (True, False), strict=True):
        assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq", "dormant"}
        assert bool(optimizer.state[parameter]["dormant"]) == dormant
    step = optimizer.state[parameters[1]]["step"]
    assert step.dtype == torch.float32 and step.shape == ()


# --- keep_zeros


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p_norm", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(("lr", "lambda_p"), [(0.01, 0.01), (0.01, 0.0), (0.0, 0.01), (0.0, 0.0)])
def test_keep_zeros_holds_against_momentum(dtype: torch.dtype, p_norm: float, lr: float, lambda_p: float) -> None:
    parameter = torch.nn.Parameter(normal(33).to(dtype))
    optimizer = AdamWLp([parameter], lr=0.01, p_norm=p_norm, lambda_p=0.0, eps=1e-4)
    run(optimizer, parameter, *(normal(33, seed=s) for s in range(3)))  # momentum builds up
    with torch.no_grad():
        parameter[::3] = 0
        parameter[1] = -0.0
    dead = parameter.detach() == 0
    optimizer.param_groups[0].update(keep_zeros=True, lr=lr, lambda_p=lambda_p)
    for seed in range(5):
        run(optimizer, parameter, normal(33, seed=seed) + 1)
        assert bool((parameter[dead] == 0).all())
        assert bool((parameter[~dead] != 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keep_zeros_without_lambda_p_is_adamw_on_the_rest(dtype: torch.dtype) -> None:
    weight = normal(50).to(dtype)
    weight[::4] = 0
    parameter, other = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    optimizer = AdamWLp([parameter], lr=0.01, lambda_p=0.0, keep_zeros=True)
    adamw = torch.optim.AdamW([other], lr=0.01, weight_decay=0.0, foreach=False)
    for seed in range(6):
        run(optimizer, parameter, normal(50, seed=seed))
        run(adamw, other, normal(50, seed=seed))
    alive = weight != 0
    assert torch.equal(parameter[alive], other[alive])
    assert bool((parameter[~alive] == 0).all())


@pytest.mark.parametrize("lambda_p", [0.0, 0.01])
def test_keep_zeros_wins_over_a_sleeping_tensor(lambda_p: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(5))
    optimizer = AdamWLp([parameter], lr=0.01, lambda_p=lambda_p, keep_zeros=True)
    run(optimizer, parameter, *[torch.ones(5)] * 3)
    assert parameter.tolist() == [0.0] * 5


def test_keep_zeros_of_one_group_leaves_the_other_alone() -> None:
    kept, free = torch.nn.Parameter(torch.tensor([0.0, 1.0])), torch.nn.Parameter(torch.tensor([0.0, 1.0]))
    groups: list[dict[str, Any]] = [{"params": [kept], "keep_zeros": True}, {"params": [free]}]
    optimizer = AdamWLp(groups, lr=0.01, lambda_p=0.0)
    kept.grad, free.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert kept[0] == 0 and free[0] != 0


def test_keep_zeros_through_scaled_gradients_accumulation_skips_and_a_reload() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(32, 16)
    with torch.no_grad():
        linear.weight.masked_fill_(torch.rand(16, 32, generator=generator) < 0.7, 0)
    gone = linear.weight == 0
    optimizer = AdamWLp(linear.parameters(), lr=0.05, weight_decay=0.1, lambda_p=0.0, keep_zeros=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    started = linear.weight.detach().clone()
    for step in range(12):
        for part in range(2):
            inputs = torch.randn(8, 32, generator=generator)
            inputs[0, 0] = math.inf if step in (3, 7) and part else 1.0
            scaler.scale(linear(inputs).square().mean()).backward()
        before = linear.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(linear.weight, before) == (step in (3, 7))
        assert torch.equal(linear.weight == 0, gone)
        if step == 5:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = AdamWLp(linear.parameters(), lr=0.05)
            optimizer.load_state_dict(state)
    assert (linear.weight - started)[~gone].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["compiled", "foreach", "reference"])
@pytest.mark.parametrize("p_norm", [1.0, 1.5, 2.0])
def test_decay_leaves_no_subnormal_numbers(p_norm: float, backend: str, dtype: torch.dtype) -> None:
    """A CPU is slow to multiply them, and they are no zeros yet."""
    tiny = torch.finfo(dtype).tiny
    sizes = torch.tensor([1.0, 4.0, 1.01, 0.5, 1e-2], dtype=torch.float64) * tiny
    parameter = torch.nn.Parameter(torch.cat([sizes, -sizes, torch.ones(1)]).to(dtype))
    optimizer = AdamWLp([parameter], lr=1.0, weight_decay=0.5, p_norm=p_norm, lambda_p=1e-3, backend=backend)
    run(optimizer, parameter, torch.zeros(11))
    magnitude = parameter.detach().abs()
    assert bool(((magnitude == 0) | (magnitude >= tiny)).all())
    assert not bool(torch.signbit(parameter[magnitude == 0]).any())
    assert magnitude[-1] > 0.4
    assert bool((magnitude[[0, 5]] == 0).all())
    if p_norm == 2:  # 4 tiny become almost 2 tiny
        assert bool((magnitude[[1, 6]] > tiny).all())
