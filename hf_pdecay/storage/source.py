"""A model's folder that is read, and the folder that is written from it: compressed, plain or smaller."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .container import FormatError, Header
from .folder import check_apart, check_out, copy_along, read_config, read_weights, written_folder
from .hub import local_folder
from .manifest import METHOD


@dataclass(frozen=True)
class Source:
    """The folder of a model or an adapter, from which another folder is written.

    Attributes:
        folder: The folder that is read.
        config: Its config.
        headers: Headers of its files of weights, by name.
        out: The folder to write.
        overwrite: Whether ``out`` may be replaced if it is a model's folder.

    Raises:
        ValueError: If ``out`` cannot be written, or one of the folders lies in the other.
    """

    folder: Path
    config: dict[str, Any]
    headers: dict[str, Header]
    out: str | os.PathLike[str]
    overwrite: bool

    def __post_init__(self) -> None:
        check_out(self.out, self.overwrite)
        check_apart(self.folder, self.out)

    def check_plain(self) -> None:
        """Raise FormatError if the weights are compressed, quantized or shrunk layer by layer."""
        settings = self.config.get("quantization_config")
        if settings is None:
            return
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        how = "as `hf-pdecay decompress` writes it" if method == METHOD else "from which it was made"
        raise FormatError(
            f"{str(self.folder)!r} has a quantization_config with quant_method {method!r}: its weights are "
            f"{'compressed' if method == METHOD else 'quantized or shrunk'} already; name the plain model, {how}."
        )

    @contextmanager
    def rewritten(self) -> Iterator[Path]:
        """Give a folder to write into, which becomes ``out`` if the writing succeeds."""
        with written_folder(self.out, self.overwrite) as aside:
            yield aside

    def copy_along(self, aside: Path) -> list[str]:
        """Copy all files but the weights; returns the names of weights in other formats, which are left out."""
        return copy_along(self.folder, aside, self.headers)


def read_source(model: str | os.PathLike[str], out: str | os.PathLike[str], overwrite: bool) -> Source:
    """Return the folder of a whole model, which is downloaded if ``model`` is a name on the Hub.

    Raises:
        ValueError: If the model does not exist in safetensors, or ``out`` cannot be written.
    """
    check_out(out, overwrite)
    folder = local_folder(model)
    return Source(folder, read_config(folder), read_weights(folder), out, overwrite)
