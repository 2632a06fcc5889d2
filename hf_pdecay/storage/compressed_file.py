"""A compressed file, read as the safetensors library reads a plain one: tensors are decoded when they are asked for."""

from __future__ import annotations

import copy
import io
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from .bits import indices_of
from .container import BLOCK, FormatError, header_of, read_header
from .encoding import HEAD_LIMIT, Blob, Bytes, decode, opened, parse, values_of
from .manifest import MANIFEST, header_checksum, is_compressed, read_manifest, sha256
from .model_tensors import BaseTensors
from .packed import PackedBlock, packed_bytes


# 0 switches the comparison of checksums off; everything else is still checked.
CHECKSUMS_VARIABLE = "HF_PDECAY_VERIFY_CHECKSUMS"

_SMALL = 1 << 26  # bytes


def checksums_wanted() -> bool:
    """Whether checksums are compared when a model is loaded or decompressed; ValueError for an invalid variable."""
    value = os.environ.get(CHECKSUMS_VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"Invalid {CHECKSUMS_VARIABLE}: it is {value!r}; it must be 0 or 1.")
    return value == "1"


def memory_limit(size: int) -> int:
    """Free bytes of this machine's memory, for a tensor of some bytes; larger tensors are refused.

    A small one always fits; looking takes half a millisecond.
    """
    if size <= _SMALL:
        return _SMALL
    import psutil  # which comes with accelerate

    return int(psutil.virtual_memory().available)


class CompressedFile:
    """The tensors of a compressed file, with the methods of ``safetensors.safe_open``.

    The header, the manifest and the heads of blocks are checked at once; a tensor, and its checksum, when it is first
    used. Tensors that are stored plainly share the pages of the file, as those of safetensors do: copy-on-write.

    The tensors of a delta's file are those of its base with the changes that the file holds.

    Args:
        file: The file, or its bytes.
        device: The device for tensors.
        base_folder: The folder of a delta's base; by default it is looked for as the manifest says, if it is needed.
        depth: How many deltas lead to this file.
        in_place: Whether plain tensors may share the file's pages. They are copied on Windows, which would reserve
            memory for the whole file.

    Raises:
        FormatError: If the file is damaged or forged.
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | bytes,
        device: Any = "cpu",
        *,
        in_place: bool = sys.platform != "win32",
        base_folder: Path | None = None,
        depth: int = 0,
    ) -> None:
        self._device, self._in_place = device, in_place and not isinstance(file, bytes)
        self._data = file if isinstance(file, bytes) else None
        self._file = Path("the file" if isinstance(file, bytes) else file)
        self._mapping: mmap.mmap | None = None
        self._mapped = Lock()
        if isinstance(file, bytes):
            self.header = header_of(io.BytesIO(file), len(file), self._file.name)
        else:
            self.header = read_header(self._file)
        self._length = max((entry.begin + entry.size for entry in self.header.entries.values()), default=0)
        checksum, stated, self.base = read_manifest(self.header, self._file.name)
        near = None if isinstance(file, bytes) else self._file.parent
        self._base_tensors = None if self.base is None else BaseTensors(self.base, near, base_folder, depth + 1)
        # The checksums that were not compared yet, each with a lock for the one who does.
        self._stated: dict[str, str] = {}
        if checksums_wanted():
            if header_checksum(self.header.raw, checksum) != checksum:
                raise FormatError(
                    f"{self._file.name} is damaged: the checksum of its header differs. Download the model again."
                )
            self._stated = stated
        self._locks = {name: Lock() for name in self._stated}
        self._heads = {name: self._head(name) for name, entry in self.header.entries.items() if entry.dtype == BLOCK}
        self._mapping = None
        changed = {name for name, head in self._heads.items() if head.changes}
        if changed != (set() if self.base is None else self.base.sha256.keys()):
            raise FormatError(f"{self._file.name} is damaged or forged: its manifest names a base for other tensors.")

    def again(self) -> CompressedFile:
        """Return the file with pages of its own, which knows what has been checked already."""
        other = copy.copy(self)
        other._mapping, other._mapped = None, Lock()
        return other

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
        data = self.plain(name)
        if name in self._heads:
            self.release(name)
        elif not self._in_place or data.size and data.ctypes.data % kind.itemsize:
            data = data.copy()
            self.release(name)
        tensor = torch.from_numpy(data).view(kind).reshape(shape) if data.size else torch.empty(shape, dtype=kind)
        return tensor.to(self._device)

    def plain(self, name: str) -> Bytes:
        """Return the bytes of a tensor, decoded; those of one that is stored plainly are read when they are used."""
        data, head = self.stored(name), self.head(name)
        if head is None:
            return data
        what, limit = f"{name!r} in {self._file.name}", memory_limit(head.dense)
        if not head.changes or self._base_tensors is None:
            return decode(data, limit, what)[0]
        return decode(data, limit, what, self._base_tensors.read(name, head.dtype, head.shape, limit))[0]

    def changes(self, name: str) -> tuple[Any, Any]:
        """Return the places and the new values of a tensor that a delta changes.

        Places are int64 in row-major order, ascending, and values unsigned integers with the bits of the tensor's.
        """
        what = f"{name!r} in {self._file.name}"
        head, payload = opened(self.stored(name), what, memory_limit(self._heads[name].dense))
        return indices_of(head.width, payload[: head.places], head.numel), values_of(head, payload)

    def get_tensors(self, names: Any = None) -> dict[str, Any]:
        """Return some tensors by name, or all."""
        return {name: self.get_tensor(name) for name in (self.keys() if names is None else names)}

    def get_slice(self, name: str) -> CompressedTensor:
        """Return a tensor that is decoded when it is indexed."""
        return CompressedTensor(self, name)

    def get_packed(self, name: str, *, transposed: bool) -> PackedBlock:
        """Return a matrix as bits or columns and values, or its transpose; it must be in a block that is not dense."""
        self.compare(name)
        entry = self.header.entries[name]
        what = f"{name!r} in {self._file.name}"
        size = packed_bytes(self._heads[name], transposed)
        if size > (limit := memory_limit(size)):
            raise FormatError(f"{what} needs {size} bytes; at most {limit} bytes are possible.")
        return PackedBlock(self._bytes()[entry.begin :], entry.size, what, transposed)

    def head(self, name: str) -> Blob | None:
        """Return the head of a tensor's block; None if it is stored plainly."""
        return self._heads.get(name)

    def form(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return a tensor's dtype, by safetensors' name, and its shape."""
        entry, head = self.header.entries[name], self.head(name)
        return (entry.dtype, entry.shape) if head is None else (head.dtype, head.shape)

    def stored(self, name: str) -> Bytes:
        """Return the stored bytes of a tensor, whose checksum is right; they are read when they are used."""
        self.compare(name)
        return self._stored(name)

    def compare(self, name: str) -> None:
        """Compare the checksum of a tensor's stored bytes, once; raise FormatError if it differs."""
        lock = self._locks.get(name)
        if lock is None:
            return
        with lock:
            if name in self._stated:
                if sha256(self._stored(name)) != self._stated[name]:
                    raise FormatError(
                        f"{name!r} in {self._file.name} is damaged: its checksum differs from the manifest's. Download "
                        "the model again."
                    )
                del self._stated[name]

    def release(self, name: str) -> None:
        """Give up the memory of a tensor's stored bytes; from the file they are read again when they are used."""
        mapping, entry = self._mapping, self.header.entries[name]
        first = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (entry.begin + entry.size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if mapping is not None and length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED, first, length)

    def _head(self, name: str) -> Blob:
        entry, what = self.header.entries[name], f"{name!r} in {self._file.name}"
        head = parse(self._stored(name)[:HEAD_LIMIT].tobytes(), entry.size, what)
        if len(entry.shape) != 1:
            raise FormatError(f"{what} is damaged or forged: its block is stored in a wrong shape.")
        return head

    def _stored(self, name: str) -> Bytes:
        entry = self.header.entries[name]
        return self._bytes()[entry.begin : entry.begin + entry.size]

    def _bytes(self) -> Bytes:
        """The bytes of the file, mapped once for all tensors that use it: a mapping takes a file handle."""
        if self._data is not None:
            return np.frombuffer(self._data, dtype=np.uint8)
        with self._mapped:
            if self._mapping is None:
                access = mmap.ACCESS_COPY if self._in_place else mmap.ACCESS_READ
                with open(self._file, "rb") as file:
                    self._mapping = mmap.mmap(file.fileno(), self._length, access=access)
        return np.frombuffer(self._mapping, dtype=np.uint8)


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
