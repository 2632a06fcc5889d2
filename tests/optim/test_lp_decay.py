"""LpDecay: the rule around other optimizers, against AdamWLp and against float64 references of the formulas."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_pdecay import AdamWLp, LpDecay
from hf_pdecay.optim import decay_after_step as shrinking
from hf_pdecay.optim import gradients
from hf_pdecay.optim import lp_decay as wrapper
from hf_pdecay.optim.cpu import step as compiled
from hf_pdecay.optim.foreach import CPU_CHUNK
from tests.helpers.reference.adamw_lp64 import shrink_element
from tests.helpers.reference.sgd_lp64 import SgdReference
from tests.helpers.steps import normal


P_NORMS = [0.5, 0.8, 1, 1.2, 1.5, 2, 3]
SHAPES = [(700, 600), (33,), (), (5, 7, 3), (2, 3, 4, 5)]  # the first is larger than a chunk


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter((normal(*shape, seed=k) * 0.3).to(dtype)) for k, shape in enumerate(shapes)]


def clones(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def give_grads(params: list[nn.Parameter], seed: int) -> None:
    for k, param in enumerate(params):
        param.grad = normal(*param.shape, seed=100 * seed + k).to(param.dtype)


def sgd(params: Any, lr: float = 0.05, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9, **options)


@pytest.fixture(params=["compiled", "foreach"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the shrink is computed, which by itself depends on the number of weights."""
    name: str = request.param
    if name == "compiled" and (reason := compiled.unavailable()):
        pytest.skip(reason)
    monkeypatch.setattr(shrinking, "MIN_COMPILED", 0 if name == "compiled" else math.inf)
    return name


# --- the rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p_norm", P_NORMS)
def test_around_adamw_it_is_adamw_lp(p_norm: float, dtype: torch.dtype, backend: str) -> None:
    """Step by step from the same weights: 100 last bits of each, and 4 of the largest that AdamW adds up."""
    assert math.prod(SHAPES[0]) > CPU_CHUNK
    ours = parameters(*SHAPES, dtype=dtype)
    ours.append(nn.Parameter(torch.zeros(4, 4, dtype=dtype)))
    theirs = clones(ours)
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    decay: dict[str, Any] = {"p_norm": p_norm, "lambda_p": 0.5}
    wrapped = LpDecay(torch.optim.AdamW(ours, **options), **decay)
    fused = AdamWLp(theirs, **options, **decay, backend=backend)
    for seed in range(12):
        for params, optimizer in ((ours, wrapped), (theirs, fused)):
            give_grads(params, seed)
            optimizer.step()
        for one, other in zip(ours, theirs, strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(one, other, rtol=100 * eps, atol=4 * eps)
            assert torch.equal(one == 0, other == 0)
            one.data.copy_(other)
    if p_norm == 0.5:
        assert bool((ours[0] == 0).any()), "the zeros compared are some"


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("p_norm", P_NORMS)
def test_sgd_follows_the_formula(p_norm: float, nesterov: bool) -> None:
    params = parameters((3, 5), (7,), dtype=torch.float64)
    options: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
    optimizer = LpDecay(torch.optim.SGD(params, **options), p_norm=p_norm, lambda_p=0.3)
    references = [
        SgdReference(param.detach().numpy().copy(), p_norm=p_norm, lambda_p=0.3, **options) for param in params
    ]
    for seed in range(20):
        give_grads(params, seed)
        for param, reference in zip(params, references, strict=True):
            reference.step(param.grad.reshape(-1).tolist())  # type: ignore[union-attr]
        optimizer.step()
        for param, reference in zip(params, references, strict=True):
            np.testing.assert_allclose(param.detach().numpy().reshape(-1), reference.weight, rtol=1e-10, atol=1e-300)


@given(
    weight=st.floats(-100, 100, width=32),
    p_norm=st.floats(0.1, 4),
    lr=st.floats(0, 2, width=32),
    lambda_p=st.floats(0, 10),
)
@settings(max_examples=200, deadline=None)
def test_without_a_gradient_a_weight_is_multiplied_by_its_factor(
    weight: float, p_norm: float, lr: float, lambda_p: float
) -> None:
    param = nn.Parameter(torch.tensor([weight, 1.0], dtype=torch.float64))
    param.grad = torch.zeros_like(param)
    LpDecay(torch.optim.SGD([param], lr=lr), p_norm=p_norm, lambda_p=lambda_p).step()
    expected = weight * shrink_element(weight, p_norm, lr * lambda_p)
    assert param[0].item() == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("off", [{"lambda_p": 0.0}, {"lambda_p": 0.3, "lr": 0.0}, {"lambda_p": 1e-300}])
def test_without_decay_it_is_the_base_to_the_bit(off: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = parameters((40, 30), (9,))
    ours[0].data[::2] = 0
    theirs = clones(ours)
    rates = {"lr": off.pop("lr", 0.05)}
    wrapped, plain = LpDecay(sgd(ours, **rates), **off), sgd(theirs, **rates)
    copied: list[Any] = []
    monkeypatch.setattr(wrapper, "copies", lambda some: copied.extend(some) or [])
    for seed in range(3):
        for params, optimizer in ((ours, wrapped), (theirs, plain)):
            give_grads(params, seed)
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert not copied, "what does not decay costs no memory"


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_absorbs_and_a_wholly_zero_tensor_sleeps_until_it_is_not(dtype: torch.dtype) -> None:
    half, zero = nn.Parameter(torch.ones(8, dtype=dtype)), nn.Parameter(torch.zeros(8, dtype=dtype))
    half.data[:4] = 0
    optimizer = LpDecay(sgd([half, zero], lr=1.0), lambda_p=0.5)
    half.grad, zero.grad = torch.full_like(half, -0.1), torch.full_like(zero, -0.1)
    zero.grad[0] = 0
    optimizer.step()
    assert bool((half[:4] == 0).all()) and bool((half[4:] != 0).all())
    assert bool((zero[1:] == zero.grad[1:].neg()).all()), "undecayed while it sleeps"
    assert bool(optimizer.state[zero]["dormant"])
    zero.grad.fill_(-0.1)
    optimizer.step()
    assert zero[0] == 0 and not optimizer.state[zero]["dormant"], "awake, its zeros absorb like others"


@pytest.mark.usefixtures("backend")
def test_zeros_are_kept_without_decay() -> None:
    kept, free = (nn.Parameter(torch.tensor([0.0, 1.0, 0.0])) for _ in range(2))
    optimizer = LpDecay(sgd([{"params": [kept], "keep_zeros": True}, {"params": [free]}]), lambda_p=0.0)
    for seed in range(3):
        give_grads([kept, free], seed)
        optimizer.step()
    assert (kept == 0).tolist() == [True, False, True]
    assert not bool((free == 0).any())


@pytest.mark.usefixtures("backend")
def test_weights_below_normal_numbers_become_zero() -> None:
    tiny = torch.finfo(torch.float32).tiny
    param = nn.Parameter(torch.tensor([1.5 * tiny, -1.5 * tiny, 1.0]))
    param.grad = torch.zeros_like(param)
    LpDecay(torch.optim.SGD([param], lr=1.0), p_norm=2, lambda_p=1.0).step()
    assert param.tolist() == [0.0, 0.0, 0.5]
    assert not torch.signbit(param).any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_shrink_on_average(dtype: torch.dtype) -> None:
    """A factor of 0.9999 would round back to 1. Tolerance: five standard errors of the mean of 40000 weights."""
    weights = normal(2, 20000).to(dtype)
    params = [nn.Parameter(each.clone()) for each in weights]
    optimizer = LpDecay(torch.optim.SGD(params, lr=1e-4), p_norm=2, lambda_p=1.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    for _ in range(5):
        optimizer.step()
    ratio = torch.stack(params).double() / weights.double()
    expected, error = (1 / 1.0001) ** 5, float(ratio.std()) / math.sqrt(ratio.numel())
    assert error > 0 and abs(float(ratio.mean()) - expected) < 5 * error
    moved = [(param != each).double() for param, each in zip(params, weights, strict=True)]
    assert abs(float(torch.corrcoef(torch.stack(moved))[0, 1])) < 0.05, "tensors round independently"


class Replacing(torch.optim.SGD):
    """Gives each parameter another tensor, and lays it out anew."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for param in group["params"]:
                param.data = param.detach().t().contiguous().t()


@pytest.mark.usefixtures("backend")
def test_a_base_that_replaces_the_weights() -> None:
    params = parameters((30, 40), (600, 700))
    rivals = clones(params)
    optimizers = [
        LpDecay(kind(some, lr=0.05), lambda_p=0.5) for kind, some in ((Replacing, params), (torch.optim.SGD, rivals))
    ]
    for seed in range(3):
        for some, optimizer in zip((params, rivals), optimizers, strict=True):
            give_grads(some, seed)
            optimizer.step()
    torch.testing.assert_close(params, rivals, rtol=1e-4, atol=1e-7)


def test_how_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor is rounded by the same bits whichever way, so that no weight differs by more than its last bit."""
    if reason := compiled.unavailable():
        pytest.skip(reason)
    calls: list[int] = []
    shrink = compiled.decay_weights
    monkeypatch.setattr(compiled, "decay_weights", lambda some, *rest: calls.append(len(some)) or shrink(some, *rest))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        results = []
        for least in (0, math.inf):
            monkeypatch.setattr(shrinking, "MIN_COMPILED", least)
            param = nn.Parameter((normal(5000) * 0.3).to(dtype))
            optimizer = LpDecay(torch.optim.SGD([param], lr=0.1), lambda_p=0.5, keep_zeros=True)
            give_grads([param], 1)
            optimizer.step()
            results.append(param.detach().double())
        torch.testing.assert_close(*results, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert float((results[0] != results[1]).double().mean()) < 0.01 or dtype == torch.float32
    assert calls == [1, 1, 1]


@pytest.mark.usefixtures("backend")
def test_transposed_and_channels_last_weights() -> None:
    some = [normal(30, 40).t().clone(memory_format=torch.preserve_format), normal(4, 3, 5, 6)]
    some[1] = some[1].contiguous(memory_format=torch.channels_last)
    assert not some[0].is_contiguous()
    params = [nn.Parameter(each) for each in some]
    plain = [nn.Parameter(each.detach().contiguous()) for each in some]
    for each in (params, plain):
        give_grads(each, 1)
        LpDecay(sgd(each), p_norm=0.7, lambda_p=1.0).step()
    for one, other in zip(params, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


# --- gradients that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_skips_the_step_and_is_counted(bad: float) -> None:
    params = parameters((4, 3), (5,))
    optimizer = LpDecay(sgd(params), lambda_p=0.3)
    give_grads(params, 0)
    optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    give_grads(params, 1)
    params[1].grad[2] = bad  # type: ignore[index]
    optimizer.step()
    after = (params, optimizer.state_dict()["state"])
    assert all(torch.equal(one, other) for one, other in zip(before[0], after[0], strict=True))
    assert all(torch.equal(before[1][k]["momentum_buffer"], after[1][k]["momentum_buffer"]) for k in (0, 1))
    assert optimizer.skipped_steps == 1
    give_grads(params, 2)
    optimizer.step()
    assert optimizer.skipped_steps == 1 and not torch.equal(before[0][0], params[0])


def test_bad_gradients_pass_where_that_is_asked_for() -> None:
    params = parameters((3,))
    optimizer = LpDecay(sgd(params), skip_nonfinite=False)
    params[0].grad = torch.tensor([math.nan, 0.0, 0.0])
    optimizer.step()
    assert bool(params[0][0].isnan()) and optimizer.skipped_steps == 0


def test_a_base_that_looks_on_the_device_is_told_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where the host does not know whether gradients are finite."""
    monkeypatch.setattr(wrapper, "grads_finite", lambda some: torch.as_tensor(gradients.grads_finite(some)))
    params = parameters((4, 3), (5,))
    rivals = clones(params)
    optimizer = LpDecay(torch.optim.AdamW(params, lr=0.05, fused=True), lambda_p=0.3)
    rival = LpDecay(torch.optim.AdamW(rivals, lr=0.05, foreach=True), lambda_p=0.3)
    for seed in range(4):
        for each, some in ((optimizer, params), (rival, rivals)):
            give_grads(some, seed)
            if seed == 2:
                some[0].grad[0, 0] = math.inf  # type: ignore[index]
            each.step()
    assert optimizer.skipped_steps == rival.skipped_steps == 1
    assert int(optimizer.state[params[0]]["step"]) == 3
    for one, other in zip(params, rivals, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_what_an_accelerator_leaves_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether gradients are finite, whether a tensor is awake, and the rate: tensors that the host does not read."""
    results = []
    for on_device in (False, True):
        if on_device:
            awake, finite = wrapper.is_awake, gradients.grads_finite
            monkeypatch.setattr(wrapper, "grads_finite", lambda some: torch.as_tensor(finite(some)))  # noqa: B023
            monkeypatch.setattr(wrapper, "is_awake", lambda *some: torch.as_tensor(awake(*some)))  # noqa: B023
            for module in (wrapper, shrinking):
                monkeypatch.setattr(module, "on_device", lambda lr: isinstance(lr, torch.Tensor))
        params = parameters((40, 30), (9,), dtype=torch.float64)
        params += [nn.Parameter(torch.zeros(6, dtype=torch.float64)), nn.Parameter(normal(50))]
        params[0].data[::2] = 0
        rate = torch.tensor(0.05, dtype=torch.float64)
        base = torch.optim.Adam(
            [{"params": params[:2]}, {"params": params[2:], "keep_zeros": False}], lr=rate, fused=True
        )
        optimizer = LpDecay(base, p_norm=0.4, lambda_p=3.0)
        for seed in range(6):
            give_grads(params, seed)
            if seed == 3:
                params[1].grad[0] = math.nan  # type: ignore[index]
            if seed == 0:
                params[2].grad.zero_()  # type: ignore[union-attr]
            optimizer.step()
        assert optimizer.skipped_steps == 1 and bool((params[0] == 0).any()) and bool((params[2] != 0).any())
        results.append([param.detach().double() for param in params])
    for host, device in zip(*results, strict=True):
        torch.testing.assert_close(device, host, rtol=1e-5 if host.numel() == 50 else 1e-12, atol=1e-30)


def test_a_norm_that_is_known_spares_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters((4,))
    optimizer = LpDecay(sgd(params))
    give_grads(params, 0)
    optimizer.grad_norm = torch.tensor(1.0)
    monkeypatch.setattr(wrapper, "grads_finite", lambda some: pytest.fail("looked"))
    optimizer.step()
    assert optimizer.grad_norm is None


# --- as an optimizer


def test_groups_state_and_defaults_are_those_of_the_base() -> None:
    params = parameters((4,), (3,))
    base = sgd([{"params": params[:1], "p_norm": 0.5, "decayed": True, "rule": "a"}])
    optimizer = LpDecay(base, p_norm=0.7, lambda_p=0.02)
    assert optimizer.param_groups is base.param_groups and optimizer.state is base.state
    optimizer.add_param_group({"params": params[1:], "lr": 0.5})
    first, second = base.param_groups
    assert (first["p_norm"], first["lambda_p"], first["rule"]) == (0.5, 0.02, "a")
    assert (second["p_norm"], second["lambda_p"], second["lr"], second["momentum"]) == (0.7, 0.02, 0.5, 0.9)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is base.param_groups and optimizer.state is base.state
    for bad in ({"params": parameters((2,)), "lambda_p": -1}, {"params": [torch.zeros(2, dtype=torch.complex64)]}):
        with pytest.raises(ValueError, match=r"lambda_p=-1|complex64"):
            optimizer.add_param_group(bad)
    assert len(base.param_groups) == 2


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_schedulers_move_the_decay(lr: Any) -> None:
    param = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = LpDecay(torch.optim.SGD([param], lr=lr, maximize=True), p_norm=2, lambda_p=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    expected = 1.0
    for step in range(4):
        param.grad = torch.full_like(param, 2.0)
        optimizer.step()
        scheduler.step()
        rate = 0.1 / (1 + step)
        expected = (expected + rate * 2.0) / (1 + rate)
    assert param.item() == pytest.approx(expected, rel=1e-12)


def test_hooks_closure_and_zero_grad() -> None:
    params = parameters((4,))
    optimizer = LpDecay(sgd(params))
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, found: calls.append("saved") or {**found, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, found: calls.append("loaded"))

    def closure() -> torch.Tensor:
        calls.append("closure")
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == ["before", "closure", "after"]
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert calls[3:] == ["saved", "loaded"]
    optimizer.zero_grad()
    assert params[0].grad is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda some: pickle.loads(pickle.dumps(some))])
def test_copies_go_on_by_themselves(copied: Callable[[Any], Any]) -> None:
    params = parameters((4, 3), (5,))
    optimizer = LpDecay(sgd(params), p_norm=0.6, lambda_p=0.2)
    give_grads(params, 0)
    optimizer.step()
    other = copied(optimizer)
    others = other.param_groups[0]["params"]
    assert isinstance(other, LpDecay) and others[0] is not params[0]
    for seed in (1, 2):
        for some, each in ((params, optimizer), (others, other)):
            give_grads(some, seed)
            each.step()
    assert all(torch.equal(one, two) for one, two in zip(params, others, strict=True))


def test_grad_scaler_unscales_for_it() -> None:
    params = parameters((4, 3))
    rivals = clones(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, rival = (LpDecay(sgd(some), lambda_p=0.3) for some in (params, rivals))
    for seed in range(3):
        scaler.scale((params[0] * normal(4, 3, seed=seed)).sum()).backward()
        (rivals[0] * normal(4, 3, seed=seed)).sum().backward()
        scaler.step(optimizer)
        scaler.update()
        rival.step()
        optimizer.zero_grad()
        rival.zero_grad()
    torch.testing.assert_close(params, rivals, rtol=1e-6, atol=1e-8)
