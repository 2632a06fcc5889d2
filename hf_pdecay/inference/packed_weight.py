"""A weight of a linear layer as bits and packed values, as a compressed file has it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..storage.packed import Packed


_ELEMENTS = 1 << 20  # of a block of weights


class PackedWeight:
    """What a sparse layer can hold instead of a dense weight of shape (out_features, in_features).

    Args:
        packed: Bits and values, with zeros after the values.
        stored_as: The dtype of the values.
        dtype: The dtype of the layer, to which they are converted.
    """

    is_cpu, is_cuda = True, False

    def __init__(self, packed: Packed, stored_as: torch.dtype, dtype: torch.dtype) -> None:
        self.shape, self.dtype = packed.shape, dtype
        self.masks = torch.from_numpy(packed.masks)
        self.counts = torch.from_numpy(np.bitwise_count(packed.masks).sum(1, dtype=np.int64))
        self._count = packed.number
        self._values = torch.from_numpy(packed.values).view(stored_as).to(dtype)

    @property
    def values(self) -> Tensor:
        """The values, row by row."""
        return self._values[: self._count]

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that are zero."""
        return 1 - self._count / max(self.numel(), 1)

    @property
    def starts(self) -> Tensor:
        """The index of the first value of each row, of shape (out_features,)."""
        return self.counts.cumsum(0) - self.counts

    def numel(self) -> int:
        """Return the number of weights."""
        return self.shape[0] * self.shape[1]

    def count_nonzero(self) -> int:
        """Return the number of values."""
        return self._count

    def detach(self) -> PackedWeight:
        """Return the weight, which has no gradient."""
        return self

    def as_row(self) -> Tensor:
        """Return the values as a matrix of one row, which shows what the weight holds but not where."""
        return self.values[None]

    def padded_values(self, dtype: torch.dtype, beyond: int) -> Tensor:
        """Return the values in a dtype, with at least some zero bytes beyond them."""
        zeros = beyond // dtype.itemsize
        if dtype == self.dtype and len(self._values) == self._count + zeros:
            return self._values
        values = torch.zeros(self._count + zeros, dtype=dtype)
        values[: self._count] = self.values
        return values

    def columns(self, numbers: Tensor) -> Tensor:
        """Return the column of each value, given the numbers of all columns in the dtype that is wanted."""
        columns, taken = torch.empty(self._count, dtype=numbers.dtype), 0
        for kept in self._kept(max(_ELEMENTS // max(self.shape[1], 1), 1)):
            some = numbers.expand_as(kept)[kept]
            columns[taken : taken + len(some)] = some
            taken += len(some)
        return columns

    def split(self, step: int) -> Iterator[Tensor]:
        """Yield some rows at a time, dense."""
        taken = 0
        for kept in self._kept(step):
            rows = torch.zeros(kept.shape, dtype=self.dtype)
            count = int(kept.sum())
            rows[kept] = self._values[taken : taken + count]
            taken += count
            yield rows

    def _kept(self, step: int) -> Iterator[Tensor]:
        """Which weights have a value, some rows at a time."""
        for masks in self.masks.split(step):
            marks = np.unpackbits(masks.numpy(), axis=1, count=self.shape[1], bitorder="little")
            yield torch.from_numpy(marks.view(np.bool_))
