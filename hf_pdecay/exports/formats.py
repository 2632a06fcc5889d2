"""The formats in which ``hf-pdecay quantize`` can write a model, and what each of them asks for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checks import check_choice
from ..storage.source import ModelFolder
from .gguf_file import BLOCK, check_gguf, check_matrices, write_gguf
from .packed import PackQuantized, TorchAo, check_linear, write_packed


PLAIN = "plain"
BITS = (8, 4)


@dataclass(frozen=True)
class Coded:
    """The matrices of a model whose weights are codes times scales.

    Args:
        names: Names of their parameters, without wrappers.
        bits: Width of the codes.
        block: Consecutive inputs that share a scale.
    """

    names: Collection[str]
    bits: int
    block: int


@dataclass(frozen=True)
class Format:
    """A format of another runtime.

    Args:
        package: What writing needs, by its name for pip and for Python; None for nothing.
        check_source: Raises ValueError, before the model is loaded, if it cannot be written so.
        check_model: The same of the loaded model, before it is quantised.
        write: Writes the weights into a folder; returns what is left to say, and what the config gets.
        block: The only block that the format has, or None.
        dtype: In what a model is loaded for it, unless asked for.
        scales: The dtype of its scales; None for that of the weights.
    """

    package: str | None
    check_source: Callable[[ModelFolder], None]
    check_model: Callable[[nn.Module, Coded], None]
    write: Callable[[Path, Any, Coded, ModelFolder], tuple[list[str], dict[str, Any]]]
    block: int | None = None
    dtype: str = "auto"
    scales: torch.dtype | None = None


def _any(source: ModelFolder) -> None:
    """Take every model."""


FORMATS = {
    "pack-quantized": Format(None, _any, check_linear, partial(write_packed, PackQuantized)),
    "torchao": Format("torchao", _any, check_linear, partial(write_packed, TorchAo)),
    "gguf": Format("gguf", check_gguf, check_matrices, write_gguf, BLOCK, "float32", torch.float16),
}


def format_of(name: str, bits: float, block: int | None) -> Format | None:
    """Return a format by its name, None for plain weights.

    Raises:
        ValueError: If there is none, it has no codes of that width or block, or what writes it is not installed.
    """
    check_choice("format", name, (PLAIN, *FORMATS))
    if name == PLAIN:
        return None
    found = FORMATS[name]
    if bits not in BITS:
        raise ValueError(f"Invalid bits: bits={bits!r} with format={name!r}, which takes 8 and 4.")
    if found.block is not None and block not in (None, found.block):
        raise ValueError(f"Invalid block: block={block!r} with format={name!r}, whose blocks are of {found.block}.")
    if found.package is not None and find_spec(found.package) is None:
        raise ValueError(f"format={name!r} needs {found.package}, which is not installed: pip install {found.package}")
    return found
