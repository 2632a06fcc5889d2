"""A norm that is known spares the look at gradients, unless they have changed since it was taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_pdecay import AdamWLp, LpDecay
from hf_pdecay.optim import adamw_lp, lp_decay
from tests.helpers.steps import BACKENDS, normal


Optimizer = AdamWLp | LpDecay
MAKES: dict[str, Callable[[Any], Optimizer]] = {
    **{name: lambda params, name=name: AdamWLp(params, lr=0.01, backend=name) for name in BACKENDS},
    "auto": lambda params: AdamWLp(params, lr=0.01),
    "sgd": lambda params: LpDecay(torch.optim.SGD(params, lr=0.01, momentum=0.9)),
    "fused": lambda params: LpDecay(torch.optim.AdamW(params, lr=0.01, fused=True)),
}


def in_place(param: Tensor) -> None:
    param.grad[0, 0] = math.nan  # type: ignore[index]


def through_a_view(param: Tensor) -> None:
    param.grad.detach().view(-1)[3].fill_(math.inf)  # type: ignore[union-attr]


def through_foreach(param: Tensor) -> None:
    torch._foreach_mul_([param.grad], math.nan)


def replaced(param: Tensor) -> None:
    param.grad = torch.full_like(param, math.nan)


def accumulated(param: Tensor) -> None:
    (param.sum() * math.inf).backward()


def anew(param: Tensor) -> None:
    param.grad = None
    (param.sum() * math.inf).backward()


def in_inference_mode(param: Tensor) -> None:
    with torch.inference_mode():
        grad = torch.full(param.shape, math.nan)
    param.grad = grad


CHANGES = [in_place, through_a_view, through_foreach, replaced, accumulated, anew, in_inference_mode]


def looks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    seen: list[None] = []
    for module, name in ((adamw_lp, "all_finite"), (lp_decay, "grads_finite")):
        look = getattr(module, name)
        monkeypatch.setattr(module, name, lambda some, look=look: seen.append(None) or look(some))
    return seen


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(normal(8, 8, seed=seed)) for seed in range(3)]


def clipped(params: list[nn.Parameter], seed: int) -> Tensor:
    for k, param in enumerate(params):
        param.grad = normal(8, 8, seed=100 * seed + k)
    return torch.nn.utils.clip_grad_norm_(params, 1.0)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MAKES)
def test_a_gradient_that_changes_after_the_norm_is_seen(
    name: str, change: Callable[[Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, params = looks(monkeypatch), parameters()
    optimizer = MAKES[name](params)
    for step in range(4):
        optimizer.grad_norm = clipped(params, step)
        before = [param.detach().clone() for param in params]
        if step == 2:
            change(params[1])
        optimizer.step()
        same = [torch.equal(one, other) for one, other in zip(before, params, strict=True)]
        assert same == [step == 2] * 3
        assert len(seen) == (step >= 2), "looks only where a gradient has changed"
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("name", MAKES)
def test_a_norm_of_some_gradients_says_nothing_of_the_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = MAKES[name](params)
    norm = clipped(params[:2], 0)
    params[2].grad = torch.full((8, 8), math.nan)
    optimizer.take_norm(norm, params[:2])
    optimizer.step()
    assert optimizer.skipped_steps == 1 and all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("name", MAKES)
def test_a_closure_makes_other_gradients(name: str) -> None:
    params = parameters()
    optimizer = MAKES[name](params)

    def closure() -> float:
        params[0].grad.add_(math.nan)  # type: ignore[union-attr]
        return 0.0

    optimizer.grad_norm = clipped(params, 0)
    optimizer.step(closure)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("name", MAKES)
def test_a_hook_before_the_step_may_do_what_no_count_shows(name: str) -> None:
    params = parameters()
    optimizer = MAKES[name](params)

    def change(*_: Any) -> None:
        params[0].grad.data.fill_(math.nan)  # type: ignore[union-attr]

    optimizer.register_step_pre_hook(change)
    optimizer.grad_norm = clipped(params, 0)
    optimizer.step()
    assert optimizer.skipped_steps == 1


def test_a_norm_keeps_no_gradient_alive_and_serves_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, params = looks(monkeypatch), parameters()
    optimizer = AdamWLp(params, lr=0.01)
    optimizer.grad_norm = clipped(params, 0)
    optimizer.step()
    optimizer.step()
    assert len(seen) == 1 and optimizer.grad_norm is None
    optimizer.grad_norm = clipped(params, 1)
    optimizer.zero_grad()
    for param in params:
        (param.sum() * 2).backward()
    optimizer.step()
    assert len(seen) == 2, "these gradients lie where those of the norm have been"


def test_a_grad_scaler_unscales_before_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, params = looks(monkeypatch), parameters()
    optimizer, scaler = AdamWLp(params, lr=0.01), torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        optimizer.zero_grad()
        loss = sum((param * normal(8, 8, seed=step)).sum() for param in params)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        optimizer.grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        if step == 1:
            in_place(params[0])
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.skipped_steps == 1 and len(seen) == 1
    assert all(param.isfinite().all() for param in params)
