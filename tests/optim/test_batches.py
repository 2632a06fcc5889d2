"""The step of a base optimizer in batches: bit-identical, if it steps each tensor by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_pdecay.optim import base_optimizers, lp_decay
from hf_pdecay.optim.lp_decay import LpDecay
from tests.helpers.memory import PeakMemory
from tests.helpers.steps import normal


SHAPES = [(40, 30), (7,), (64, 64), (3, 5), (90, 10)]
# Muon takes matrices only.
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "AdamW, foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "Adam, amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "SGD, momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "RAdam": lambda groups: torch.optim.RAdam(groups, lr=0.01),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, centered=True, momentum=0.9),
    "Rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01),
    "Adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.5),
    "Adamax": lambda groups: torch.optim.Adamax(groups, lr=0.01),
    "ASGD": lambda groups: torch.optim.ASGD(groups, lr=0.01),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "Muon": lambda groups: torch.optim.Muon(groups, lr=0.01),
}


def weights(dtype: torch.dtype = torch.float32, only: int | None = None) -> list[nn.Parameter]:
    shapes = [shape for shape in SHAPES if only is None or len(shape) == only]
    made = [nn.Parameter((normal(*shape) * 0.1).to(dtype)) for shape in shapes]
    with torch.no_grad():
        made[0][:3] = 0  # zeros that an update would bring back
    return made


def grouped(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Some decay, some keep their zeros, and some do neither."""
    # Small tensors of one group are rounded by bits that depend on which of them shrink together.
    return [{"params": params[:1]}, {"params": params[1:2]}, {"params": params[2:3], "lambda_p": 0.0},
            {"params": params[3:], "lambda_p": 0.0, "keep_zeros": True}]  # fmt: skip


def run(optimizer: LpDecay, params: list[nn.Parameter], steps: int = 4) -> list[Any]:
    for seed in range(steps):
        for number, param in enumerate(params):
            generator = torch.Generator().manual_seed(100 * seed + number)
            param.grad = None
            if (seed, number) != (1, 0):  # a weight without a gradient in some step
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    return [params, optimizer.state_dict()]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of parameters that each call of a base's step had."""
    seen: list[int] = []
    step_batch = base_optimizers.step_batch

    def spy(base: Any, batch: base_optimizers.Batch) -> None:
        seen.append(sum(map(len, batch.values())))
        step_batch(base, batch)

    monkeypatch.setattr(lp_decay, "step_batch", spy)
    return seen


@pytest.mark.parametrize("decay_to", ["zero", "base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASES)
def test_batches_make_no_difference(
    name: str, dtype: torch.dtype, decay_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(torch.optim, name.split(",")[0]):
        pytest.skip("this torch has no such optimizer")
    params = weights(dtype, 2 if name == "Muon" else None)
    results = []
    for size in (1 << 30, 1300):
        ours = copy.deepcopy(params)
        seen = calls(monkeypatch)
        monkeypatch.setattr(base_optimizers, "batch_size", lambda device, size=size: size)
        optimizer = LpDecay(BASES[name](grouped(ours)), p_norm=0.8, lambda_p=0.05, decay_to=decay_to)
        results.append(run(optimizer, ours))
        monkeypatch.undo()
        # No tensors are compared by their words.
        assert {group.pop("decay_to") for group in results[-1][1]["param_groups"]} == {decay_to}
        assert sum(seen) == 4 * len(ours)
        assert (len(seen) == 4) == (size == 1 << 30)
        assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1, len(ours) - 3]
    torch.testing.assert_close(*results, rtol=0, atol=0)


class Counting(torch.optim.SGD):
    """What it does depends on how often it was called."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        """Step every other time."""
        self.calls += 1
        return super().step(closure) if self.calls % 2 else None


def hooked(groups: Any) -> torch.optim.Optimizer:
    base = torch.optim.SGD(groups, lr=0.01)
    base.register_step_post_hook(lambda *_: None)
    return base


def patched(groups: Any) -> torch.optim.Optimizer:
    base: Any = torch.optim.SGD(groups, lr=0.01)
    base.step = base.step
    return base  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [lambda groups: Counting(groups, lr=0.01), hooked, patched])
def test_others_step_once(make: Callable[[Any], torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights()
    seen = calls(monkeypatch)
    monkeypatch.setattr(base_optimizers, "batch_size", lambda device: 1)
    run(LpDecay(make(params)), params, steps=3)
    assert seen == [len(params)] * 3


def test_hooks_for_all_optimizers_are_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights()
    stepped: list[type] = []
    monkeypatch.setattr(base_optimizers, "batch_size", lambda device: 1)
    handle = register_optimizer_step_post_hook(lambda own, *_: stepped.append(type(own)))
    try:
        run(LpDecay(torch.optim.SGD(params, lr=0.01)), params, steps=1)
    finally:
        handle.remove()
    assert stepped == [torch.optim.SGD, LpDecay]


def test_what_is_not_stepped_keeps_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that fails in the middle is left with its groups."""
    params = weights()
    monkeypatch.setattr(base_optimizers, "batch_size", lambda device: 1)
    optimizer = LpDecay(torch.optim.AdamW(params, lr=0.01))
    run(optimizer, params, steps=1)
    groups: list[Tensor] = optimizer.param_groups[0]["params"]
    optimizer.state[params[3]].pop("exp_avg")
    with pytest.raises(KeyError):
        run(optimizer, params, steps=1)
    assert optimizer.param_groups[0]["params"] is groups and len(groups) == len(params)


def test_one_batch_is_copied_at_a_time() -> None:
    params = [nn.Parameter(torch.full((1 << 21,), 0.5)) for _ in range(8)]
    for param in params:
        param.grad = torch.full_like(param, 0.1)
    optimizer = LpDecay(torch.optim.SGD(params, lr=0.01, foreach=False), skip_nonfinite=False)
    optimizer.step()
    with PeakMemory() as memory:
        optimizer.step()
    assert 0 < memory.peak <= 4 * (1 << 22) + 1000
    assert memory.alive < 1000
