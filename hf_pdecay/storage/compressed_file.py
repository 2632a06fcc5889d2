"""A compressed file, read as the safetensors library reads a plain one: tensors are decoded when they are asked for."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .container import BLOCK, Entry, FormatError, Header, header_of, read_header
from .encoding import HEAD_LIMIT, Blob, Bytes, check, decode, parse
from .manifest import MANIFEST, header_checksum, is_compressed, read_manifest, sha256
from .packed import Packed, read_packed


# 0 switches the comparison of checksums off; everything else is still checked.
CHECKSUMS_VARIABLE = "HF_PDECAY_VERIFY_CHECKSUMS"


def checksums_wanted() -> bool:
    """Whether checksums are compared when a model is loaded or decompressed; ValueError for an invalid variable."""
    value = os.environ.get(CHECKSUMS_VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"Invalid {CHECKSUMS_VARIABLE}: it is {value!r}; it must be 0 or 1.")
    return value == "1"


def memory_limit() -> int:
    """Free bytes of this machine's memory; larger tensors are refused."""
    import psutil  # which comes with accelerate

    return int(psutil.virtual_memory().available)


def _check(header: Header, file: str, stored: Callable[[Entry], Bytes]) -> None:
    """Check a compressed file of weights: manifest, each tensor's block and, if wanted, checksums.

    Takes a few chunks of memory, whatever the file says about its tensors. Raises FormatError if it is damaged or
    forged.
    """
    checksums = checksums_wanted()
    stated, manifest = read_manifest(header, file)
    if checksums and header_checksum(header.raw, stated) != stated:
        raise FormatError(f"{file} is damaged: the checksum of its header differs. Download the model again.")
    for name, entry in header.entries.items():
        data = stored(entry)
        what = f"{name!r} in {file}"
        if checksums and sha256(data) != manifest[name]:
            raise FormatError(f"{what} is damaged: its checksum differs from the manifest's. Download the model again.")
        if entry.dtype == BLOCK:
            check(data, what)
            if len(entry.shape) != 1:
                raise FormatError(f"{what} is damaged or forged: its block is stored in a wrong shape.")


def mapped(file: Path, entry: Entry) -> Bytes:
    """Return the stored bytes of an entry, which are read when they are used."""
    if not entry.size:
        return np.zeros(0, dtype=np.uint8)
    return np.memmap(file, dtype=np.uint8, mode="r", offset=entry.begin, shape=(entry.size,))


class CompressedFile:
    """The tensors of a compressed file, with the methods of ``safetensors.safe_open``.

    Raises FormatError if it is damaged or forged.
    """

    def __init__(self, file: str | os.PathLike[str] | bytes, device: Any = "cpu") -> None:
        self._device = device
        self._data = file if isinstance(file, bytes) else None
        self._file = Path("the file" if isinstance(file, bytes) else file)
        if isinstance(file, bytes):
            self.header = header_of(io.BytesIO(file), len(file), self._file.name)
        else:
            self.header = read_header(self._file)
        _check(self.header, self._file.name, self._stored)

    def __enter__(self) -> CompressedFile:
        """Return the file."""
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: no handle is kept."""

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.keys())

    def keys(self) -> list[str]:
        """Return the names of the tensors, sorted."""
        return sorted(self.header.entries)

    def offset_keys(self) -> list[str]:
        """Return the names of the tensors in the order of their bytes."""
        return list(self.header.entries)

    def metadata(self) -> dict[str, str]:
        """Return the strings of the plain file."""
        return {key: value for key, value in self.header.metadata.items() if key != MANIFEST}

    def get_tensor(self, name: str) -> Any:
        """Return a tensor."""
        import torch

        from .container import DTYPES

        dtype, shape = self.form(name)
        what, kind = f"{name!r} in {self._file.name}", getattr(torch, DTYPES[dtype][1], None)
        if kind is None:  # float8_e8m0fnu came in torch 2.7
            raise FormatError(f"{what} has the dtype {dtype}, which torch {torch.__version__} does not have.")
        entry = self.header.entries[name]
        stored = self._stored(entry)
        if entry.dtype == BLOCK:
            data = decode(stored, memory_limit(), what)[0]
        elif self._data is None:  # without pages of the file in this process's memory
            data = np.fromfile(self._file, dtype=np.uint8, count=entry.size, offset=entry.begin)
        else:
            data = np.array(stored)
        tensor = torch.from_numpy(data).view(kind).reshape(shape) if data.size else torch.empty(shape, dtype=kind)
        return tensor.to(self._device)

    def get_tensors(self, names: Any = None) -> dict[str, Any]:
        """Return some tensors by name, or all."""
        return {name: self.get_tensor(name) for name in (self.keys() if names is None else names)}

    def get_slice(self, name: str) -> CompressedTensor:
        """Return a tensor that is decoded when it is indexed."""
        return CompressedTensor(self, name)

    def get_packed(self, name: str, *, transposed: bool, beyond: int) -> Packed:
        """Return a matrix in bits and values, or its transpose; it must be in a block that is not dense."""
        stored = self._stored(self.header.entries[name])
        return read_packed(stored, memory_limit(), f"{name!r} in {self._file.name}", transposed, beyond)

    def head(self, name: str) -> Blob | None:
        """Return the head of a tensor's block; None if it is stored plainly."""
        entry = self.header.entries[name]
        if entry.dtype != BLOCK:
            return None
        stored = self._stored(entry)
        return parse(stored[:HEAD_LIMIT].tobytes(), entry.size, f"{name!r} in {self._file.name}")

    def form(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return a tensor's dtype, by safetensors' name, and its shape."""
        entry, head = self.header.entries[name], self.head(name)
        return (entry.dtype, entry.shape) if head is None else (head.dtype, head.shape)

    def _stored(self, entry: Entry) -> Bytes:
        if self._data is None:
            return mapped(self._file, entry)
        return np.frombuffer(self._data, dtype=np.uint8, count=entry.size, offset=entry.begin if entry.size else 0)


class CompressedTensor:
    """A tensor of a compressed file, with the methods of the safetensors library's slices."""

    def __init__(self, file: CompressedFile, name: str) -> None:
        self._file, self._name = file, name

    def get_dtype(self) -> str:
        """Return the dtype by safetensors' name."""
        return self._file.form(self._name)[0]

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self._file.form(self._name)[1])

    def __getitem__(self, index: Any) -> Any:
        """Decode the tensor, and return a part of it."""
        tensor = self._file.get_tensor(self._name)
        return tensor if index is Ellipsis else tensor[index]


def is_compressed_file(file: str | os.PathLike[str] | bytes) -> bool:
    """Whether a file, or its bytes, is one of ours. Of other files only the header is read, or nothing."""
    try:
        if isinstance(file, bytes):
            return is_compressed(header_of(io.BytesIO(file), len(file), ""))
        with open(file, "rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            # Most plain files are known without parsing their header.
            if size > os.fstat(handle.fileno()).st_size or b'"hf_pdecay"' not in handle.read(size):
                return False
        return is_compressed(read_header(file))
    except (OSError, FormatError):
        return False
