"""What all launches share: dtypes, options, tables of addresses on the device, and bits of numbers."""

from __future__ import annotations

import contextlib
import functools
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .memory import COLUMNS, row_of


TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# The kernels say where a product and a sum are fused. Hashes overflow.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, "sanitize_overflow": False}
BLOCK = 1024  # elements that a program works on at a time: eight per thread, so that half precision loads 16 bytes
CHUNK = 4 * BLOCK  # elements of a program, which share the search for their tensor
ALIGNMENT = 16  # bytes that a thread loads at once if the addresses allow it

# The kernels run in Python, on tensors of a CPU, if TRITON_INTERPRET was set when triton was imported.
_INTERPRETED = not isinstance(row_of, triton.JITFunction)
DEVICES = ("cuda", "xpu", "cpu") if _INTERPRETED else ("cuda", "xpu")

# Columns of a row of each kind of table.
_COLUMNS = {
    "first_chunk": 0,  # place of the row's first program among the programs of all rows
    # of a tensor, see memory.py
    **{"weights": 1, "grad": 2, "exp_avg": 3, "exp_avg_sq": 4, "step": 5, "awake": 6, "numel": 7, "place": 8},
    **{"aligned": 9, "base": 10},
    # of a tensor whose squares are summed, see units.py
    **{"sums": 2, "outer": 3, "length": 4, "inner": 5},
    # of the units of a layer, see units.py
    **{"first_member": 1, "members": 2, "first_unit": 3, "count": 4, "unit_size": 5},
}


def row(**columns: int) -> list[int]:
    """Return a row of a table; the columns that are not given are 0."""
    words = [0] * COLUMNS.value
    for name, value in columns.items():
        words[_COLUMNS[name]] = value
    return words


def rows_of_tensors(tensors: Iterable[Mapping[str, int]], chunk: int = CHUNK) -> tuple[array[int], int]:
    """Return a table with a row of columns for each tensor, and the number of programs, one for each chunk."""
    table = array("q")
    chunks = 0
    for columns in tensors:
        table.extend(row(first_chunk=chunks, **columns))
        chunks += triton.cdiv(columns["numel"], chunk)
    _note_alignment(table)
    return table, chunks


def point_to_gradients(table: array[int], addresses: Sequence[int]) -> None:
    """Change the addresses of the gradients in a table of tensors."""
    table[_COLUMNS["grad"] :: COLUMNS.value] = array("q", addresses)
    _note_alignment(table)


def _note_alignment(table: array[int]) -> None:
    """Note which rows have weights, gradient, moments and base at multiples of 16 bytes."""
    for start in range(0, len(table), COLUMNS.value):
        weights, grad, exp_avg, exp_avg_sq = table[start + 1 : start + 5]
        base = table[start + _COLUMNS["base"]]
        table[start + _COLUMNS["aligned"]] = (weights | grad | exp_avg | exp_avg_sq | base) % ALIGNMENT == 0


def table_of(words: array[int], device: torch.device, as_bytes: bytes | None = None) -> Tensor:
    """Return a table on the device; the host does not wait."""
    if _is_capturing(device):
        return _filled_table(words, device)
    # Memory goes back to the stream that took it, so streams do not share tables.
    stream = None if device.type == "cpu" else torch.get_device_module(device).current_stream()
    return _copied_table(words.tobytes() if as_bytes is None else as_bytes, device, stream)


@functools.lru_cache(maxsize=128)
def _copied_table(words: bytes, device: torch.device, stream: object) -> Tensor:
    """Return a table, kept by its content, which changes when a gradient moves."""
    table = torch.frombuffer(bytearray(words), dtype=torch.int64)
    # The host does not wait for a copy from pinned memory.
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _filled_table(words: array[int], device: torch.device) -> Tensor:
    """Return a table for a CUDA graph that is being captured: each replay fills it by kernels, not from the host.

    It is not kept, and a kept table cannot replace it: that may be gone when the graph is replayed.
    """
    table = torch.zeros(len(words), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), words.tolist())  # about a hundred numbers per launch
    return table


def _is_capturing(device: torch.device) -> bool:
    capturing = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return capturing is not None and bool(capturing())


def guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which launches go to a device."""
    module: Any = torch.get_device_module(device)
    if device.type == "cpu" or module.current_device() == device.index:
        return contextlib.nullcontext()
    return module.device(device)


def bits(numbers: Sequence[float]) -> tuple[int, ...]:
    """Return the bits of float64 numbers as integers, which a kernel takes without rounding."""
    return struct.unpack(f"<{len(numbers)}q", struct.pack(f"<{len(numbers)}d", *numbers))
