"""Weights that are whole codes times the scale of a block of consecutive inputs: their codes, found again."""

from __future__ import annotations

import torch
from torch import Tensor


_DIGITS = 24  # of a number in float32 and narrower
_ROOM = 62  # bits of a whole number


def code_range(bits: float) -> tuple[int, int]:
    """Return the lowest and the highest code: two's complement, and -1 to 1 for 1.58 bits."""
    return (-1, 1) if bits == 1.58 else (-(1 << (int(bits) - 1)), (1 << (int(bits) - 1)) - 1)


def in_blocks(matrix: Tensor, block: int) -> Tensor:
    """Return a matrix of shape (..., inputs) as (..., blocks, block), with zeros after the last input."""
    rest = -matrix.shape[-1] % block
    return torch.nn.functional.pad(matrix, (0, rest)).unflatten(-1, (-1, block))


def find_codes(weight: Tensor, bits: float, block: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales whose products are exactly the weights, as those that ``hf-pdecay quantize`` writes.

    The scale of a block is the greatest common divisor of its weights, so its codes are the smallest. It is negative if
    only so the codes fit. A block of zeros has the scale 1.

    Args:
        weight: Of shape (..., inputs), in float32, bfloat16 or float16.
        bits: Width of the codes.
        block: Consecutive inputs that share a scale.

    Returns:
        Codes in int8 of the shape of ``weight``, and scales in float32 of shape (..., blocks).

    Raises:
        ValueError: If some block has no such scale.
    """
    mantissa, exponent = torch.frexp(in_blocks(weight.float(), block))
    whole = (mantissa * 2**_DIGITS).long()
    none = whole == 0
    lowest = exponent.masked_fill(none, torch.iinfo(torch.int32).max).amin(-1, keepdim=True)
    shift = (exponent - lowest).masked_fill_(none, 0)
    if bool((shift > _ROOM - _DIGITS).any()) or not bool(weight.isfinite().all()):
        raise ValueError(f"Invalid weight: it has no codes of {bits:g} bits in blocks of {block}.")
    whole <<= shift.long()
    divisor = whole
    while divisor.shape[-1] > 1:
        divisor = torch.nn.functional.pad(divisor, (0, divisor.shape[-1] % 2))
        divisor = torch.gcd(*divisor.chunk(2, -1))
    divisor = divisor.abs()
    empty = divisor == 0
    codes = whole // divisor.masked_fill(empty, 1)
    low, high = code_range(bits)
    flip = torch.where(codes.amax(-1, keepdim=True) > high, -1, 1)
    codes = codes * flip
    if bool((codes < low).any()) or bool((codes > high).any()):
        raise ValueError(f"Invalid weight: it has no codes of {bits:g} bits in blocks of {block}.")
    scales = torch.ldexp((divisor * flip).double(), (lowest - _DIGITS).masked_fill(empty, 0)).masked_fill_(empty, 1)
    return codes.flatten(-2)[..., : weight.shape[-1]].to(torch.int8), scales.squeeze(-1).float()
