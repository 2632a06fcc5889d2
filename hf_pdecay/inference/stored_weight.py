"""A weight that stays in its compressed file until it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..storage.compressed_file import CompressedFile, CompressedTensor
from ..storage.container import DTYPES
from ..storage.encoding import DENSE
from .kernels import FLOATS
from .packed_weight import PackedWeight


_aten = torch.ops.aten


class StoredWeight(Tensor):
    """A weight without memory that knows its place in a compressed file, and a dtype to be converted to.

    Like this it goes through the loading of a model, as a tensor. An operation that computes with it makes it dense,
    once and for all.
    """

    @staticmethod
    def __new__(cls, file: CompressedFile, name: str, dtype: torch.dtype | None = None) -> StoredWeight:
        """Make a tensor without memory."""
        stored_as, shape = file.form(name)
        kind = dtype or getattr(torch, DTYPES[stored_as][1])
        weight: StoredWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=kind, device=torch.device("cpu"))
        return weight

    def __init__(self, file: CompressedFile, name: str, dtype: torch.dtype | None = None) -> None:
        self.file, self.key = file, name
        # The dense weight once it was used, in a list that what `detach` returns shares.
        self.used: list[Tensor] = []

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def packed(self, transposed: bool) -> PackedWeight:
        """Return places and values, or those of the transpose."""
        stored_as = getattr(torch, DTYPES[self.file.form(self.key)[0]][1])
        return PackedWeight(self.file.get_packed(self.key, transposed=transposed), stored_as, self.dtype)

    def release(self) -> None:
        """Give up the memory of what was read; it is read again when it is used."""
        self.file.release(self.key)

    def dense(self) -> Tensor:
        """Return the weight as an ordinary tensor, always the same one."""
        if not self.used:
            self.used.append(self.file.get_tensor(self.key).to(self.dtype))
        return self.used[0]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the dense weight, except for those that loading a weight needs."""
        weight, kwargs = args[0], kwargs or {}
        if isinstance(weight, StoredWeight) and not weight.used:
            if func in (_aten.detach.default, _aten.alias.default):
                same = StoredWeight(weight.file, weight.key, weight.dtype)
                same.used = weight.used
                return same
            if func is _aten._to_copy.default and kwargs.keys() == {"dtype"} and kwargs["dtype"] in FLOATS:
                return StoredWeight(weight.file, weight.key, kwargs["dtype"])
        return func(*tree_map_only(cls, cls.dense, args), **tree_map_only(cls, cls.dense, kwargs))


class SparseFile:
    """A compressed file whose sparse matrices come as a :class:`StoredWeight`; everything else is that of the file.

    Args:
        file: The file.
        least: The fraction of zeros from which on a matrix counts as sparse.
    """

    def __init__(self, file: CompressedFile, least: float) -> None:
        self._file, self._least = file, least

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> SparseFile:
        """Return the file."""
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: no handle is kept."""

    def get_slice(self, name: str) -> CompressedTensor:
        """Return a tensor that is read when it is indexed, or later."""
        return _SparseSlice(self._file, name, self._least)


class _SparseSlice(CompressedTensor):
    def __init__(self, file: CompressedFile, name: str, least: float) -> None:
        super().__init__(file, name)
        self._least = least

    def __getitem__(self, index: Any) -> Any:
        """Return a part of the tensor, or all of it, which may be a :class:`StoredWeight`."""
        head = self._file.head(self._name)
        if (
            index is Ellipsis
            and head is not None
            and head.encoding != DENSE
            and not head.changes
            and len(head.shape) == 2
            and head.numel - head.values >= self._least * head.numel > 0
            and getattr(torch, DTYPES[head.dtype][1], None) in FLOATS
        ):
            return StoredWeight(self._file, self._name)
        return super().__getitem__(index)
