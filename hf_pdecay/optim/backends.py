"""The backends: what computes the step of each tensor, and why."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..checks import check_choice
from ..terminal import get_logger
from . import foreach, reference
from .cpu import step as compiled
from .gradients import grads_finite
from .tensor_step import TensorStep


logger = get_logger(__name__)

BACKENDS = ("auto", "compiled", "triton", "foreach", "reference")

# Weights on a CPU below which compiling, or loading what was compiled, costs more than it ever gives back.
MIN_COMPILED = 1 << 16


class Backend(Protocol):
    """The step of several tensors, computed in one way.

    ``shrunk`` are the indices of tensors whose structured decay the step does too. A backend that ``repeats`` can step
    again while the tensors stay where they are; it holds only addresses of gradients, so the caller keeps these alive.
    """

    shrunk: Sequence[int]
    repeats: bool

    def __init__(self, steps: Sequence[TensorStep]) -> None:
        """Prepare the step of tensors that :meth:`refusal` does not refuse. Nothing is written yet."""

    @staticmethod
    def refusal(step: TensorStep, /) -> str | None:
        """Return why the backend cannot step a tensor, or None."""

    def point(self, addresses: Sequence[int]) -> None:
        """Take the gradients at these addresses, if everything else is as before; only if it repeats."""

    def all_finite(self) -> bool | Tensor:
        """Return whether all gradients are finite, as a 0-dim tensor where the host would have to wait."""

    def step(self, finite: bool | Tensor = True) -> None:
        """Step each tensor, in place; where ``finite`` is false nothing is written."""


class Foreach:
    """The step in plain torch operations, see ``foreach.py``."""

    shrunk: Sequence[int] = ()
    repeats = False

    def __init__(self, steps: Sequence[TensorStep]) -> None:
        self._steps = steps

    @staticmethod
    def refusal(_: TensorStep) -> str | None:
        """Return None."""
        return None

    def point(self, addresses: Sequence[int]) -> None:
        """Do not call: plain operations do not repeat."""
        raise NotImplementedError

    def all_finite(self) -> bool | Tensor:
        """Return whether all gradients are finite."""
        return grads_finite([step.grad for step in self._steps])

    def step(self, finite: bool | Tensor = True) -> None:
        """Step each tensor, in place."""
        foreach.step(self._steps, finite)


class Reference(Foreach):
    """The step as the formulas say it, see ``reference.py``."""

    def step(self, finite: bool | Tensor = True) -> None:
        """Step each tensor, in place."""
        reference.step(self._steps, finite)


def backend_of(name: str) -> type[Backend]:
    """Return the backend with a name of :data:`BACKENDS` other than ``"auto"``."""
    if name == "triton":
        from .gpu import step as gpu_step  # imports triton, which takes its time

        return gpu_step.Batch
    backends: dict[str, type[Backend]] = {"compiled": compiled.Batch, "foreach": Foreach, "reference": Reference}
    return backends[name]


class Share(NamedTuple):
    """The tensors of a step that one backend does."""

    backend: Backend
    indices: Sequence[int]  # among the tensors of the step
    careful: bool  # whether a NaN or infinite gradient skips their step


def all_finite(backends: Sequence[Backend]) -> bool | Tensor:
    """Return whether all gradients are finite: a bool on a CPU, else a 0-dim tensor; the host does not wait."""
    result: bool | Tensor = True
    for backend in backends:
        finite = backend.all_finite()
        if isinstance(finite, Tensor) and isinstance(result, Tensor):
            result = result & finite.to(result.device)
        elif isinstance(finite, Tensor):
            result = finite if result else result
        elif not finite:
            return False
    return result


class BackendChoice:
    """The backends of an optimizer; ``chosen`` has their names and why, by the type of device."""

    def __init__(self, name: str = "auto") -> None:
        check_choice("backend", name, BACKENDS)
        self.name = name
        self.chosen: dict[str, tuple[str, str]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle only the name; a copy chooses anew."""
        return BackendChoice, (self.name,)

    def choice(self, device: str, numel: int, decays: bool) -> tuple[str, str]:
        """Return the backend for a type of device with ``numel`` weights and the reason, which are logged once."""
        if self.name == "auto" and device == "cpu" and not decays:
            dense = "foreach", "nothing decays, and by plain operations the step is bit-identical to torch's AdamW"
            _say(logging.INFO, device, *dense)
            return dense
        if device not in self.chosen:
            name, reason = _automatic(device, numel) if self.name == "auto" else (self.name, "it was asked for")
            slow = self.name == "auto" and name == "foreach" and device in ("cpu", "cuda") and numel >= MIN_COMPILED
            _say(logging.WARNING if slow else logging.INFO, device, name, reason)
            self.chosen[device] = name, reason
        return self.chosen[device]

    def assign(self, steps: Sequence[TensorStep]) -> list[Share]:
        """Return which backend does which tensors; writes nothing. ValueError if the requested backend refuses one."""
        alike: dict[tuple[str, bool], list[int]] = {}
        for index, step in enumerate(steps):
            device = "cpu" if step.param.is_cpu else step.param.device.type
            alike.setdefault((device, step.hyper.skip_nonfinite), []).append(index)
        # Of all tensors of the step: a group without decay beside one with it takes the same backend.
        decays = any(step.hyper.decays or step.hyper.keep_zeros for step in steps)
        # All refusals come first, so that a refused step has made nothing.
        splits: list[tuple[type[Backend], list[int], bool]] = []
        for (device, careful), indices in alike.items():
            numel = 0 if device in self.chosen else sum(s.param.numel() for s in steps if s.param.device.type == device)
            name, _ = self.choice(device, numel, decays)
            taken = self._taken(name, steps, indices)
            left = [index for index in indices if index not in taken]
            splits += [(backend_of(name), list(taken), careful), (Foreach, left, careful)]
        return [
            Share(backend([steps[index] for index in indices]), indices, careful)
            for backend, indices, careful in splits
            if indices
        ]

    def _taken(self, name: str, steps: Sequence[TensorStep], indices: Sequence[int]) -> dict[int, None]:
        """Return the tensors that a backend takes, as keys; ``auto`` leaves the others to `foreach`."""
        backend = backend_of(name)
        taken: dict[int, None] = {}
        for index in indices:
            reason = backend.refusal(steps[index])
            if reason is None:
                taken[index] = None
            elif self.name != "auto":
                raise ValueError(
                    f"backend={name!r} cannot do the step of a tensor of shape {tuple(steps[index].param.shape)}: "
                    f"{reason}. Take backend='auto' or 'foreach'."
                )
        return taken


@functools.cache
def _say(level: int, device: str, name: str, reason: str) -> None:
    logger.log(level, "AdamWLp on %s takes backend %r: %s.", device, name, reason)


def _automatic(device: str, numel: int) -> tuple[str, str]:
    if device == "cpu":
        if numel < MIN_COMPILED:
            return "foreach", f"{numel:,} weights are too few to compile for"
        reason = compiled.unavailable()
        if reason is None:
            return "compiled", f"one C++ function does the step of {numel:,} weights in one pass over memory"
        return "foreach", f"{reason}; with a C++ compiler the step takes about a third of the time"
    if device in ("cuda", "xpu"):
        if has_triton(device):
            return "triton", f"one kernel does the step of {numel:,} weights in one pass over memory"
        return "foreach", "triton is not installed; with it the step takes one pass over memory"
    return "foreach", f"no kernel was written for {device}"


def has_triton(device: torch.device | str | None) -> bool:
    """Whether there are Triton kernels for a device, or a type of it."""
    kind = getattr(device, "type", device)
    return kind in ("cuda", "xpu") and importlib.util.find_spec("triton") is not None
