"""How a step is computed: which backend does which tensor, and why."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import foreach, reference
from .cpu import step as compiled
from .gradients import grads_finite
from .tensor_step import TensorStep


if TYPE_CHECKING:
    from .gpu import step as triton_step

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "compiled", "triton", "foreach", "reference")

# Weights on a CPU below which compiling, or loading what was compiled, costs more than it ever gives back.
MIN_COMPILED = 1 << 16


def check_backend(backend: object) -> None:
    """Check the argument.

    Raises:
        ValueError: If it is not one of :data:`BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"Invalid backend: backend={backend!r}; it must be one of {', '.join(BACKENDS)}.")


class Part:
    """Tensors of one step that one backend does.

    Args:
        name: The backend.
        steps: The tensors, none of which it refuses.
        careful: Whether they are spared a step with NaN or infinite gradients.
        indices: Which of the tensors of the step they are.

    Attributes:
        batch: What can be done again while the tensors are the same, and holds no gradient; None for the backends of
            plain operations.
    """

    def __init__(self, name: str, steps: Sequence[TensorStep], careful: bool, indices: Sequence[int] = ()) -> None:
        self.name = name
        self.careful = careful
        self.indices = indices
        self.batch: compiled.Batch | triton_step.Batch | None = None
        self.steps: Sequence[TensorStep] = steps
        if name in ("compiled", "triton"):
            self.batch = compiled.Batch(steps) if name == "compiled" else _triton().Batch(steps)

    def release(self) -> None:
        """Let the gradients go, which a batch finds by their addresses; whoever calls it keeps them alive."""
        self.steps = ()

    @property
    def shrunk(self) -> list[int]:
        """Which of the tensors of the step have their structured decay done here."""
        return [] if self.batch is None else [self.indices[index] for index in self.batch.shrunk]

    def run(self, finite: bool | Tensor = True) -> None:
        """Do one step on each tensor, in place; where ``finite`` is false nothing is written."""
        if self.batch is not None:
            self.batch.step(finite)
        elif self.name == "reference":
            reference.step(self.steps, finite)
        else:
            foreach.step(self.steps, finite)


def all_finite(parts: Sequence[Part]) -> bool | Tensor:
    """Whether all gradients are finite: a bool on a CPU, else a 0-dim tensor, for which the host does not wait."""
    found: bool | Tensor = True
    for part in parts:
        finite = grads_finite([each.grad for each in part.steps]) if part.batch is None else part.batch.all_finite()
        if isinstance(finite, Tensor) and isinstance(found, Tensor):
            found = found & finite.to(found.device)
        elif isinstance(finite, Tensor):
            found = finite if found else found
        elif not finite:
            return False
    return found


class Backend:
    """The backend of an optimizer: what was asked for, and what that came to on each kind of device.

    Args:
        name: One of :data:`BACKENDS`.

    Attributes:
        chosen: For each device type that has done a step, the backend and the reason for it.
    """

    def __init__(self, name: str = "auto") -> None:
        check_backend(name)
        self.name = name
        self.chosen: dict[str, tuple[str, str]] = {}

    def choice(self, device: str, numel: int, decays: bool) -> tuple[str, str]:
        """Return the backend for a type of device and the reason, which are logged once.

        Args:
            device: Type of the device, such as ``"cpu"``.
            numel: Number of weights there.
            decays: Whether any of them decays or keeps its zeros.
        """
        if self.name == "auto" and device == "cpu" and not decays:
            dense = "foreach", "nothing decays, and by plain operations the step is torch's AdamW to the bit"
            _say(logging.INFO, device, *dense)
            return dense
        if device not in self.chosen:
            name, reason = _automatic(device, numel) if self.name == "auto" else (self.name, "it was asked for")
            slow = self.name == "auto" and name == "foreach" and device in ("cpu", "cuda") and numel >= MIN_COMPILED
            _say(logging.WARNING if slow else logging.INFO, device, name, reason)
            self.chosen[device] = name, reason
        return self.chosen[device]

    def assign(self, steps: Sequence[TensorStep]) -> list[Part]:
        """Return which backend does which tensors. Nothing is written yet.

        Raises:
            ValueError: If a backend other than ``auto`` was asked for and cannot do a tensor.
        """
        alike: dict[tuple[str, bool], list[int]] = {}
        for index, each in enumerate(steps):
            device = "cpu" if each.param.is_cpu else each.param.device.type
            alike.setdefault((device, each.hyper.skip_nonfinite), []).append(index)
        # Of all tensors of the step: a group without decay beside one with it takes the same backend.
        decays = any(each.hyper.decays or each.hyper.keep_zeros for each in steps)
        splits = []
        for (device, careful), some in alike.items():
            numel = 0 if device in self.chosen else sum(e.param.numel() for e in steps if e.param.device.type == device)
            name, _ = self.choice(device, numel, decays)
            splits += [(*split, careful) for split in self._split(name, steps, some)]
        return [Part(name, [steps[index] for index in some], careful, some) for name, some, careful in splits]

    def _split(self, name: str, steps: Sequence[TensorStep], some: list[int]) -> list[tuple[str, list[int]]]:
        """Part the tensors that a backend does from those that it refuses, which `auto` leaves to `foreach`."""
        if name in ("foreach", "reference"):
            return [(name, some)]
        refusal = compiled.refusal if name == "compiled" else _triton().refusal
        taken: list[int] = []
        refused: list[int] = []
        for index in some:
            each = steps[index]
            reason = refusal(each)
            if reason is not None and self.name != "auto":
                raise ValueError(
                    f"backend={name!r} cannot do the step of a tensor of shape {tuple(each.param.shape)}: {reason}. "
                    "Take backend='auto' or 'foreach'."
                )
            (taken if reason is None else refused).append(index)
        return [(each, those) for each, those in ((name, taken), ("foreach", refused)) if those]


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


def _triton():  # type: ignore[no-untyped-def]
    from .gpu import step as triton_step  # imports triton, which takes its time

    return triton_step
