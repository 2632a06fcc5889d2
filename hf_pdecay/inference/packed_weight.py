"""A weight of a linear layer as places and packed values, as a compressed file has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..storage.packed import PackedBlock


class PackedWeight:
    """What a sparse layer can hold instead of a dense weight of shape (out_features, in_features).

    Args:
        block: Places and values.
        stored_as: The dtype of the values.
        dtype: The dtype of the layer, to which they are converted.
    """

    is_cpu, is_cuda = True, False

    def __init__(self, block: PackedBlock, stored_as: torch.dtype, dtype: torch.dtype) -> None:
        self.shape, self.dtype = block.shape, dtype
        self._block, self._stored_as = block, stored_as

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that are zero."""
        return 1 - self._block.number / max(self.numel(), 1)

    def numel(self) -> int:
        """Return the number of weights."""
        return self.shape[0] * self.shape[1]

    def count_nonzero(self) -> int:
        """Return the number of values."""
        return self._block.number

    def detach(self) -> PackedWeight:
        """Return the weight, which has no gradient."""
        return self

    def as_row(self) -> Tensor:
        """Return the values as a matrix of one row, which shows what the weight holds but not where."""
        return self._tensor(self._block.values)[None]

    def masks(self, dtype: torch.dtype, beyond: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return bits of shape (out_features, 8 * words), the index of each row's first value, and the values.

        After the values, in a dtype, come some more bytes of any content.
        """
        masks, values, count = self._block.packed(beyond)
        counts = np.bitwise_count(masks.view(np.uint64)).sum(1, dtype=np.int64)
        held = self._tensor(values)
        if held.dtype != self._stored_as or dtype != held.dtype:
            held = torch.cat([held[:count].to(dtype), torch.zeros(beyond // dtype.itemsize, dtype=dtype)])
        return torch.from_numpy(masks), torch.from_numpy(np.cumsum(counts) - counts), held

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the index of each row's first value, with their number at the end, the values' columns, and them.

        Columns have 16 bits, or 32 if there are more than 65,536 of them, and no sign.
        """
        starts, columns, values = self._block.rows()
        signed = columns.view(np.int16 if columns.itemsize == 2 else np.int32)
        return torch.from_numpy(starts), torch.from_numpy(signed), self._tensor(values)

    def codes(self) -> tuple[Tensor, Tensor, int] | None:
        """Return the codes of shape (out_features, in_features), scales of shape (out_features, blocks), and a block.

        None if the file has none, or the weight is converted to another dtype.
        """
        found = None if self._stored_as != self.dtype else self._block.codes()
        return None if found is None else (torch.from_numpy(found[0]), torch.from_numpy(found[1]), found[2])

    def split(self, step: int) -> Iterator[Tensor]:
        """Yield some rows at a time, dense."""
        every, starts, values = self.masks(self.dtype, 0)
        for first in range(0, len(every), step):
            masks = every[first : first + step].numpy()
            marks = np.unpackbits(masks, axis=1, count=self.shape[1], bitorder="little")
            kept = torch.from_numpy(marks.view(np.bool_))
            rows = torch.zeros(kept.shape, dtype=self.dtype)
            begin = int(starts[first])
            rows[kept] = values[begin : begin + int(kept.sum())]
            yield rows

    def _tensor(self, values: Any) -> Tensor:
        return torch.from_numpy(values).view(self._stored_as).to(self.dtype)
