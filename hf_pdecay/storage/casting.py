"""Rounds a model's floating tensors to a narrower dtype, and its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .container import DTYPES, Entry
from .encoding import Bytes


# By torch's name, that of safetensors.
CASTS = {"bfloat16": "BF16", "float16": "F16"}
FLOATS = ("F64", "F32", "F16", "BF16")


def cast(data: Bytes, name: str, entry: Entry, dtype: str) -> tuple[Bytes, Entry, int]:
    """Round a tensor to a dtype of ``CASTS``; tensors that are not of floats stay as they are.

    Returns the bytes, the entry, and how many values that were not zero have become zero. Zeros stay zeros, with their
    signs. Raises ValueError if a value is too large for the dtype.
    """
    import torch

    if entry.dtype not in FLOATS or entry.dtype == CASTS[dtype]:
        return data, entry, 0
    if not data.size:
        return data, entry._replace(dtype=CASTS[dtype]), 0
    before = torch.from_numpy(data).view(getattr(torch, DTYPES[entry.dtype][1]))
    after = before.to(getattr(torch, dtype))
    beyond = int((before.isfinite() & ~after.isfinite()).sum())
    if beyond:
        other = "; take bfloat16, which has the range of float32" if dtype == "float16" else ""
        raise ValueError(f"Invalid dtype: {name!r} has {beyond} values that are too large for {dtype}{other}.")
    vanished = int(((before != 0) & (after == 0)).sum())
    stored = after.view(torch.uint8).numpy()
    return np.ascontiguousarray(stored), entry._replace(dtype=CASTS[dtype], size=stored.nbytes), vanished


def cast_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config, as it is in a file, of a model that was rounded to a dtype."""
    named = _renamed(config, dtype)
    return named if "dtype" in named or "torch_dtype" in named else named | {"dtype": dtype}


def _renamed(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Set the dtype of a config and of those within it, where they name one."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and isinstance(value, str)
        else (_renamed(value, dtype) if isinstance(value, Mapping) else value)
        for key, value in config.items()
    }
