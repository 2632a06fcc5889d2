"""Tensors that are wholly zero when training starts: they stay undecayed until they have become non-zero.

Zero absorbs, so that such a tensor (LoRA's B, a zero-initialised head) could never learn otherwise. Where changes
from a base decay these are all zero at first, so every tensor sleeps until it has moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .distributed import any_alive, is_dtensor


# Steps after which all processes read an answer about sharded tensors: enough for it to have arrived.
LATER = 8


def dormant_entry(param: Tensor, base: Tensor | None = None) -> Tensor:
    """Return the entry of a tensor's state that says whether it, or its change from a base, is wholly zero now."""
    # This waits for the device once in a tensor's life. Every tensor has the entry, as torch.distributed.checkpoint
    # loads into the state of an optimizer that has stepped the present weights.
    dormant = bool(param.numel()) and not any_alive(param, base)
    return placed(torch.full((), dormant, dtype=torch.bool, device=param.device))


def placed(dormant: Tensor) -> Tensor:
    """Return the entry where it is read: on the device for a tensor that may wake there, else on the host."""
    return dormant if dormant.is_cpu or dormant.item() else dormant.cpu()


def is_awake(param: Tensor, dormant: Tensor, base: Tensor | None = None) -> bool | Tensor:
    """Note whether a tensor that began wholly zero still is, and return whether it decays in the step to come."""
    if is_awake_for_good(dormant):
        return True
    awake = wake_on_device(param, dormant, base)
    return bool(awake) if param.device.type == "cpu" else awake


def wake_on_device(param: Tensor, dormant: Tensor, base: Tensor | None = None) -> Tensor:
    """Update the entry of a tensor that may be dormant, and return its negation; the host does not wait."""
    return ~dormant.logical_and_(~any_alive(param, base))


def is_awake_for_good(dormant: Tensor) -> bool:
    """Whether the host knows that a tensor is awake: no tensor falls asleep again."""
    return dormant.is_cpu and not dormant.item()


@dataclass
class _Question:
    """Entries on their way to the host, the event of their arrival, and the states that they belong to."""

    event: Any
    flags: Tensor
    states: list[dict[str, Any]]
    sharded: bool
    age: int = 0

    def is_answered(self) -> bool:
        if not self.sharded:
            return bool(self.event.query())
        self.age += 1
        if self.age < LATER:
            return False
        self.event.synchronize()
        return True


class Awakening:
    """Lets the host know that tensors on a device have become non-zero, without a wait.

    Their entries are copied to the host and read in a later step; from then on no step looks at these weights. For
    sharded ones all processes read the answer :data:`LATER` steps after the question, as a look takes communication.
    """

    def __init__(self) -> None:
        self._asked: list[_Question] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle no question: a copy asks anew."""
        return Awakening, ()

    def ask(self, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Copy the entries of stepped tensors that may be dormant, unless an earlier question is still open."""
        kinds: dict[tuple[torch.device, bool], list[dict[str, Any]]] = {}
        for param, state in states.items():
            if not state["dormant"].is_cpu:
                kinds.setdefault((state["dormant"].device, is_dtensor(param)), []).append(state)
        asked = {question.sharded for question in self._asked}
        for (device, sharded), waking in kinds.items():
            if sharded in asked:
                continue
            module: Any = torch.get_device_module(device)
            if not hasattr(module, "Event") or getattr(module, "is_current_stream_capturing", bool)():
                continue
            with module.device(device):
                flags = torch.stack([state["dormant"] for state in waking]).to("cpu", non_blocking=True)
                event = module.Event()
                event.record()
            self._asked.append(_Question(event, flags, waking, sharded))

    def hear(self) -> None:
        """Read the entries that have arrived."""
        if any(_is_capturing(state) for question in self._asked for state in question.states[:1]):
            return
        waiting = []
        for question in self._asked:
            if question.is_answered():
                for state, dormant in zip(question.states, question.flags.tolist(), strict=True):
                    if not dormant:
                        state["dormant"] = torch.zeros((), dtype=torch.bool)
            else:
                waiting.append(question)
        self._asked = waiting


def _is_capturing(state: dict[str, Any]) -> bool:
    """Whether a CUDA graph is being captured on a tensor's device, which forbids querying events."""
    module: Any = torch.get_device_module(state["step"].device)
    return bool(getattr(module, "is_current_stream_capturing", bool)())
