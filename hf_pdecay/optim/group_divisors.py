"""What coupled groups of weights on a CPU are divided by, computed in C++ into tables that stay where they are.

triton_groups.py does the same on a GPU.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from .compiled import CODES, address, library
from .couplings import Coupled, group_size
from .tensor_step import is_flat, spacing


class GroupDivisors:
    """The root mean square of each group of a param group, and 1 over the factor by which it shrinks.

    Nothing but addresses and numbers is looked at from one step to the next, so it can be used again while weights and
    couplings stay.

    Args:
        params: The parameters of the param group.
        coupled: Its couplings, all of whose parameters :meth:`takes`.

    Attributes:
        tables: For each parameter in a coupling, by its index, the divisor of each index of its dimension: of the
            dtype that its weights are computed in, 1 where there is no group.
        device: Where the weights are.
    """

    def __init__(self, params: Sequence[Tensor], coupled: Sequence[Coupled]) -> None:
        self.device = torch.device("cpu")
        dims = {place.param: place.dim for each in coupled for place in each.places}
        dtypes = {index: torch.promote_types(params[index].dtype, torch.float32) for index in dims}
        shapes = {index: params[index].shape[dim] for index, dim in dims.items()}
        self._sums = {index: torch.empty(length, dtype=dtypes[index]) for index, length in shapes.items()}
        self.tables = {index: torch.ones(length, dtype=dtypes[index]) for index, length in shapes.items()}
        total = sum(each.count for each in coupled)
        self._rms, self._divisors = torch.empty(2, total, dtype=torch.float64)
        self._summed, self._members, self._couplings = array("q"), array("q"), array("q")
        for index, dim in dims.items():
            param, sums = params[index], self._sums[index]
            shape = param.numel(), spacing(param, dim), param.shape[dim]
            self._summed.extend((param.data_ptr(), sums.data_ptr(), *shape, CODES[param.dtype]))
        first = begin = 0
        for each in coupled:
            wide = [dtypes[place.param] == torch.float64 for place in each.places]
            for place, is_wide in zip(each.places, wide, strict=True):
                sums, table = self._sums[place.param], self.tables[place.param]
                self._members.extend((sums.data_ptr(), table.data_ptr(), place.offset, place.size, is_wide))
            weights = group_size(each, params)
            self._couplings.extend((first, len(each.places), begin, each.count, weights, any(wide)))
            first, begin = first + len(each.places), begin + each.count
        self._counts = len(self.tables), len(coupled)
        self._functions = library()

    @staticmethod
    def takes(weights: Tensor) -> bool:
        """Whether the C++ functions can add up the squares of these weights."""
        return weights.is_cpu and weights.dtype in CODES and weights.numel() > 0 and is_flat(weights)

    def norms(self) -> Tensor:
        """Return the root mean square of each group of all couplings, in float64: a tensor that the next call changes.

        Squares are added up in the dtype in which the weights are computed.
        """
        tensors, couplings = self._counts
        threads = torch.get_num_threads()
        if self._functions.hf_pdecay_square_sums(address(self._summed), tensors, threads):
            raise RuntimeError("The compiled sums met a dtype that they do not know.")
        self._functions.hf_pdecay_group_norms(
            address(self._couplings), couplings, address(self._members), self._rms.data_ptr(), threads
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
            self._counts[1],
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
