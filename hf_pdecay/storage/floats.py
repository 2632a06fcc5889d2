"""Bits of floating-point numbers of 32 and 16 bits, by numpy, which does not know bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np


DIGITS = {"F32": 24, "F16": 11, "BF16": 8}
"""Binary digits of a number, for each dtype by safetensors' name."""


def widened(words: Any, dtype: str) -> Any:
    """Return the numbers that some bits stand for, in float32."""
    if dtype == "F16":
        return words.view("<f2").astype(np.float32)
    if dtype == "BF16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return words.view("<f4")


def rounded(numbers: Any, dtype: str) -> Any:
    """Return the bits of numbers in float32, rounded to nearest; ties go to the even one."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return numbers.astype("<f2").view("<u2")
    words = np.ascontiguousarray(numbers, dtype="<f4").view("<u4")
    if dtype == "F32":
        return words
    half = np.uint32(0x7FFF) + (words >> np.uint32(16) & np.uint32(1))
    return ((words + half) >> np.uint32(16)).astype("<u2")


def is_short(numbers: Any) -> bool:
    """Whether numbers in float32 are all numbers of bfloat16 too."""
    return not (np.ascontiguousarray(numbers).view(np.uint32) & np.uint32(0xFFFF)).any()
