"""How a step is computed: which backend does which tensor, and why."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import compiled, foreach, reference
from .tensor_step import TensorStep, is_flat


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
            decays: Whether any of them decays.
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

    def assign(self, steps: Sequence[TensorStep]) -> list[tuple[str, list[TensorStep]]]:
        """Return which backend does which tensors. Nothing is written yet.

        Raises:
            ValueError: If a backend other than ``auto`` was asked for and cannot do a tensor.
        """
        by_device: dict[str, list[TensorStep]] = {}
        for each in steps:
            by_device.setdefault("cpu" if each.param.is_cpu else each.param.device.type, []).append(each)
        assigned: list[tuple[str, list[TensorStep]]] = []
        for device, some in by_device.items():
            numel = 0 if device in self.chosen else sum(each.param.numel() for each in some)
            name, _ = self.choice(device, numel, any(each.hyper.lambda_p != 0 for each in some))
            assigned += self._split(name, some)
        return assigned

    def all_finite(self, grads: Sequence[Tensor]) -> bool | Tensor:
        """Whether all gradients are finite: a bool on a CPU, else a 0-dim tensor, for which the host does not wait."""
        present = [grad for grad in grads if grad.numel()]
        if all(grad.device.type == "cpu" for grad in present):
            if self.chosen.get("cpu", ("",))[0] == "compiled" and all(map(_is_checkable, present)):
                return compiled.all_finite(present)
            # NaN and infinity come through a sum, and this one is the cheapest reduction that torch has. A sum that
            # overflowed by itself is looked at again below.
            if math.isfinite(sum(grad.sum().item() for grad in present)):
                return True
        finite = torch.nn.utils.get_total_norm(present, norm_type=math.inf).isfinite()
        return bool(finite) if finite.device.type == "cpu" else finite

    def _split(self, name: str, steps: list[TensorStep]) -> list[tuple[str, list[TensorStep]]]:
        """Part the tensors that a backend does from those that it refuses, which `auto` leaves to `foreach`."""
        if name in ("foreach", "reference"):
            return [(name, steps)]
        refusal = compiled.refusal if name == "compiled" else _triton().refusal
        taken: list[TensorStep] = []
        refused: list[TensorStep] = []
        for each in steps:
            reason = refusal(each)
            if reason is not None and self.name != "auto":
                raise ValueError(
                    f"backend={name!r} cannot do the step of a tensor of shape {tuple(each.param.shape)}: {reason}. "
                    "Take backend='auto' or 'foreach'."
                )
            (taken if reason is None else refused).append(each)
        return [(each, some) for each, some in ((name, taken), ("foreach", refused)) if some]


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
        if importlib.util.find_spec("triton") is not None:
            return "triton", f"one kernel does the step of {numel:,} weights in one pass over memory"
        return "foreach", "triton is not installed; with it the step takes one pass over memory"
    return "foreach", f"no kernel was written for {device}"


def run(name: str, steps: Sequence[TensorStep], finite: bool | Tensor = True) -> None:
    """Do one step on each tensor by the backend of that name; where ``finite`` is false nothing is written."""
    if name == "compiled":
        compiled.step(steps, finite)
    elif name == "triton":
        _triton().step(steps, finite)
    elif name == "reference":
        reference.step(steps, finite)
    else:
        foreach.step(steps, finite)


def _triton():  # type: ignore[no-untyped-def]
    from . import triton_step  # imports triton, which takes its time

    return triton_step


def _is_checkable(grad: Tensor) -> bool:
    return grad.dtype in compiled.CODES and is_flat(grad)
