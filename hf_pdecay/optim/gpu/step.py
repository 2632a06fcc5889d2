"""The step on a GPU, by two launches for all tensors of a kind: one pass over memory, and the host never waits.

The kernels are in kernels.py. This module makes their tables and groups tensors that can share a launch.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..moments import is_quantized, refusal_of_encoded
from ..tensor_step import TensorStep, fuses, is_flat, spacing
from .arithmetic import COLUMNS
from .kernels import SHARED, look, prepare, update
from .launch import (
    ALIGNED,
    BLOCK,
    CHUNK,
    DEVICES,
    GRAD,
    OPTIONS,
    TYPES,
    are_aligned,
    bits,
    guard,
    rows_of_tensors,
    table_of,
)


_ROWS = 128  # tensors that a program of the first kernel prepares


class Batch:
    """Steps as the kernels read them: tables of addresses, kept on the host. It holds no gradient.

    Args:
        steps: Tensors that :meth:`refusal` does not refuse.
    """

    repeats = True

    def __init__(self, steps: Sequence[TensorStep]) -> None:
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for index, step in enumerate(steps):
            decay = "elements" if step.hyper.decays and step.awake is not False else "none"
            hyper = step.hyper
            if step.structure is not None and fuses(step):
                decay = "2:4" if step.structure.table is None else "units"
                hyper = step.structure.hyper
            encoded = is_quantized(step.exp_avg)
            kind = step.param.device, step.param.dtype, step.exp_avg.dtype, encoded, id(hyper), decay
            kinds.setdefault(kind, []).append(index)
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
        if is_quantized(moment) or is_quantized(second):
            refused = refusal_of_encoded(param, moment, second)
            if refused is not None:
                return refused
            codes: tuple[Any, Any] = moment, second
            moment, second = (state.codes for state in codes)
        else:
            dtypes = {param.dtype, moment.dtype}
            if (
                not dtypes <= TYPES.keys()
                or (torch.float64 in dtypes and len(dtypes) > 1)
                or second.dtype != moment.dtype
            ):
                return f"it does not know weights of {param.dtype} with moments of {moment.dtype} and {second.dtype}"
        if grad.dtype != param.dtype or grad.is_neg():
            return f"it takes gradients of the weights' dtype {param.dtype} as they are in memory, not of {grad.dtype}"
        if any(tensor.shape != param.shape for tensor in (grad, moment, second)):
            return "gradient and moments must have the shape of the weights"
        if not is_flat(param, grad, moment, second):
            return "weights, gradient and moments must lie in memory alike and without gaps"
        scalars = [step.step, step.awake] if isinstance(step.awake, Tensor) else [step.step]
        if any(tensor.device != param.device for tensor in (grad, moment, second, *scalars)):
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
        flags: dict[torch.device, Tensor] = {}
        for launch in self._launches:
            if launch.device not in flags:
                flags[launch.device] = torch.ones((), dtype=torch.bool, device=launch.device)
            launch.look(flags[launch.device])
        return functools.reduce(lambda one, other: one & other.to(one.device), flags.values()) if flags else True

    def step(self, finite: bool | Tensor = True) -> None:
        """Do one step on each tensor, in place; see :func:`hf_pdecay.optim.foreach.step`."""
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
        self._rows = len(steps)
        self._words, self._chunks = rows_of_tensors(map(_columns, steps))
        self._bytes = self._words.tobytes()
        param, moment = steps[0].param.dtype, steps[0].exp_avg.dtype
        stored = TYPES[moment]
        self._encoding: array[int] | None = None
        if is_quantized(steps[0].exp_avg):
            stored, self._encoding = tl.uint8, _encoding(steps)
        self._units = _units(steps) if decay == "units" else None
        # Weights that neither decay nor have moments of another dtype are rounded as torch does.
        nearest = param == torch.float64 or (param == moment and (not self._hyper.decays or param == torch.float32))
        self._shared_dtype = param if param == torch.float64 else torch.float32
        self._prepare = {"MOMENT": stored, "ROWS": _ROWS, **OPTIONS}
        self._look = {"PARAM": TYPES[param], "CHUNK": CHUNK, "BLOCK": BLOCK, **OPTIONS}
        self._update = {**self._look, "MOMENT": stored, "DECAY": decay, "NEAREST": nearest}

    def point(self, addresses: Sequence[int]) -> None:
        width = COLUMNS.value
        self._words[GRAD::width] = array("q", addresses)
        aligned = [are_aligned(self._words[start : start + width]) for start in range(0, len(self._words), width)]
        self._words[ALIGNED::width] = array("q", aligned)
        self._bytes = self._words.tobytes()

    def look(self, finite: Tensor) -> None:
        """Set a flag to false if a gradient is not finite."""
        if self._chunks:
            with guard(self.device):
                look[(self._chunks,)](self._table(), finite, self._rows, **self._look)

    def step(self, finite: bool | Tensor) -> None:
        device, hyper = self.device, self._hyper
        with guard(device):
            table = self._table()
            shared = torch.empty(self._rows * SHARED.value, dtype=self._shared_dtype, device=device)
            flag = finite.to(device, non_blocking=True) if isinstance(finite, Tensor) else None
            rate, lr = _rate(hyper.lr, device)
            numbers = lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, hyper.p_norm, hyper.lambda_p
            flags = int(hyper.maximize) + 2 * int(hyper.keep_zeros)
            grid = (triton.cdiv(self._rows, _ROWS),)
            prepare[grid](table, shared, flag, rate, self._rows, *bits(numbers), flags, **self._prepare)
            if self._chunks:
                encoding, units = (
                    None if words is None else table_of(words, device) for words in (self._encoding, self._units)
                )
                update[(self._chunks,)](table, shared, encoding, units, self._rows, **self._update)

    def _table(self) -> Tensor:
        return table_of(self._words, self.device, self._bytes)


def _columns(step: TensorStep) -> dict[str, int]:
    """The row of a tensor in the table."""
    moments: list[Any] = [step.exp_avg, step.exp_avg_sq]
    if is_quantized(step.exp_avg):
        moments = [state.codes for state in moments]
    return {
        "weights": step.param.data_ptr(),
        "grad": step.grad.data_ptr(),
        "exp_avg": moments[0].data_ptr(),
        "exp_avg_sq": moments[1].data_ptr(),
        "step": step.step.data_ptr(),
        "awake": step.awake.data_ptr() if isinstance(step.awake, Tensor) else 0,
        "numel": step.param.numel(),
        "place": step.place,
    }


def _encoding(steps: Sequence[TensorStep]) -> array[int]:
    """Return for each tensor with moments in 8 bits the addresses of the scales of both and of the maps of both."""
    words = array("q")
    for step in steps:
        states: tuple[Any, Any] = step.exp_avg, step.exp_avg_sq
        words.extend(state.scale.data_ptr() for state in states)
        words.extend(state.qmap.data_ptr() for state in states)
    return words


def _units(steps: Sequence[TensorStep]) -> array[int]:
    """Return for each tensor that decays by units the address of its factors, and how its elements map to them."""
    words = array("q")
    for step in steps:
        structure = step.structure
        if structure is None or structure.table is None:
            raise RuntimeError("A tensor that decays by units has no factors.")
        inner, length = spacing(step.param, structure.dim), step.param.shape[structure.dim]
        words.extend((structure.table.data_ptr(), inner, length))
    return words


def _rate(lr: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """Return the learning rate as a tensor on the device and 0, or as None and a number."""
    if not isinstance(lr, Tensor):
        return None, lr
    if lr.device.type == "cpu" and device.type != "cpu":
        return None, lr.item()  # a look at the host's own memory, which waits for no device
    return lr.to(device, non_blocking=True), 0.0
