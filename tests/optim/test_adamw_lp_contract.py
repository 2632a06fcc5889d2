"""AdamWLp as a torch optimizer: what any user of torch.optim expects of one."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import pytest
import torch

from hf_pdecay import AdamWLp


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameter(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Parameter:
    return torch.nn.Parameter(normal(*shape, seed=seed).to(dtype))


def run(optimizer: AdamWLp, steps: int = 3, first_seed: int = 100) -> None:
    for seed in range(first_seed, first_seed + steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = normal(*p.shape, seed=seed).to(p.dtype)
        optimizer.step()


def test_is_an_optimizer_with_every_hyperparameter_in_its_groups() -> None:
    optimizer = AdamWLp([parameter(3)])
    assert isinstance(optimizer, torch.optim.Optimizer)
    expected = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "p_norm": 0.8,
        "lambda_p": 0.01,
        "keep_zeros": False,
        "maximize": False,
        "skip_nonfinite": True,
    }
    saved = optimizer.state_dict()["param_groups"][0]
    for group in (optimizer.param_groups[0], saved):
        assert {key: group[key] for key in expected} == expected
    assert optimizer.skipped_steps == 0


def test_hyperparameters_of_its_own_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        AdamWLp([parameter(3)], 1e-3, (0.9, 0.999), 1e-8, 0.0, 0.8)  # type: ignore[call-arg]


# --- invalid hyperparameters

INVALID: list[tuple[str, Any]] = [
    ("p_norm", 0.0),
    ("p_norm", -0.5),
    ("p_norm", math.nan),
    ("p_norm", math.inf),
    ("p_norm", -math.inf),
    ("lambda_p", -1e-3),
    ("lambda_p", math.nan),
    ("lambda_p", math.inf),
    ("lr", -1e-3),
    ("lr", math.nan),
    ("lr", math.inf),
    ("eps", -1e-8),
    ("eps", math.nan),
    ("weight_decay", -0.1),
    ("weight_decay", math.nan),
    ("weight_decay", math.inf),
    ("betas", (1.0, 0.999)),
    ("betas", (0.9, 1.0)),
    ("betas", (-0.1, 0.999)),
    ("betas", (0.9, math.nan)),
    ("betas", (0.9,)),
]
RIGHT = re.compile(r"must|expected|at least|above|positive|between|within|>")


def refuses(error: pytest.ExceptionInfo[ValueError], name: str, value: Any) -> None:
    message = str(error.value)
    bad = [v for v in value if not 0 <= v < 1] if isinstance(value, tuple) and len(value) == 2 else [value]
    assert name in message and str(bad[0]) in message and RIGHT.search(message), message


@pytest.mark.parametrize(("name", "value"), INVALID, ids=str)
def test_invalid_hyperparameter_names_argument_value_and_what_is_right(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        AdamWLp([parameter(3)], **{name: value})
    refuses(error, name, value)
    with pytest.raises(ValueError) as error:
        AdamWLp([{"params": [parameter(3)], name: value}, {"params": [parameter(2)]}])
    refuses(error, name, value)
    optimizer = AdamWLp([parameter(3)])
    with pytest.raises(ValueError) as error:
        optimizer.add_param_group({"params": [parameter(2)], name: value})
    refuses(error, name, value)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["p_norm", "lambda_p", "lr", "eps", "weight_decay"])
@pytest.mark.parametrize("value", ["0.8", "much", None, [0.5]])
def test_hyperparameter_that_is_no_number(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        AdamWLp([parameter(3)], **{name: value})


@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf])
def test_invalid_tensor_lr(value: float) -> None:
    with pytest.raises(ValueError, match="lr"):
        AdamWLp([parameter(3)], lr=torch.tensor(value))


def test_tensor_lr_of_several_elements() -> None:
    with pytest.raises(ValueError, match="lr"):
        AdamWLp([parameter(3)], lr=torch.tensor([1e-3, 1e-3]))


@pytest.mark.parametrize("value", [0.1, 1, 1.0, 1.999, 2, 2.0, 4.0, 10])
def test_any_p_above_0_is_valid(value: float) -> None:
    p = parameter(5)
    run(AdamWLp([p], p_norm=value))
    assert bool(p.isfinite().all())


# --- what is refused


def test_sparse_gradient_is_refused_in_a_sentence_and_changes_nothing() -> None:
    for skip in (True, False):
        dense, table = parameter(3), torch.nn.Embedding(5, 2, sparse=True)
        optimizer = AdamWLp([dense, *table.parameters()], skip_nonfinite=skip)
        dense.grad = torch.ones(3)
        table(torch.tensor([1, 3])).sum().backward()
        before = dense.detach().clone()
        with pytest.raises((RuntimeError, ValueError), match=r"sparse gradient"):
            optimizer.step()
        assert torch.equal(dense, before)


def test_complex_parameter_is_refused_in_a_sentence() -> None:
    with pytest.raises((ValueError, TypeError), match=r"complex"):
        AdamWLp([torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    optimizer = AdamWLp([parameter(3)])
    with pytest.raises((ValueError, TypeError), match=r"complex"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))]})
    run(optimizer)


# --- shapes, groups, missing gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p_norm", [0.8, 2.0, 3.0])
def test_scalar_and_zero_size_parameters(dtype: torch.dtype, p_norm: float) -> None:
    parameters = [parameter(*shape, dtype=dtype) for shape in [(), (0,), (0, 3), (1,), (2, 0, 4)]]
    optimizer = AdamWLp(parameters, p_norm=p_norm, lr=0.01)
    before = parameters[0].detach().clone()
    run(optimizer)
    assert [p.shape for p in parameters] == [(), (0,), (0, 3), (1,), (2, 0, 4)]
    assert bool(parameters[0].isfinite())
    if dtype in (torch.float32, torch.float64):  # where no rounding can lead back
        assert not torch.equal(parameters[0], before)
    fresh = AdamWLp(parameters)
    fresh.load_state_dict(optimizer.state_dict())
    run(fresh)


def test_empty_group_beside_others() -> None:
    p, other = parameter(5), parameter(5)
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [p]}, {"params": [], "p_norm": 0.5}]
    optimizer = AdamWLp(groups)
    alone = AdamWLp([other])
    run(optimizer)
    run(alone)
    assert torch.equal(p, other)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer)


def test_parameter_without_gradient_is_left_alone() -> None:
    used, unused, frozen = parameter(5), parameter(5), parameter(5)
    frozen.requires_grad_(False)
    optimizer = AdamWLp([used, unused, frozen])
    before = used.detach().clone()
    used.grad = torch.ones(5)
    optimizer.step()
    assert torch.equal(unused, before) and torch.equal(frozen, before) and not torch.equal(used, before)
    assert not optimizer.state[unused] and not optimizer.state[frozen]


def test_step_without_any_gradient() -> None:
    p = parameter(5)
    before = p.detach().clone()
    assert AdamWLp([p]).step() is None
    assert torch.equal(p, before)


def test_gradients_are_not_changed() -> None:
    for options in ({}, {"maximize": True}, {"lambda_p": 0.0}):
        p = parameter(5)
        p.grad = normal(5, seed=1)
        AdamWLp([p], **options).step()
        assert torch.equal(p.grad, normal(5, seed=1))


def test_groups_of_their_own_hyperparameters() -> None:
    first, second, third, alone = (parameter(40) for _ in range(4))
    optimizer = AdamWLp([first], lr=0.01, p_norm=0.8, lambda_p=0.1)
    optimizer.add_param_group({"params": [second], "p_norm": 0.5, "lambda_p": 0.3})
    optimizer.add_param_group({"params": third, "lambda_p": 0.0, "lr": 0.1})
    assert [g["p_norm"] for g in optimizer.param_groups] == [0.8, 0.5, 0.8]
    assert [g["lambda_p"] for g in optimizer.param_groups] == [0.1, 0.3, 0.0]
    run(optimizer)
    run(AdamWLp([alone], lr=0.01, p_norm=0.5, lambda_p=0.3))
    assert torch.equal(second, alone)
    assert not torch.equal(first, second) and not torch.equal(third, second)


def test_hyperparameter_changed_in_a_group_takes_effect() -> None:
    p, other = parameter(40), parameter(40)
    optimizer = AdamWLp([p], p_norm=0.8, lambda_p=0.0)
    optimizer.param_groups[0].update(p_norm=0.5, lambda_p=0.2, lr=0.01)
    run(optimizer)
    run(AdamWLp([other], p_norm=0.5, lambda_p=0.2, lr=0.01))
    assert torch.equal(p, other)


def test_same_parameter_twice_is_refused() -> None:
    p = parameter(3)
    optimizer = AdamWLp([p])
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maximize_is_minimising_the_negative(dtype: torch.dtype) -> None:
    up, down = parameter(40, dtype=dtype), parameter(40, dtype=dtype)
    ascent, descent = AdamWLp([up], maximize=True), AdamWLp([down])
    for seed in range(5):
        up.grad, down.grad = normal(40, seed=seed).to(dtype), -normal(40, seed=seed).to(dtype)
        ascent.step()
        descent.step()
    assert torch.equal(up, down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lr", [torch.tensor(1e-2, dtype=torch.float64), torch.tensor([1e-2], dtype=torch.float64)])
def test_tensor_lr_equals_float_lr(dtype: torch.dtype, lr: torch.Tensor) -> None:
    p, other = parameter(40, dtype=dtype), parameter(40, dtype=dtype)
    with_tensor, with_float = AdamWLp([p], lr=lr, lambda_p=0.1), AdamWLp([other], lr=1e-2, lambda_p=0.1)
    run(with_tensor)
    run(with_float)
    assert torch.equal(p, other)
    lr.fill_(0.0)
    before = p.detach().clone()
    run(with_tensor)
    assert torch.equal(p, before)
    lr.fill_(1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_formats_do_not_change_the_result(dtype: torch.dtype) -> None:
    weight, grad = normal(64, 130, 3, 5).to(dtype), normal(64, 130, 3, 5, seed=1).to(dtype)
    plain, last = torch.nn.Parameter(weight), torch.nn.Parameter(weight.to(memory_format=torch.channels_last))
    for p in (plain, last):
        p.grad = grad
        optimizer = AdamWLp([p], lr=0.01, lambda_p=0.5)
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].stride() == p.stride()
    assert last.is_contiguous(memory_format=torch.channels_last)
    if dtype == torch.float32:
        torch.testing.assert_close(plain, last, rtol=1e-5, atol=1e-7)
    else:
        torch.testing.assert_close(plain, last, rtol=2**-6, atol=1e-4)


# --- closures, schedulers, scaler


def test_closure_runs_with_gradients_and_its_loss_comes_back() -> None:
    p, other = parameter(5), parameter(5)
    optimizer, by_hand = AdamWLp([p]), AdamWLp([other])
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    other.square().sum().backward()
    by_hand.step()
    loss = optimizer.step(closure)
    assert calls == [loss.item()]
    assert torch.equal(p, other)


def test_lambda_lr_with_a_warm_up_from_0() -> None:
    p = parameter(30)
    before = p.detach().clone()
    optimizer = AdamWLp([p], lr=0.01, lambda_p=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    for step in range(6):
        p.grad = normal(30, seed=step)
        optimizer.step()
        assert torch.equal(p, before) == (step == 0)
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * min(1.0, (step + 1) / 4))
    assert bool(p.isfinite().all())


def test_one_cycle_lr_moves_lr_and_beta1() -> None:
    p = parameter(30)
    optimizer = AdamWLp([p], lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    seen = set()
    for step in range(9):
        p.grad = normal(30, seed=step)
        optimizer.step()
        scheduler.step()
        seen.add(optimizer.param_groups[0]["betas"][0])
    assert len(seen) > 3
    assert bool(p.isfinite().all())


def test_grad_scaler_steps_and_skips() -> None:
    p, other = parameter(6), parameter(6)
    optimizer, unscaled = AdamWLp([p], lr=0.01), AdamWLp([other], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        for q, o in ((p, optimizer), (other, unscaled)):
            o.zero_grad()
            loss = (q * normal(6, seed=4)).sum()
            (scaler.scale(loss) if q is p else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        unscaled.step()
    torch.testing.assert_close(p, other, rtol=1e-6, atol=1e-8)
    before = p.detach().clone()
    optimizer.zero_grad()
    scaler.scale((p * math.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, before)
    assert scaler.get_scale() == 512.0


# --- copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_to_the_bit(dtype: torch.dtype, how: str) -> None:
    p = parameter(50, dtype=dtype)
    optimizer = AdamWLp([{"params": [p], "p_norm": 0.5}], lr=0.01, lambda_p=0.1)
    run(optimizer)
    copied = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert copied.param_groups[0]["p_norm"] == 0.5
    run(copied, first_seed=200)
    after = copied.param_groups[0]["params"][0]
    assert not torch.equal(after, p)
    run(optimizer, first_seed=200)
    assert torch.equal(after, p)


def test_repr_names_the_hyperparameters() -> None:
    text = repr(AdamWLp([parameter(3)], p_norm=0.7))
    assert "AdamWLp" in text and "p_norm: 0.7" in text
