"""A model's folder that is read, and the folder that is written from it: compressed, plain or smaller."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .container import FormatError, Header
from .folder import check_apart, check_out, copy_along, read_config, read_weights, written_folder
from .hub import local_folder
from .manifest import is_compressed


# The `method` in the config of a model with ragged layers, whose weights are plain.
RAGGED = "hf_pdecay_shrunk"


@dataclass(frozen=True)
class ModelFolder:
    """The folder of a model or an adapter, its config, and the headers of its files of weights."""

    folder: Path
    config: dict[str, Any]
    headers: dict[str, Header]


@dataclass(frozen=True)
class Source(ModelFolder):
    """A :class:`ModelFolder`, and the folder ``out`` that is written from it.

    Raises ValueError if ``out`` cannot be written, or one of the folders lies in the other.
    """

    out: str | os.PathLike[str]
    overwrite: bool

    def __post_init__(self) -> None:
        check_out(self.out, self.overwrite)
        check_apart(self.folder, self.out)

    def check_plain(self, *, ragged: bool = False) -> None:
        """Raise FormatError if the weights are compressed, quantized or, unless ``ragged``, shrunk layer by layer."""
        if any(map(is_compressed, self.headers.values())):
            raise FormatError(
                f"The weights of {str(self.folder)!r} are compressed already; name the plain model, as `hf-pdecay "
                "decompress` writes it."
            )
        self.check_unquantized(ragged=ragged)

    def check_unquantized(self, *, ragged: bool = False) -> None:
        """Raise FormatError if the weights are quantized or, unless ``ragged``, shrunk layer by layer."""
        method = quantization_method(self.config)
        if method is not None and not (ragged and method == RAGGED):
            raise FormatError(
                f"{str(self.folder)!r} has a quantization_config with the method {method!r}: its weights are "
                f"{'shrunk layer by layer' if method == RAGGED else 'quantized'} already; name the plain model, from "
                "which it was made."
            )

    def rewritten(self) -> AbstractContextManager[Path]:
        """Give a folder to write into, which becomes ``out`` if the writing succeeds."""
        return written_folder(self.out, self.overwrite)

    def copy_along(self, aside: Path) -> list[str]:
        """Copy all files but the weights; returns the names of weights in other formats, which are left out."""
        return copy_along(self.folder, aside, self.headers)


def is_ragged(settings: object) -> bool:
    """Whether a ``quantization_config`` is that of a model with ragged layers."""
    return isinstance(settings, Mapping) and settings.get("method") == RAGGED


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Return the ``quant_method`` in a config, or :data:`RAGGED`; None if it has no ``quantization_config``."""
    settings = config.get("quantization_config")
    if settings is None or is_ragged(settings):
        return None if settings is None else RAGGED
    return str(settings.get("quant_method") if isinstance(settings, dict) else settings)


def read_source(model: str | os.PathLike[str], out: str | os.PathLike[str], overwrite: bool) -> Source:
    """Return the folder of a whole model, downloaded if ``model`` is a name on the Hub.

    Raises ValueError if the model does not exist in safetensors, or ``out`` cannot be written.
    """
    check_out(out, overwrite)
    found = read_model(model)
    return Source(found.folder, found.config, found.headers, out, overwrite)


def read_model(model: str | os.PathLike[str]) -> ModelFolder:
    """Return the folder of a whole model, downloaded if ``model`` is a name on the Hub.

    Raises ValueError if the model does not exist in safetensors.
    """
    folder = local_folder(model)
    return ModelFolder(folder, read_config(folder), read_weights(folder))
