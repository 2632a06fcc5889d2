"""The step on a GPU, by two launches for all tensors of a kind: one pass over memory, and the host never waits.

The kernels are in triton_kernels.py. Here their tables are made, and tensors are told apart that need another launch.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from array import array
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..moments import is_quantized, refusal_of_encoded
from ..tensor_step import TensorStep, fuses, is_flat, spacing
from .kernels import COLUMNS, SHARED, look, prepare, update


TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# The kernels say where a product and a sum are fused. Hashes overflow.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, "sanitize_overflow": False}
BLOCK = 1024  # elements that a program works on at a time: eight a thread, so that half precision loads 16 bytes
_CHUNK = 4 * BLOCK  # elements of a program, over which finding their tensor is spread
_ROWS = 128  # tensors that a program of the first kernel prepares
_GRAD, _ALIGNED = 2, 9  # columns of the table
ALIGNMENT = 16  # bytes that a thread loads at once where the addresses allow it

# Whether the kernels run in Python, on tensors of a CPU: so they do if TRITON_INTERPRET was set when triton saw them.
_INTERPRETED = not isinstance(update, triton.JITFunction)
DEVICES = ("cuda", "xpu", "cpu") if _INTERPRETED else ("cuda", "xpu")

_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def refusal(each: TensorStep) -> str | None:
    """Return why the kernel cannot do the step of this tensor, or None. It believes every address that it is given."""
    param, grad, moment, second = each.param, each.grad, each.exp_avg, each.exp_avg_sq
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
        if not dtypes <= TYPES.keys() or (torch.float64 in dtypes and len(dtypes) > 1) or second.dtype != moment.dtype:
            return f"it does not know weights of {param.dtype} with moments of {moment.dtype} and {second.dtype}"
    if grad.dtype != param.dtype or grad.is_neg():
        return f"it takes gradients of the weights' dtype {param.dtype} as they are in memory, not of {grad.dtype}"
    if any(tensor.shape != param.shape for tensor in (grad, moment, second)):
        return "gradient and moments must have the shape of the weights"
    if not is_flat(param, grad, moment, second):
        return "weights, gradient and moments must lie in memory alike and without gaps"
    scalars = [each.step, each.awake] if isinstance(each.awake, Tensor) else [each.step]
    if any(tensor.device != param.device for tensor in (grad, moment, second, *scalars)):
        return f"all tensors must be on {param.device}"
    if each.step.dtype != torch.float32 or any(tensor.numel() != 1 for tensor in scalars):
        return f"it takes a step counter of torch.float32, not {each.step.dtype}"
    return None


class Batch:
    """Steps as the kernels read them: tables of addresses, kept on the host. It holds no gradient.

    Args:
        steps: Tensors none of which :func:`refusal` refuses.
    """

    repeats = True

    def __init__(self, steps: Sequence[TensorStep]) -> None:
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for index, each in enumerate(steps):
            decay = "elements" if each.hyper.decays and each.awake is not False else "none"
            hyper = each.hyper
            if each.structure is not None and fuses(each):
                decay = "2:4" if each.structure.table is None else "groups"
                hyper = each.structure.hyper
            encoded = is_quantized(each.exp_avg)
            kind = each.param.device, each.param.dtype, each.exp_avg.dtype, encoded, id(hyper), decay
            kinds.setdefault(kind, []).append(index)
        self._params = [each.param for each in steps]
        self.shrunk: Sequence[int] = [index for index, each in enumerate(steps) if fuses(each)]
        # The launches name addresses of theirs.
        self._tables = [each.structure.table for each in steps if each.structure is not None]
        self._launches = [_Launch([steps[index] for index in some], some, decay) for (*_, decay), some in kinds.items()]

    @staticmethod
    def refusal(each: TensorStep) -> str | None:
        """Return why the step of this tensor cannot be done, or None."""
        return refusal(each)

    def point(self, addresses: Sequence[int]) -> None:
        """Take the gradients at these addresses, all else being as it was."""
        for launch in self._launches:
            launch.point([addresses[index] for index in launch.indices])

    def all_finite(self) -> bool | Tensor:
        """Whether all gradients are finite, as a 0-dim tensor: the host does not wait."""
        found: dict[torch.device, Tensor] = {}
        for launch in self._launches:
            if launch.device not in found:
                found[launch.device] = torch.ones((), dtype=torch.bool, device=launch.device)
            launch.look(found[launch.device])
        flags = list(found.values())
        return functools.reduce(lambda one, other: one & other.to(one.device), flags) if flags else True

    def step(self, finite: bool | Tensor = True) -> None:
        """Do one step on each tensor, in place; see :func:`hf_pdecay.optim.foreach.step`."""
        if finite is False:
            return
        for launch in self._launches:
            launch.step(finite)
        torch.autograd.graph.increment_version(self._params)


class _Launch:
    """The step of tensors that share their device, dtypes and hyperparameters."""

    def __init__(self, some: Sequence[TensorStep], indices: Sequence[int], decay: str) -> None:
        self.indices = indices
        self.device = some[0].param.device
        structure = some[0].structure
        self._hyper = some[0].hyper if structure is None or decay not in ("groups", "2:4") else structure.hyper
        self._rows = len(some)
        self._words, self._chunks = _words(some)
        self._bytes = self._words.tobytes()
        param, moment = some[0].param.dtype, some[0].exp_avg.dtype
        stored = TYPES[moment]
        self._encoding: array[int] | None = None
        if is_quantized(some[0].exp_avg):
            stored, self._encoding = tl.uint8, _encoding(some)
        self._groups = _groups(some) if decay == "groups" else None
        # What neither decays nor has moments of another dtype is rounded as torch does.
        nearest = param == torch.float64 or (param == moment and (not self._hyper.decays or param == torch.float32))
        self._shared_dtype = param if param == torch.float64 else torch.float32
        self._prepare = {"MOMENT": stored, "ROWS": _ROWS, **OPTIONS}
        self._look = {"PARAM": TYPES[param], "CHUNK": _CHUNK, "BLOCK": BLOCK, **OPTIONS}
        self._update = {**self._look, "MOMENT": stored, "DECAY": decay, "NEAREST": nearest}

    def point(self, addresses: Sequence[int]) -> None:
        self._words[_GRAD :: COLUMNS.value] = array("q", addresses)
        aligned = [
            all(address % ALIGNMENT == 0 for address in self._words[start + 1 : start + 5])
            for start in range(0, len(self._words), COLUMNS.value)
        ]
        self._words[_ALIGNED :: COLUMNS.value] = array("q", aligned)
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
                encoding, groups = (
                    None if words is None else table_of(words, device) for words in (self._encoding, self._groups)
                )
                update[(self._chunks,)](table, shared, encoding, groups, self._rows, **self._update)

    def _table(self) -> Tensor:
        return table_of(self._words, self.device, self._bytes)


def _words(some: Sequence[TensorStep]) -> tuple[array[int], int]:
    """Return the words of the table, a row for each tensor, and the number of chunks."""
    words = array("q")
    chunks = 0
    for each in some:
        numel = each.param.numel()
        moments: list[Any] = [each.exp_avg, each.exp_avg_sq]
        if is_quantized(each.exp_avg):
            moments = [state.codes for state in moments]
        addresses = each.param.data_ptr(), each.grad.data_ptr(), *(moment.data_ptr() for moment in moments)
        awake = each.awake.data_ptr() if isinstance(each.awake, Tensor) else 0
        aligned = all(address % ALIGNMENT == 0 for address in addresses)
        words.extend((chunks, *addresses, each.step.data_ptr(), awake, numel, each.place, aligned))
        chunks += triton.cdiv(numel, _CHUNK)
    return words, chunks


def _encoding(some: Sequence[TensorStep]) -> array[int]:
    """Return for each tensor with moments in 8 bits the addresses of the scales of both and of the maps of both."""
    words = array("q")
    for each in some:
        states: tuple[Any, Any] = each.exp_avg, each.exp_avg_sq
        words.extend(state.scale.data_ptr() for state in states)
        words.extend(state.qmap.data_ptr() for state in states)
    return words


def _groups(some: Sequence[TensorStep]) -> array[int]:
    """Return for each tensor that decays by groups where its factors are, and how they go with its elements."""
    words = array("q")
    for each in some:
        structure = each.structure
        if structure is None or structure.table is None:
            raise RuntimeError("A tensor that decays by groups has no factors.")
        inner, length = spacing(each.param, structure.dim), each.param.shape[structure.dim]
        words.extend((structure.table.data_ptr(), inner, length))
    return words


def table_of(words: array[int], device: torch.device, as_bytes: bytes | None = None) -> Tensor:
    """Return a table on the device; the host does not wait."""
    if _is_capturing(device):
        return _filled_table(words, device)
    # Memory is given back to the stream that it was taken on, so each stream has tables of its own.
    stream = None if device.type == "cpu" else torch.get_device_module(device).current_stream()
    return _copied_table(words.tobytes() if as_bytes is None else as_bytes, device, stream)


@functools.lru_cache(maxsize=128)
def _copied_table(words: bytes, device: torch.device, stream: object) -> Tensor:
    """Return a table, kept by its content, which changes when a gradient moves."""
    table = torch.frombuffer(bytearray(words), dtype=torch.int64)
    # Out of pinned memory the copy is made without the host, which goes on.
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _filled_table(words: array[int], device: torch.device) -> Tensor:
    """Return a table for a CUDA graph that is being captured, which may not copy from the host: kernels fill it.

    The graph fills it at each replay anew, in memory of its own. So it is not kept: outside of the graph it holds
    nothing. Nor is one of those that are kept taken instead: it may be gone when the graph is replayed.
    """
    table = torch.zeros(len(words), dtype=torch.int64, device=device)
    # One launch of this carries about a hundred numbers.
    torch._foreach_add_(table.unbind(), words.tolist())
    return table


def _is_capturing(device: torch.device) -> bool:
    capturing = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return capturing is not None and bool(capturing())


def guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which launches go to a device."""
    if device.type == "cpu":
        return _NOTHING
    module: Any = torch.get_device_module(device)
    return _NOTHING if module.current_device() == device.index else module.device(device)


def _rate(lr: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """Return the learning rate as a tensor on the device and 0, or as None and a number."""
    if not isinstance(lr, Tensor):
        return None, lr
    if lr.device.type == "cpu" and device.type != "cpu":
        return None, lr.item()  # a look at the host's own memory, which waits for no device
    return lr.to(device, non_blocking=True), 0.0


def bits(numbers: Sequence[float]) -> tuple[int, ...]:
    """Return the bits of float64 numbers as integers, which a kernel takes whole."""
    return struct.unpack(f"<{len(numbers)}q", struct.pack(f"<{len(numbers)}d", *numbers))
