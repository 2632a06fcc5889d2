"""The tensors of a model's folder as plain bytes, whether its files are plain, compressed or a delta."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .container import Entry, FormatError, Header
from .folder import read_weights
from .hub import local_folder
from .manifest import Base, is_compressed, sha256
from .zstd_planes import Bytes


if TYPE_CHECKING:
    from .compressed_file import CompressedFile

BASE_VARIABLE = "HF_PDECAY_BASE"
"""The environment variable that names the base of deltas, if it is not where they say."""

_DEEPEST = 16  # deltas on deltas


class ModelTensors:
    """The tensors of a model's folder by name, read when they are asked for.

    Args:
        folder: A folder of a model in safetensors, plain or compressed, or of a delta.
        depth: How many deltas lead to it.

    Attributes:
        headers: The headers of its files of weights.
        forms: The dtype of each tensor, by safetensors' name, and its shape, in the order of the files.

    Raises:
        FormatError: If a file is damaged or forged, or too many deltas stand on each other.
    """

    def __init__(self, folder: Path, depth: int = 0) -> None:
        from .compressed_file import CompressedFile  # which reads the base of a delta by this module

        if depth > _DEEPEST:
            raise FormatError(f"{str(folder)!r} is the base of more than {_DEEPEST} deltas on each other.")
        self.folder = folder
        self.forms: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._readers: dict[str, Callable[[], Bytes]] = {}
        self._by_rest: dict[str, list[str]] | None = None  # names without their first part
        self.headers: dict[str, Header] = read_weights(folder)
        for name, header in self.headers.items():
            if is_compressed(header):
                file = CompressedFile(folder / name, in_place=False, depth=depth)
                for tensor in file.keys():  # noqa: SIM118
                    self.forms[tensor] = file.form(tensor)
                    self._readers[tensor] = _reader_of(file, tensor)
            else:
                for tensor, entry in header.entries.items():
                    self.forms[tensor] = entry.dtype, entry.shape
                    self._readers[tensor] = _plain_reader(folder / name, entry)

    def read(self, name: str) -> Bytes:
        """Return the little-endian bytes of a tensor, which may be written to."""
        return self._readers[name]()

    def own_name(self, name: str) -> str | None:
        """Return the name that a tensor of another folder has here; None if there is none.

        The files of a model without its head have names that lack the first part of those of the whole model:
        ``h.0.attn.weight`` for ``transformer.h.0.attn.weight``.
        """
        if name in self.forms:
            return name
        shorter = name.partition(".")[2]
        if "." in shorter and shorter in self.forms:
            return shorter
        if self._by_rest is None:
            self._by_rest = {}
            for own in self.forms:
                self._by_rest.setdefault(own.partition(".")[2], []).append(own)
        longer = self._by_rest.get(name, []) if "." in name else []
        return longer[0] if len(longer) == 1 else None

    def like(self, name: str, form: tuple[str, tuple[int, ...]]) -> str | None:
        """Return :meth:`own_name` if the tensor has the same dtype and shape here; else None."""
        own = self.own_name(name)
        return own if own is not None and self.forms[own] == form else None


class BaseTensors:
    """The tensors of a delta's base, which is looked for when the first of them is needed.

    Args:
        base: What the delta says of it.
        near: The folder of the delta; None if it is not in one.
        folder: The folder of the base, if it is known; None looks for it.
        depth: How many deltas lead to it.
    """

    def __init__(self, base: Base, near: Path | None, folder: Path | None, depth: int) -> None:
        self._base, self._near, self._folder, self._depth = base, near, folder, depth
        self._tensors: ModelTensors | None = None
        self._compared: set[str] = set()

    def read(self, name: str, dtype: str, shape: tuple[int, ...], limit: int) -> Bytes:
        """Return the bytes of a tensor of the base, which may be written to.

        Raises:
            FormatError: If the base has no such tensor of this dtype and shape, or it is not the one that the delta was
                made from, by its checksum, or it has more than ``limit`` bytes.
            ValueError: If the base is not found.
        """
        from .compressed_file import checksums_wanted

        if self._tensors is None:
            folder = find_base(self._base, self._near) if self._folder is None else self._folder
            self._tensors = ModelTensors(folder, self._depth)
        where = f"The base of the delta in {str(self._tensors.folder)!r}"
        own = self._tensors.own_name(name)
        found = None if own is None else self._tensors.forms[own]
        if own is None or found != (dtype, shape):
            there = "nothing of that name" if found is None else f"{found[0]} of shape {list(found[1])}"
            raise FormatError(f"{where} has {there} where the delta changes {name!r}, {dtype} of shape {list(shape)}.")
        data = self._tensors.read(own)
        if data.nbytes > limit:
            raise FormatError(f"{where} has {data.nbytes} bytes in {name!r}; at most {limit} bytes are possible.")
        if name not in self._compared and checksums_wanted():
            if sha256(data.data) != self._base.sha256[name]:
                raise FormatError(
                    f"{where} has changed since the delta was made from it, or is another model: the checksum of "
                    f"{name!r} differs. Put the right model there, or name it by `hf-pdecay apply BASE DELTA OUT`."
                )
            self._compared.add(name)
        return data


def find_base(base: Base, near: Path | None) -> Path:
    """Return the folder of a delta's base.

    It is the folder that the delta names, from its own or absolute; else the one in :data:`BASE_VARIABLE`; else a model
    on the Hub, of the revision that the delta names.

    Raises:
        ValueError: If there is none.
    """
    for folder in (*(() if near is None else (near / base.name,)), Path(base.name)):
        if folder.is_dir():
            return folder
    given = os.environ.get(BASE_VARIABLE)
    if given:
        return local_folder(given)
    try:
        return local_folder(base.name, base.revision)
    except ValueError as error:
        raise ValueError(
            f"The base {base.name!r} of a delta is not found. Name its folder in the environment variable "
            f"{BASE_VARIABLE}, or use `hf-pdecay apply BASE DELTA OUT`. ({error})"
        ) from error


def _reader_of(file: CompressedFile, name: str) -> Callable[[], Bytes]:
    """What reads a tensor of a compressed file."""

    def read() -> Bytes:
        data = file.plain(name)
        return data if data.flags.writeable else data.copy()

    return read


def _plain_reader(file: Path, entry: Entry) -> Callable[[], Bytes]:
    """What reads a tensor of a plain file."""

    def read() -> Bytes:
        data = np.fromfile(file, dtype=np.uint8, count=entry.size, offset=entry.begin)
        if data.nbytes != entry.size:
            raise FormatError(f"{file.name} became shorter while it was read.")
        return data

    return read
