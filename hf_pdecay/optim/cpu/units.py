"""What coupled groups of weights on a CPU are divided by, computed in C++ into tables that stay where they are.

triton_groups.py does the same on a GPU.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed import all_sum, common_groups, first_index, is_dtensor, local, span_of
from ..tensor_step import is_flat, spacing
from ..units import Units, unit_size
from .step import CODES, address, library


class UnitDivisors:
    """The root mean square of each group of a param group, and 1 over the factor by which it shrinks.

    Nothing but addresses and numbers is looked at from one step to the next, so it can be used again while weights and
    units stay. Of sharded parameters each process adds up its own weights, and the sums of all are added.

    Args:
        params: The parameters of the param group.
        coupled: Its units, all of whose parameters :meth:`takes`.

    Attributes:
        tables: For each parameter in a coupling, by its index, the divisor of each index of its dimension: of the
            dtype that its weights are computed in, 1 where there is no group; of those indices that this process has.
        device: Where the weights are.
    """

    def __init__(self, params: Sequence[Tensor], coupled: Sequence[Units[int]]) -> None:
        self.device = torch.device("cpu")
        dims = {place.param: place.dim for each in coupled for place in each.members}
        dtypes = {index: torch.promote_types(params[index].dtype, torch.float32) for index in dims}
        lengths = {index: params[index].shape[dim] for index, dim in dims.items()}
        spans = {index: span_of(params[index]) for index in dims}
        self._groups = common_groups(list(spans.values()))
        self._flat = {
            dtype: torch.zeros(sum(length for index, length in lengths.items() if dtypes[index] == dtype), dtype=dtype)
            for dtype in set(dtypes.values())
        }
        left = dict(self._flat)
        sums, tables = {}, {}
        self.tables = {}
        for index, length in lengths.items():
            dtype = dtypes[index]
            sums[index], left[dtype] = left[dtype].split((length, len(left[dtype]) - length))
            tables[index] = torch.ones(length, dtype=dtype)
            first, here = first_index(spans[index], dims[index]), local(params[index]).shape[dims[index]]
            self.tables[index] = tables[index].narrow(0, first, here)
        self._kept = tables
        total = sum(each.count for each in coupled)
        self._rms, self._divisors = torch.empty(2, total, dtype=torch.float64)
        self._rows = 0
        self._summed, self._members, self._couplings = array("q"), array("q"), array("q")
        for index, dim in dims.items():
            param = local(params[index])
            if param.numel():
                shape = param.numel(), spacing(param, dim), param.shape[dim]
                first = sums[index][first_index(spans[index], dim) :].data_ptr()
                self._summed.extend((param.data_ptr(), first, *shape, CODES[param.dtype]))
                self._rows += 1
        first = begin = 0
        for each in coupled:
            wide = [dtypes[place.param] == torch.float64 for place in each.members]
            for place, is_wide in zip(each.members, wide, strict=True):
                addresses = sums[place.param].data_ptr(), tables[place.param].data_ptr()
                self._members.extend((*addresses, place.offset, place.size, is_wide))
            weights = unit_size(each, params)
            self._couplings.extend((first, len(each.members), begin, each.count, weights, any(wide)))
            first, begin = first + len(each.members), begin + each.count
        self._count = len(coupled)
        self._functions = library()

    @staticmethod
    def takes(weights: Tensor) -> bool:
        """Whether the C++ functions can add up the squares of these weights."""
        if is_dtensor(weights):
            weights = local(weights)
            return weights.is_cpu and weights.dtype in CODES and weights.is_contiguous()
        return weights.is_cpu and weights.dtype in CODES and weights.numel() > 0 and is_flat(weights)

    def norms(self) -> Tensor:
        """Return the root mean square of each group of all units, in float64: a tensor that the next call changes.

        Squares are added up in the dtype in which the weights are computed.
        """
        threads = torch.get_num_threads()
        for each in self._flat.values() if self._groups else ():
            each.zero_()
        if self._functions.hf_pdecay_square_sums(address(self._summed), self._rows, threads):
            raise RuntimeError("The compiled sums met a dtype that they do not know.")
        for each in self._flat.values() if self._groups else ():
            all_sum(each, self._groups)
        self._functions.hf_pdecay_group_norms(
            address(self._couplings), self._count, address(self._members), self._rms.data_ptr(), threads
        )
        return self._rms

    def fill(self, p_norm: float, alpha_lambda: float | Tensor, dormant: Tensor | None = None) -> None:
        """Fill the tables by the norms of the last call of :meth:`norms`.

        Args:
            p_norm: p.
            alpha_lambda: α λ_p.
            dormant: Groups that are divided by 1, a bool tensor.
        """
        self._functions.hf_pdecay_group_divisors(
            address(self._couplings),
            self._count,
            address(self._members),
            self._rms.data_ptr(),
            None if dormant is None else dormant.data_ptr(),
            self._divisors.data_ptr(),
            p_norm,
            float(alpha_lambda),
            torch.get_num_threads(),
        )

    def factors(self) -> Tensor:
        """Return the factor of each group, in float64, by the last call of :meth:`fill`; 0 for a dead one at p < 2."""
        return self._divisors.reciprocal()
