"""Rounding on a CPU by one C++ function, which is compiled on first use and makes one pass over memory."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ..optim.cpu.native import load
from .grid import Grid


SOURCES = (Path(__file__).with_name("rounding.cpp"),)

# Smaller tensors take less time than compiling does.
_LEAST_WEIGHTS = 8192


def is_able(weight: Tensor) -> bool:
    """Whether the function can round a tensor; compiles it if necessary."""
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type == "cpu"
    return (
        not torch.compiler.is_compiling()
        and plain
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and weight.numel() > _LEAST_WEIGHTS
        and _library() is not None
    )


def round_compiled(weight: Tensor, above: Tensor | None, layout: tuple[int, int, int], grid: Grid) -> Tensor:
    """Return the rounded weight, or with a gradient ``above`` of that the gradient of the weight."""
    library = _library()
    if library is None:
        raise RuntimeError("the C++ function is not available; see is_able")
    result = torch.empty_like(weight)
    above = None if above is None else above.to(weight.dtype).contiguous()
    numbers = [ctypes.c_int64(number) for number in layout]
    levels = [ctypes.c_float(number) for number in (grid.low, grid.high, grid.step or 0.0)]
    flags = [ctypes.c_int(flag) for flag in (grid.affine, grid.odd, grid.nonzero, torch.get_num_threads())]
    addresses = [ctypes.c_void_p(None if each is None else each.data_ptr()) for each in (weight, above, result)]
    library.hf_pdecay_round(*addresses, *numbers, *levels, *flags)
    return result


@functools.cache
def _library() -> ctypes.CDLL | None:
    return load(SOURCES, "weight_bits", "rounding")[0]
