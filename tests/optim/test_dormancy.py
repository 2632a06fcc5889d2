"""How the host learns that tensors on a device, which began wholly zero, have become non-zero."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from hf_pdecay.optim.dormancy import LATER, Awakening


class OnDevice(torch.Tensor):
    """A tensor that says that it is on a device."""

    is_cpu = False  # type: ignore[assignment]


class Device:
    """A module for a device that says when a copy has arrived, and notes who waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrived, self.waits = False, 0
        monkeypatch.setattr(torch, "get_device_module", lambda _: self)

    def Event(self) -> Device:  # noqa: N802
        return self

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.arrived

    def synchronize(self) -> None:
        self.waits += 1

    def device(self, _: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def ask(awakening: Awakening, states: list[dict[str, Any]]) -> None:
    awakening.ask({torch.zeros(()): state for state in states})


def entries(*flags: bool) -> list[dict[str, Any]]:
    return [{"step": torch.zeros(()), "dormant": torch.tensor(flag).as_subclass(OnDevice)} for flag in flags]


def test_the_host_learns_later_that_tensors_are_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    states = entries(True, False)
    awakening = Awakening()
    ask(awakening, states)
    awakening.hear()
    assert not states[0]["dormant"].is_cpu and not states[1]["dormant"].is_cpu, "nobody waits"
    device.arrived = True
    awakening.hear()
    assert not states[0]["dormant"].is_cpu and states[1]["dormant"].is_cpu
    assert bool(states[0]["dormant"]) and not bool(states[1]["dormant"])
    ask(awakening, states)
    states[0]["dormant"].fill_(False)
    awakening.hear()
    assert not states[0]["dormant"].is_cpu, "what was asked before it woke"
    assert not device.waits


@pytest.mark.parametrize("arrived", [False, True])
def test_processes_learn_in_the_same_step_that_shards_are_awake(arrived: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However soon the answer is there: until then each looks at the weights, which takes all of them."""
    device = Device(monkeypatch)
    device.arrived = arrived
    weights = [torch.zeros(()) for _ in range(3)]
    monkeypatch.setattr("hf_pdecay.optim.dormancy.is_dtensor", lambda weight: weight is not weights[2])
    sharded, whole = entries(False, True), entries(False)
    awakening = Awakening()
    for _ in range(LATER):
        assert not sharded[0]["dormant"].is_cpu
        awakening.ask(dict(zip(weights, (*sharded, *whole), strict=True)))
        awakening.hear()
        assert whole[0]["dormant"].is_cpu == arrived
    assert sharded[0]["dormant"].is_cpu and not sharded[1]["dormant"].is_cpu
    assert device.waits == 1
