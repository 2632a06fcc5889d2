"""Divisors of units on a CPU, computed in C++."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..distributed import all_sum, is_dtensor, local
from ..tensor_step import is_flat, spacing
from ..unit_tables import UnitTables
from ..units import Units, unit_size
from .step import CODES, address, library


_COLUMNS = 7  # numbers in a row of a tensor whose squares are summed


class UnitDivisors(UnitTables):
    """The divisors that the C++ step takes, in the dtype of its computation."""

    def __init__(
        self, params: Sequence[Tensor], units: Sequence[Units[int]], bases: Mapping[int, Tensor] | None = None
    ) -> None:
        super().__init__(params, units, bases)
        tables = self._whole_tables
        self._sums = {
            dtype: torch.zeros(sum(len(table) for table in tables.values() if table.dtype == dtype), dtype=dtype)
            for dtype in {table.dtype for table in tables.values()}
        }
        rest = dict(self._sums)
        sums = {}
        for index, table in tables.items():
            sums[index], rest[table.dtype] = rest[table.dtype].split((len(table), len(rest[table.dtype]) - len(table)))
        total = sum(layer.count for layer in units)
        self._rms, self._divisors = torch.empty(2, total, dtype=torch.float64)
        self._summed, self._members, self._layers = array("q"), array("q"), array("q")
        for index, dim in self._dims.items():
            weights = self._weights[index]
            if weights.numel():
                shape = weights.numel(), spacing(weights, dim), weights.shape[dim]
                first = sums[index][self._firsts[index] :].data_ptr()
                base = self._bases[index].data_ptr() if index in self._bases else 0
                self._summed.extend((weights.data_ptr(), first, *shape, CODES[weights.dtype], base))
        first = begin = 0
        for layer in units:
            wide = [tables[member.param].dtype == torch.float64 for member in layer.members]
            for member, is_wide in zip(layer.members, wide, strict=True):
                addresses = sums[member.param].data_ptr(), tables[member.param].data_ptr()
                self._members.extend((*addresses, member.offset, member.size, is_wide))
            size = unit_size(layer, params)
            self._layers.extend((first, len(layer.members), begin, layer.count, size, any(wide)))
            first, begin = first + len(layer.members), begin + layer.count
        self._count = len(units)
        self._functions = library()

    @staticmethod
    def _table_dtype(param: Tensor) -> torch.dtype:
        return torch.promote_types(param.dtype, torch.float32)

    @staticmethod
    def takes(weights: Tensor) -> bool:
        """Whether the C++ functions can sum the squares of these weights."""
        if is_dtensor(weights):
            weights = local(weights)
            return weights.is_cpu and weights.dtype in CODES and weights.is_contiguous()
        return weights.is_cpu and weights.dtype in CODES and weights.numel() > 0 and is_flat(weights)

    def norms(self) -> Tensor:
        """Return the root mean squares in float64, from squares summed in the dtype of the step's computation."""
        threads = torch.get_num_threads()
        if self._process_groups:
            for sums in self._sums.values():
                sums.zero_()
        if self._functions.hf_pdecay_square_sums(address(self._summed), len(self._summed) // _COLUMNS, threads):
            raise RuntimeError("The compiled sums met a dtype that they do not know.")
        for sums in self._sums.values() if self._process_groups else ():
            all_sum(sums, self._process_groups)
        units = address(self._layers), self._count, address(self._members)
        self._functions.hf_pdecay_unit_norms(*units, self._rms.data_ptr(), threads)
        return self._rms

    def fill(self, p_norm: float, alpha_lambda: float | Tensor, dormant: Tensor | None = None) -> None:
        """Fill the tables with divisors."""
        units = address(self._layers), self._count, address(self._members), self._rms.data_ptr()
        results = None if dormant is None else dormant.data_ptr(), self._divisors.data_ptr()
        self._functions.hf_pdecay_unit_divisors(*units, *results, p_norm, float(alpha_lambda), torch.get_num_threads())

    def factors(self) -> Tensor:
        """Return the factors in float64."""
        return self._divisors.reciprocal()
