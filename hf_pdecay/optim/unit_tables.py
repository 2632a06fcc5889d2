"""Tables of shrink factors or divisors of units, one for each parameter, from which a fused step decays units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .distributed import common_groups, first_index, local, span_of
from .units import Units


class UnitTables(ABC):
    """The root mean square of each unit of a param group on one device, and tables of divisors or factors.

    The C++ step divides by its tables and the Triton kernel multiplies by them, as each does with single weights, so
    that rows of one weight decay exactly as single weights do. The tables keep their addresses, so a step can be
    repeated while weights and units stay the same. The sums of squares of all processes are added.

    Attributes:
        tables: By the index of a parameter, a divisor (CPU) or a factor (GPU) for each index that this process holds of
            the dimension along which its units lie; 1 for indices outside all units.
    """

    def __init__(
        self, params: Sequence[Tensor], units: Sequence[Units[int]], bases: Mapping[int, Tensor] | None = None
    ) -> None:
        self._dims = {member.param: member.dim for layer in units for member in layer.members}
        self._lengths = {index: params[index].shape[dim] for index, dim in self._dims.items()}
        spans = {index: span_of(params[index]) for index in self._dims}
        self._firsts = {index: first_index(spans[index], dim) for index, dim in self._dims.items()}
        self._weights = {index: local(params[index]) for index in self._dims}
        self._bases = {index: local(base) for index, base in (bases or {}).items()}
        self._process_groups = common_groups(list(spans.values()))
        self.device = next(iter(self._weights.values())).device
        self._whole_tables = {
            index: torch.ones(length, dtype=self._table_dtype(params[index]), device=self.device)
            for index, length in self._lengths.items()
        }
        self.tables = {
            index: table.narrow(0, self._firsts[index], self._weights[index].shape[self._dims[index]])
            for index, table in self._whole_tables.items()
        }

    @staticmethod
    def _table_dtype(param: Tensor) -> torch.dtype:
        return torch.float32

    @staticmethod
    @abstractmethod
    def takes(weights: Tensor) -> bool:
        """Whether the backend can sum the squares of these weights."""

    @abstractmethod
    def norms(self) -> Tensor:
        """Return the root mean square of each unit, in a tensor that the next call overwrites."""

    @abstractmethod
    def fill(self, p_norm: float, alpha_lambda: float | Tensor, dormant: Tensor | None = None) -> None:
        """Fill the tables from the last :meth:`norms`; ``dormant`` marks units that do not decay."""

    @abstractmethod
    def factors(self) -> Tensor:
        """Return the shrink factor of each unit by the last call of :meth:`fill`; 0 for a dead one at p < 2."""
