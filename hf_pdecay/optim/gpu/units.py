"""What coupled groups of weights on a GPU are multiplied by, computed in a few launches into tables that stay there.

What group_divisors.py does on a CPU: sums of squares, root mean squares, factors. The step multiplies by the tables.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..distributed import all_sum, common_groups, first_index, is_dtensor, local, span_of
from ..tensor_step import is_flat, smallest, spacing
from ..units import Units, unit_size
from .kernels import COLUMNS, factor_of, float64_of, load_block, row_of
from .step import ALIGNMENT, BLOCK, DEVICES, OPTIONS, TYPES, bits, guard, table_of


_COLUMNS_OF_A_PROGRAM = 128
_ROWS_OF_A_TILE = 16
_GROUPS = 128  # of one coupling, that a program works on
_LONG = 32  # from so many neighbours on that belong to one index these are summed by a program of their own


class UnitFactors:
    """The root mean square of each group of a param group, and the factor by which it shrinks.

    Nothing but addresses and numbers is looked at from one step to the next, so it can be used again while weights and
    units stay. The host never waits. Of sharded parameters each process adds up its own weights, and the sums of
    all are added.

    Args:
        params: The parameters of the param group.
        coupled: Its units, all of whose parameters :meth:`takes`, on one device.

    Attributes:
        tables: For each parameter in a coupling, by its index, the factor of each index of its dimension that this
            process has, in float32; 1 where there is no group.
        device: Where the weights are.
    """

    def __init__(self, params: Sequence[Tensor], coupled: Sequence[Units[int]]) -> None:
        dims = {place.param: place.dim for each in coupled for place in each.members}
        self.device = device = params[next(iter(dims))].device
        spans = {index: span_of(params[index]) for index in dims}
        weights = {index: local(params[index]) for index in dims}
        self._groups = common_groups(list(spans.values()))
        self._kept = {index: torch.ones(params[index].shape[dim], device=device) for index, dim in dims.items()}
        self.tables = {
            index: self._kept[index].narrow(0, first_index(spans[index], dim), weights[index].shape[dim])
            for index, dim in dims.items()
        }
        self._launches: list[tuple[array[int], int, dict[str, object]]] = []
        parts = {}  # sums that one index of a parameter has
        kinds: dict[tuple[torch.dtype, bool], list[int]] = {}
        for index, dim in dims.items():
            inner = spacing(weights[index], dim)
            long = inner >= _LONG
            parts[index] = 1 if long else inner
            kinds.setdefault((params[index].dtype, long), []).append(index)
        lengths = {index: params[index].shape[dim] * parts[index] for index, dim in dims.items()}
        self._flat = torch.zeros(sum(lengths.values()), device=device)
        sums = dict(zip(lengths, self._flat.split(list(lengths.values())), strict=True))
        for (dtype, long), some in kinds.items():
            words, programs = array("q"), 0
            for index in some:
                param, dim = weights[index], dims[index]
                if not param.numel():
                    continue
                inner, length = spacing(param, dim), param.shape[dim]
                aligned = param.data_ptr() % ALIGNMENT == 0 and inner % ALIGNMENT == 0
                outer = param.numel() // (inner * length)
                first = sums[index][first_index(spans[index], dim) * parts[index] :].data_ptr()
                row = (programs, param.data_ptr(), first, outer, length, inner, 0, 0, 0, aligned)
                words.extend(row[: COLUMNS.value])
                programs += length if long else triton.cdiv(length * inner, _COLUMNS_OF_A_PROGRAM)
            if programs:
                self._launches.append((words, programs, {"PARAM": TYPES[dtype], "LONG": long}))
        self._members, self._couplings = array("q"), array("q")
        first = begin = self._programs = 0
        for each in coupled:
            for place in each.members:
                addresses = sums[place.param].data_ptr(), self._kept[place.param].data_ptr()
                several = parts[place.param]
                sums_of = place.offset * several, place.size * several
                self._members.extend((*addresses, *sums_of, place.offset, place.size))
            counted = (self._programs, first, len(each.members), begin, each.count, unit_size(each, params), 0, 0, 0, 0)
            self._couplings.extend(counted[: COLUMNS.value])
            first, begin = first + len(each.members), begin + each.count
            self._programs += triton.cdiv(each.count, _GROUPS)
        self._count = len(coupled)
        self._rms, self._factors = torch.empty(2, begin, device=device)

    @staticmethod
    def takes(weights: Tensor) -> bool:
        """Whether the kernels can add up the squares of these weights."""
        known = weights.dtype in TYPES and weights.dtype != torch.float64 and weights.device.type in DEVICES
        if is_dtensor(weights):
            return known and local(weights).is_contiguous()
        return known and weights.numel() > 0 and is_flat(weights)

    def norms(self) -> Tensor:
        """Return the root mean square of each group of all units, in float32: a tensor that the next call changes.

        Squares are added up in float32.
        """
        if self._groups:
            self._flat.zero_()
        with guard(self.device):
            for words, programs, kind in self._launches:
                table, rows = table_of(words, self.device), len(words) // COLUMNS.value
                square_sums[(programs,)](
                    table, rows, **kind, BLOCK=BLOCK, WIDTH=_COLUMNS_OF_A_PROGRAM, HEIGHT=_ROWS_OF_A_TILE, **OPTIONS
                )
            if self._groups:
                all_sum(self._flat, self._groups)
            tables = table_of(self._couplings, self.device), table_of(self._members, self.device)
            norms[(self._programs,)](*tables, self._rms, self._count, GROUPS=_GROUPS, **OPTIONS)
        return self._rms

    def fill(self, p_norm: float, alpha_lambda: float | Tensor, dormant: Tensor | None = None) -> None:
        """Fill the tables by the norms of the last call of :meth:`norms`.

        Args:
            p_norm: p.
            alpha_lambda: α λ_p, a float or a 0-dim tensor on the device.
            dormant: Groups that do not shrink, a bool tensor.
        """
        given = alpha_lambda if isinstance(alpha_lambda, Tensor) else None
        numbers = bits((2 - p_norm, 0.0 if given is not None else float(alpha_lambda), smallest(torch.float32)))
        with guard(self.device):
            tables = table_of(self._couplings, self.device), table_of(self._members, self.device)
            factors[(self._programs,)](
                *tables, self._rms, self._factors, dormant, given, self._count, *numbers, GROUPS=_GROUPS, **OPTIONS
            )

    def factors(self) -> Tensor:
        """Return the factor of each group, in float32: a tensor that the next call of :meth:`fill` changes."""
        return self._factors


@triton.jit(do_not_specialize=["rows"])
def square_sums(
    table: tl.tensor,
    rows: tl.int32,
    PARAM: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
) -> None:
    """Add up squares: of one index of a dimension, or of WIDTH columns of a matrix whose rows are the outer indices."""
    words = table + row_of(table, rows) * COLUMNS
    weights, sums = tl.load(words + 1), tl.load(words + 2).to(tl.pointer_type(tl.float32))
    outer, length, inner = tl.load(words + 3), tl.load(words + 4), tl.load(words + 5)
    program = tl.program_id(0) - tl.load(words)
    if LONG:
        total = tl.zeros([BLOCK], tl.float32)
        for run in range(0, outer):
            begin = (run * length + program) * inner
            whole = begin + inner // BLOCK * BLOCK * tl.load(words + 9)
            total += _squares(weights, begin, whole, PARAM, BLOCK, True)
            total += _squares(weights, whole, begin + inner, PARAM, BLOCK, False)
        tl.store(sums + program, tl.sum(total, 0))
    else:
        width = length * inner
        column = program * WIDTH + tl.arange(0, WIDTH)
        height = tl.arange(0, HEIGHT)
        total = tl.zeros([WIDTH], tl.float32)
        for first in range(0, outer, HEIGHT):
            row = first + height
            mask = (tl.expand_dims(row, 1) < outer) & (tl.expand_dims(column, 0) < width)
            place = tl.expand_dims(row * width, 1) + tl.expand_dims(column, 0)
            w = load_block(weights, 0, place, mask, PARAM, False)
            total += tl.sum(w * w, 0)
        tl.store(sums + column, total, mask=column < width)


@triton.jit
def _squares(
    weights: tl.tensor, begin: tl.tensor, end: tl.tensor, PARAM: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
) -> tl.tensor:
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(begin, end, BLOCK):
        place = tl.multiple_of(at, 16) if WHOLE else at
        w = load_block(weights, place, lane, lane < tl.minimum(end - at, BLOCK).to(tl.int32), PARAM, WHOLE)
        total += w * w
    return total


@triton.jit(do_not_specialize=["count"])
def norms(units: tl.tensor, members: tl.tensor, rms: tl.tensor, count: tl.int32, GROUPS: tl.constexpr) -> None:
    """Take the root mean squares of groups of one coupling, whose members' sums are there."""
    words = units + row_of(units, count) * COLUMNS
    group = (tl.program_id(0) - tl.load(words)) * GROUPS + tl.arange(0, GROUPS)
    mask = group < tl.load(words + 4)
    total = tl.zeros([GROUPS], tl.float32)
    first = tl.load(words + 1)
    for number in range(first, first + tl.load(words + 2)):
        member = members + number * 6
        size = tl.load(member + 3)
        sums = tl.load(member).to(tl.pointer_type(tl.float32)) + tl.load(member + 2) + group * size
        for part in range(0, size):
            total += tl.load(sums + part, mask=mask, other=0.0)
    mean = total / tl.load(words + 5).to(tl.float32)
    tl.store(rms + tl.load(words + 3) + group, tl.sqrt(mean), mask=mask)


@triton.jit(do_not_specialize=list(range(4, 10)))
def factors(
    units: tl.tensor,
    members: tl.tensor,
    rms: tl.tensor,
    found: tl.tensor,
    dormant: tl.tensor,
    given: tl.tensor,
    count: tl.int32,
    x: tl.int64,
    strength: tl.int64,
    least: tl.int64,
    GROUPS: tl.constexpr,
) -> None:
    """Store the factors of groups of one coupling, and in its members' tables. Numbers come as bits of a float64."""
    words = units + row_of(units, count) * COLUMNS
    group = (tl.program_id(0) - tl.load(words)) * GROUPS + tl.arange(0, GROUPS)
    mask = group < tl.load(words + 4)
    place = tl.load(words + 3) + group
    norm = tl.load(rms + place, mask=mask, other=1.0)
    exponent = float64_of(x)
    alpha_lambda = float64_of(strength)
    if given is not None:
        alpha_lambda = tl.load(given).to(tl.float64)
    decays = alpha_lambda >= float64_of(least)
    log2 = tl.where(decays, tl.log2(tl.where(decays, alpha_lambda, 1.0)), float("-inf")).to(tl.float32)
    # A dead group stays dead, whatever the learning rate.
    at_zero = tl.where(exponent > 0, 0.0, tl.where(decays & (exponent == 0), 1.0 / (1.0 + alpha_lambda), 1.0))
    factor = factor_of(norm, (-exponent).to(tl.float32), log2, False)
    factor = tl.where(norm == 0, at_zero.to(tl.float32), factor)
    if dormant is not None:
        sleeps = tl.load(dormant.to(tl.pointer_type(tl.int8)) + place, mask=mask, other=0)
        factor = tl.where(sleeps != 0, 1.0, factor)
    tl.store(found + place, factor, mask=mask)
    first = tl.load(words + 1)
    for number in range(first, first + tl.load(words + 2)):
        member = members + number * 6
        size = tl.load(member + 5)
        table = tl.load(member + 1).to(tl.pointer_type(tl.float32)) + tl.load(member + 4) + group * size
        for part in range(0, size):
            tl.store(table + part, factor, mask=mask)
