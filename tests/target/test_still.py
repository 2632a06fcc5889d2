from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_pdecay import AdamWLp, LpDecay
from hf_pdecay.rules.assign import build_param_groups
from hf_pdecay.target.control import SparsityControl


STEPS = 80
Change = Callable[[int, Any], None]


def _params(count: int = 3) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(24, 24)) for _ in range(count)]


def _run(
    optimizer: Any, grads: Callable[[int], dict[Tensor, Tensor]], change: Change | None = None, **target: Any
) -> SparsityControl:
    """A run in which parameters get these gradients, by the step; ``change`` is called before each step."""
    control = SparsityControl(optimizer, STEPS, **{"target_sparsity": 0.5, **target})
    for step in range(1, STEPS + 1):
        torch.manual_seed(step)
        optimizer.zero_grad()
        if change is not None:
            change(step, optimizer)
        for param, grad in grads(step).items():
            if param.requires_grad:
                param.grad = grad
        control.before_step(step)
        optimizer.step()
        control.after_step(step)
    return control


def _noise(*params: Tensor) -> dict[Tensor, Tensor]:
    return {param: torch.randn_like(param) for param in params}


def _zeros(*params: Tensor) -> int:
    return sum(int((param == 0).sum()) for param in params)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda groups: AdamWLp(groups, lr=1e-2, lambda_p=0.01),
    "8bit": lambda groups: AdamWLp(groups, lr=1e-2, lambda_p=0.01, moments="bfloat16"),
    "sgd": lambda groups: LpDecay(torch.optim.SGD(groups, lr=1e-2)),
    "momentum": lambda groups: LpDecay(torch.optim.SGD(groups, lr=1e-2, momentum=0.9)),
    "adagrad": lambda groups: LpDecay(torch.optim.Adagrad(groups, lr=1e-2)),  # whose state is there from the start
    "adafactor": lambda groups: LpDecay(torch.optim.Adafactor(groups, lr=1e-2)),
}


@pytest.mark.parametrize("budget", ["global", "tensor"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_has_no_gradient_is_left_alone_and_the_others_meet_the_target(name: str, budget: str) -> None:
    params = _params()
    before = params[0].detach().clone()
    _run(OPTIMIZERS[name](params), lambda _: _noise(*params[1:]), sparsity_budget=budget)
    assert torch.equal(params[0], before)
    assert _zeros(*params[1:]) == 576
    assert budget == "global" or _zeros(params[1]) == 288


@pytest.mark.parametrize("name", ["adamw", "momentum", "adagrad"])
def test_a_gradient_of_zeros_is_none(name: str) -> None:
    params = _params()
    before = params[0].detach().clone()
    _run(OPTIMIZERS[name](params), lambda _: {params[0]: torch.zeros_like(params[0]), **_noise(*params[1:])})
    assert torch.equal(params[0], before) and _zeros(*params[1:]) == 576


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_with_a_rate_of_0_is_left_alone(name: str) -> None:
    params = _params()
    before = params[0].detach().clone()
    groups = [{"params": params[:1], "lr": 0.0}, {"params": params[1:]}]
    _run(OPTIMIZERS[name](groups), lambda _: _noise(*params))
    assert torch.equal(params[0], before) and _zeros(*params[1:]) == 576


def test_what_is_frozen_in_mid_run_keeps_its_bits() -> None:
    params = _params()
    kept: list[Tensor] = []

    def freeze(step: int, _: Any) -> None:
        if step == 40:
            params[0].requires_grad_(False)
            kept.append(params[0].detach().clone())

    _run(AdamWLp(params, lr=1e-2, lambda_p=0.01), lambda _: _noise(*params), freeze)
    assert torch.equal(params[0], kept[0]) and 0 < _zeros(params[0])
    assert _zeros(*params[1:]) == 576


def test_what_is_unfrozen_in_mid_run_belongs_to_the_target_from_then_on() -> None:
    params = _params()

    def unfreeze(step: int, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = 0.0 if step < 30 else 1e-2

    groups = [{"params": params[:1]}, {"params": params[1:]}]
    _run(AdamWLp(groups, lr=1e-2, lambda_p=0.01), lambda _: _noise(*params), unfreeze)
    assert _zeros(*params) == 864 and _zeros(params[0])


def test_a_first_gradient_after_pruning_has_begun() -> None:
    params = _params()
    _run(AdamWLp(params, lr=1e-2, lambda_p=0.01), lambda step: _noise(*params[step < 30 :]))
    assert _zeros(*params) == 864 and _zeros(params[0])


@pytest.mark.parametrize("end", [0.75, 1.0])
def test_a_rate_of_0_for_all_groups_freezes_none(end: float) -> None:
    params = _params()
    optimizer = AdamWLp(params, lr=1e-2, lambda_p=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    control = SparsityControl(optimizer, STEPS, target_sparsity=0.5, sparsity_end=end)
    for step in range(1, STEPS + 1):
        for param, grad in _noise(*params).items():
            param.grad = grad
        control.before_step(step)
        optimizer.step()
        scheduler.step()
        control.after_step(step)
    assert _zeros(*params) == 864


def test_nothing_can_move() -> None:
    params = _params()
    before = [param.detach().clone() for param in params]
    control = _run(AdamWLp(params, lr=0.0, lambda_p=0.01), lambda _: _noise(*params))
    assert all(torch.equal(one, other) for one, other in zip(params, before, strict=True))
    assert control.budgets == [] and control.shortfall() == 0.0


def test_experts_of_a_stack_without_a_gradient_are_left_alone() -> None:
    torch.manual_seed(0)
    experts = nn.Parameter(torch.randn(4, 16, 8))
    before = experts.detach().clone()
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(4, 1, 1)
    for kind in ("element", "2:4"):
        with torch.no_grad():
            experts.copy_(before)
        more = (
            {} if kind == "element" else {"group": kind, "units": [{"count": 8, "members": [{"param": 0, "dim": 2}]}]}
        )
        optimizer = AdamWLp([{"params": [experts], **more}], lr=1e-2, lambda_p=0.01)
        control = _run(optimizer, lambda _: {experts: torch.randn_like(experts) * mask})
        assert torch.equal(experts[1], before[1]) and torch.equal(experts[3], before[3])
        assert _zeros(experts) == 128
        assert [budget.numel for budget in control.budgets] == [256]


@pytest.mark.parametrize("frozen", [False, True])
def test_units_without_a_gradient_or_with_a_frozen_part_are_left_alone(frozen: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 20), nn.Linear(16, 20))
    groups = build_param_groups(model, p_norm=0.8, lambda_p=0.01, rules={"weight": {"group": "row"}})
    before = model[0].weight.detach().clone()
    moving = list(model[1].parameters())
    if frozen:
        moving.append(model[0].bias)
        model[0].weight.requires_grad_(False)
    _run(AdamWLp(groups, lr=1e-2), lambda _: _noise(*moving))
    assert torch.equal(model[0].weight, before)
    assert int((model[1].weight == 0).all(1).sum()) == 10


def test_the_target_of_all_is_met_by_what_can_move_beside_rules() -> None:
    params = _params(4)
    groups = [{"params": params[:2], "target_sparsity": 0.7}, {"params": params[2:]}]
    _run(AdamWLp(groups, lr=1e-2, lambda_p=0.01), lambda _: _noise(*params[1:]))
    assert _zeros(params[0]) == 0
    assert _zeros(params[1]) == round(0.7 * 576)
    assert _zeros(*params[1:]) == round(0.5 * 3 * 576)


@pytest.mark.parametrize("at", [20, 40, 50])
def test_a_resumed_run_is_the_same_run(at: int) -> None:
    def grads(params: list[nn.Parameter]) -> Callable[[int], dict[Tensor, Tensor]]:
        return lambda step: _noise(*params[step < 30 : 2 if step > 45 else 3])

    whole = _params()
    _run(AdamWLp(whole, lr=1e-2, lambda_p=0.01), grads(whole))
    params = _params()
    optimizer = AdamWLp(params, lr=1e-2, lambda_p=0.01)
    control = SparsityControl(optimizer, STEPS, target_sparsity=0.5)
    for step in range(1, STEPS + 1):
        torch.manual_seed(step)
        optimizer.zero_grad()
        for param, grad in grads(params)(step).items():
            param.grad = grad
        control.before_step(step)
        optimizer.step()
        control.after_step(step)
        if step == at:
            saved = optimizer.state_dict()
            optimizer = AdamWLp(params, lr=1e-2, lambda_p=0.01)
            optimizer.load_state_dict(saved)
            control = SparsityControl(optimizer, STEPS, target_sparsity=0.5)
    assert all(torch.equal(one, other) for one, other in zip(params, whole, strict=True))


class _AllAtOnce(torch.optim.SGD):
    """Makes the state of all tensors at once, under a name of its own, as MADGRAD and SPAM do."""

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, lr)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["s"] = torch.zeros_like(param)


class _EmptyTrace(torch.optim.SGD):
    """Keeps a momentum that it does not use, so it stays zero, as SM3 of pytorch_optimizer does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
        return super().step(closure)


@pytest.mark.parametrize("base", [_AllAtOnce, _EmptyTrace])
@pytest.mark.parametrize("resumed", [False, True])
def test_bases_whose_state_does_not_tell_what_has_moved(base: Any, resumed: bool) -> None:
    """Also after a checkpoint of ours is loaded, in which all tensors have a state."""
    moving, never = _params(2)
    kept = never.detach().clone()
    optimizer = LpDecay(base([moving, never], lr=1e-2))

    def reload(step: int, optimizer: Any) -> None:
        if resumed and step in (5, 40):
            optimizer.load_state_dict(optimizer.state_dict())

    _run(optimizer, lambda step: _noise(moving), reload)
    assert torch.equal(never, kept) and _zeros(moving) == moving.numel() // 2
