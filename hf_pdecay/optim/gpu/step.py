"""The step on a GPU: two launches of kernels.py for all tensors of a kind; the host never waits.

This module makes the tables of the kernels and groups tensors that can share a launch.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..moments import is_quantized, refusal_of_encoded
from ..tensor_step import TensorStep, fuses, is_flat, spacing
from .kernels import SHARED, look, prepare, update
from .launch import BLOCK, CHUNK, DEVICES, OPTIONS, TYPES, bits, guard, point_to_gradients, rows_of_tensors, table_of


_ROWS = 128  # tensors that a program of the first kernel prepares


class Batch:
    """Steps that :meth:`refusal` does not refuse, as tables of addresses on the host. It holds no gradient."""

    repeats = True

    def __init__(self, steps: Sequence[TensorStep]) -> None:
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for index, step in enumerate(steps):
            hyper, decay = step.hyper, "elements" if step.hyper.decays and step.awake is not False else "none"
            if step.structure is not None and fuses(step):
                hyper, decay = step.structure.hyper, "2:4" if step.structure.table is None else "units"
            dtypes = step.param.dtype, step.exp_avg.dtype, is_quantized(step.exp_avg)
            kinds.setdefault((step.param.device, *dtypes, id(hyper), step.base is None, decay), []).append(index)
        self._params = [step.param for step in steps]
        self.shrunk: Sequence[int] = [index for index, step in enumerate(steps) if fuses(step)]
        # The launches hold their addresses.
        self._tables = [step.structure.table for step in steps if step.structure is not None]
        self._launches = [
            _Launch([steps[index] for index in indices], indices, decay) for (*_, decay), indices in kinds.items()
        ]

    @staticmethod
    def refusal(step: TensorStep) -> str | None:
        """Return why the kernel, which believes every address, cannot do the step of this tensor; or None."""
        param, grad, moment, second = step.param, step.grad, step.exp_avg, step.exp_avg_sq
        if param.device.type not in DEVICES:
            return f"it works on a GPU, not on {param.device.type}"
        dtypes = {param.dtype, moment.dtype}
        if is_quantized(moment) or is_quantized(second):
            refused = refusal_of_encoded(param, moment, second)
            if refused is not None:
                return refused
            moment, second = _codes(moment), _codes(second)
        elif (
            not dtypes <= TYPES.keys() or (torch.float64 in dtypes and len(dtypes) > 1) or second.dtype != moment.dtype
        ):
            return f"it does not know weights of {param.dtype} with moments of {moment.dtype} and {second.dtype}"
        if grad.dtype != param.dtype or grad.is_neg():
            return f"it takes gradients of the weights' dtype {param.dtype} as they are in memory, not of {grad.dtype}"
        if step.base is not None and step.base.dtype != param.dtype:
            return f"it takes a base of the weights' dtype {param.dtype}, not of {step.base.dtype}"
        others = [tensor for tensor in (grad, moment, second, step.base) if tensor is not None]
        if any(tensor.shape != param.shape for tensor in others):
            return "gradient, moments and base must have the shape of the weights"
        if not is_flat(param, *others):
            return "weights, gradient, moments and base must lie in memory alike and without gaps"
        scalars = [step.step, step.awake] if isinstance(step.awake, Tensor) else [step.step]
        if any(tensor.device != param.device for tensor in (*others, *scalars)):
            return f"all tensors must be on {param.device}"
        if step.step.dtype != torch.float32 or any(tensor.numel() != 1 for tensor in scalars):
            return f"it takes a step counter of torch.float32, not {step.step.dtype}"
        return None

    def point(self, addresses: Sequence[int]) -> None:
        """Take the gradients at these addresses; nothing else has changed."""
        for launch in self._launches:
            launch.point([addresses[index] for index in launch.indices])

    def all_finite(self) -> bool | Tensor:
        """Whether all gradients are finite, as a 0-dim tensor: the host does not wait."""
        devices = dict.fromkeys(launch.device for launch in self._launches)
        flags = {device: torch.ones((), dtype=torch.bool, device=device) for device in devices}
        for launch in self._launches:
            launch.look(flags[launch.device])
        return functools.reduce(lambda one, other: one & other.to(one.device), flags.values()) if flags else True

    def step(self, finite: bool | Tensor = True) -> None:
        """Do one step on each tensor, in place."""
        if finite is False:
            return
        for launch in self._launches:
            launch.step(finite)
        torch.autograd.graph.increment_version(self._params)


class _Launch:
    """The step of tensors that share their device, dtypes and hyperparameters."""

    def __init__(self, steps: Sequence[TensorStep], indices: Sequence[int], decay: str) -> None:
        self.indices = indices
        self.device = steps[0].param.device
        structure = steps[0].structure
        self._hyper = steps[0].hyper if structure is None or decay not in ("units", "2:4") else structure.hyper
        self._to_base = steps[0].base is not None and decay != "none"
        self._rows = len(steps)
        self._words, self._chunks = rows_of_tensors(map(_columns, steps))
        self._bytes = self._words.tobytes()
        param, moment = steps[0].param.dtype, steps[0].exp_avg.dtype
        stored = TYPES[moment]
        self._encoding = self._units = None
        if is_quantized(steps[0].exp_avg):
            stored, self._encoding = tl.uint8, array("q", chain.from_iterable(map(_encoding, steps)))
        if decay == "units":
            self._units = array("q", chain.from_iterable(map(_units, steps)))
        # Weights that neither decay nor have moments of another dtype are rounded as in torch.
        nearest = param == torch.float64 or (param == moment and (not self._hyper.decays or param == torch.float32))
        self._shared_dtype = param if param == torch.float64 else torch.float32
        self._prepare = {"MOMENT": stored, "ROWS": _ROWS, **OPTIONS}
        self._look = {"PARAM": TYPES[param], "CHUNK": CHUNK, "BLOCK": BLOCK, **OPTIONS}
        self._update = {**self._look, "MOMENT": stored, "DECAY": decay, "NEAREST": nearest}

    def point(self, addresses: Sequence[int]) -> None:
        point_to_gradients(self._words, addresses)
        self._bytes = self._words.tobytes()

    def look(self, finite: Tensor) -> None:
        """Set a flag to false if a gradient is not finite."""
        if self._chunks:
            with guard(self.device):
                table = table_of(self._words, self.device, self._bytes)
                look[(self._chunks,)](table, finite, self._rows, **self._look)

    def step(self, finite: bool | Tensor) -> None:
        device, hyper = self.device, self._hyper
        with guard(device):
            table = table_of(self._words, device, self._bytes)
            shared = torch.empty(self._rows * SHARED.value, dtype=self._shared_dtype, device=device)
            flag = finite.to(device, non_blocking=True) if isinstance(finite, Tensor) else None
            rate, lr = _rate(hyper.lr, device)
            numbers = lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, hyper.p_norm, hyper.lambda_p
            # Units that are dead stay so also where λ_p is 0.
            to_base = self._to_base and (hyper.lambda_p != 0 or self._units is not None)
            flags = int(hyper.maximize) + 2 * int(hyper.keep_zeros) + 4 * int(to_base)
            grid = (triton.cdiv(self._rows, _ROWS),)
            prepare[grid](table, shared, flag, rate, self._rows, *bits(numbers), flags, **self._prepare)
            if self._chunks:
                encoding = None if self._encoding is None else table_of(self._encoding, device)
                units = None if self._units is None else table_of(self._units, device)
                update[(self._chunks,)](table, shared, encoding, units, self._rows, TO_BASE=to_base, **self._update)


def _columns(step: TensorStep) -> dict[str, int]:
    """The row of a tensor in the table."""
    return {
        "weights": step.param.data_ptr(),
        "grad": step.grad.data_ptr(),
        "exp_avg": _codes(step.exp_avg).data_ptr(),
        "exp_avg_sq": _codes(step.exp_avg_sq).data_ptr(),
        "step": step.step.data_ptr(),
        "awake": step.awake.data_ptr() if isinstance(step.awake, Tensor) else 0,
        "numel": step.param.numel(),
        "place": step.place,
        "base": 0 if step.base is None else step.base.data_ptr(),
    }


def _codes(moment: Any) -> Tensor:
    return moment.codes if is_quantized(moment) else moment


def _encoding(step: TensorStep) -> tuple[int, ...]:
    """The addresses of the scales and of the maps of 8-bit moments."""
    states: tuple[Any, Any] = step.exp_avg, step.exp_avg_sq
    return tuple(getattr(state, name).data_ptr() for name in ("scale", "qmap") for state in states)


def _units(step: TensorStep) -> tuple[int, int, int]:
    """The address of the factors of units, and how the elements of the tensor map to them."""
    structure: Any = step.structure
    return structure.table.data_ptr(), spacing(step.param, structure.dim), step.param.shape[structure.dim]


def _rate(lr: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """The learning rate as a tensor on the device and 0, or as None and a number."""
    if not isinstance(lr, Tensor):
        return None, lr
    if lr.device.type == "cpu" and device.type != "cpu":
        return None, lr.item()  # the host does not wait for its memory
    return lr.to(device, non_blocking=True), 0.0
