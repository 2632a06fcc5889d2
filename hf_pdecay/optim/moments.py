"""The dtypes of the moments: that of the weights, float32, bfloat16, or 8 bit as torchao stores them."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

from .distributed import is_dtensor, local


MOMENTS = ("float32", "bfloat16", "8bit")
BLOCK = 256  # elements that share a scale
MIN_QUANTIZED = 4096  # below it 8 bit saves nothing and biases and norms lose precision

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.float32}


def check_moments(moments: object) -> None:
    """Raise a ValueError unless ``moments`` is None or in :data:`MOMENTS`, and an ImportError if torchao is missing."""
    if moments is not None and moments not in MOMENTS:
        raise ValueError(
            f"Invalid moments: moments={moments!r}; it must be one of {', '.join(MOMENTS)}, or None for the dtype of "
            "the weights."
        )
    if moments == "8bit" and "torchao" not in sys.modules and importlib.util.find_spec("torchao") is None:
        raise ImportError("moments='8bit' needs torchao: pip install 'hf-pdecay[8bit]', or take moments='bfloat16'.")
    if moments == "8bit":
        _state_class()  # whose import lets torch.load read checkpoints that hold it


def quantized_bytes(numel: int) -> int:
    """Return the bytes of both moments of a tensor in 8 bit: codes, scales, and a table of 256 values each."""
    if numel < MIN_QUANTIZED or numel % BLOCK:
        return 2 * 4 * numel
    return 2 * (numel + 4 * numel // BLOCK + 4 * 256)


def zero_moment(param: Tensor, moments: str | None, *, signed: bool) -> Tensor:
    """Return a moment of zeros; ``signed`` if it can be negative. A ValueError for 8 bit on a sharded parameter."""
    if moments == "8bit" and is_dtensor(param):
        raise ValueError(
            "Invalid moments: moments='8bit' with sharded weights, which torchao cannot quantise; take 'bfloat16'."
        )
    if moments == "8bit" and can_quantize(param):
        return _state_class().zeros(param.shape, signed=signed, block_size=BLOCK, device=param.device)
    return torch.zeros_like(param, dtype=moment_dtype(param, moments), memory_format=torch.preserve_format)


def moment_dtype(param: Tensor, moments: str | None) -> torch.dtype:
    """Return the dtype of a moment that is not quantised; float64 and complex weights keep their own."""
    if moments is None or param.dtype == torch.float64 or param.is_complex():
        return param.dtype
    return _DTYPES[moments]


def as_stored(moment: Tensor, param: Tensor, moments: str | None, *, signed: bool) -> Tensor:
    """Return a moment of a checkpoint as this setting stores it, on the device of the parameter."""
    if is_quantized(moment) and moments == "8bit":
        return moment.to(param.device)
    if moments == "8bit" and can_quantize(param):
        stored = zero_moment(param, moments, signed=signed)
        stored.copy_(moment.to(param.device, torch.float32))
        return stored
    return dequantize(moment, moment_dtype(param, moments)).to(param.device)


def can_quantize(param: Tensor) -> bool:
    """Whether a parameter's moments can be 8 bit: blocks need a flat, plain tensor of whole blocks."""
    numel = param.numel()
    plain = type(param) in (Tensor, torch.nn.Parameter) and param.is_contiguous()
    plain = plain and param.dtype != torch.float64 and not param.is_complex()
    return plain and numel >= MIN_QUANTIZED and not numel % BLOCK


def is_quantized(moment: Tensor) -> bool:
    """Whether a moment is stored in 8 bit."""
    return type(moment) is not Tensor and type(moment).__name__ == "OptimState8bit"


def refusal_of_encoded(param: Tensor, *moments: Tensor) -> str | None:
    """Return why a step that finds 8-bit moments by address cannot take these two, or None."""
    if param.dtype == torch.float64:
        return "it does not know weights of torch.float64 with 8-bit moments"
    if not all(is_quantized(moment) for moment in moments):
        return "it takes both moments in 8 bits, or neither"
    states: tuple[Any, ...] = moments
    for state in states:
        tensors = state.codes, state.scale, state.qmap
        if [tensor.dtype for tensor in tensors] != [torch.uint8, torch.float32, torch.float32]:
            return f"it does not know 8-bit moments of {', '.join(str(tensor.dtype) for tensor in tensors)}"
        sizes = [param.numel(), param.numel() // BLOCK, 256]
        if [tensor.numel() for tensor in tensors] != sizes or param.numel() % BLOCK:
            return f"it takes 8-bit moments with one scale for {BLOCK} values, and a map of 256 numbers"
        if not all(tensor.is_contiguous() for tensor in tensors):
            return "8-bit moments must lie in memory without gaps"
        if any(tensor.device != param.device for tensor in tensors):
            return f"8-bit moments must be on {param.device}"
    return None


def address(moment: Tensor) -> int:
    """Return a number that identifies where a moment, or this process's shard of it, lies in memory."""
    if type(moment) is Tensor:
        return moment.data_ptr()
    if not is_quantized(moment):
        return local(moment).data_ptr()
    state: Any = moment
    return hash((state.codes.data_ptr(), state.scale.data_ptr(), state.qmap.data_ptr()))


def dequantize(moment: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of a moment as a plain tensor of ``dtype``; also of torchao's 4-bit and float8 moments."""
    if type(moment).__name__ in ("OptimState8bit", "OptimState4bit", "OptimStateFp8"):
        values: Any = moment.dequantize()
        return values.to(dtype)
    return moment.to(dtype)


def clone(moment: Tensor) -> Tensor:
    """Return a copy of a moment; torchao cannot copy 8-bit moments."""
    if not is_quantized(moment):
        return moment.clone()
    state: Any = moment
    return _state_class()(state.codes.clone(), state.scale.clone(), state.qmap.clone(), state.signed)


def slice_quantized(tensor: Tensor, start: int, length: int) -> Tensor:
    """Return a flat slice of a contiguous tensor or 8-bit moment; ``start`` is a multiple of the block."""
    if not is_quantized(tensor):
        return tensor.view(-1).narrow(0, start, length)
    state: Any = tensor
    codes = state.codes.view(-1).narrow(0, start, length)
    scale = state.scale.narrow(0, start // BLOCK, length // BLOCK)
    return _state_class()(codes, scale, state.qmap, state.signed)


def _state_class() -> Any:
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit
