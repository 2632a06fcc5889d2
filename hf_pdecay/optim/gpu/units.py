"""Factors of units on a GPU, computed in a few launches: sums of squares, root mean squares, factors."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..distributed import all_sum, is_dtensor, local
from ..tensor_step import is_flat, smallest, spacing
from ..unit_tables import UnitTables
from ..units import Units, unit_size
from .arithmetic import factor_of, felt, float64_of
from .launch import ALIGNMENT, BLOCK, DEVICES, OPTIONS, TYPES, bits, guard, row, table_of
from .memory import COLUMNS, load_block, row_of


_SIZES = {"BLOCK": BLOCK, "WIDTH": 128, "HEIGHT": 16}  # columns of a program, and rows that it loads at a time
_UNITS = 128  # units of one layer that a program works on
_LONG = 32  # a program sums one index if it has at least so many neighbours


class UnitFactors(UnitTables):
    """The factors that the Triton step takes, in float32; the host never waits."""

    def __init__(
        self, params: Sequence[Tensor], units: Sequence[Units[int]], bases: Mapping[int, Tensor] | None = None
    ) -> None:
        super().__init__(params, units, bases)
        self._launches: list[tuple[array[int], int, dict[str, object]]] = []
        splits = {}  # the number of sums for one index of a parameter
        kinds: dict[tuple[torch.dtype, bool, bool], list[int]] = {}
        for index, dim in self._dims.items():
            inner = spacing(self._weights[index], dim)
            long = inner >= _LONG
            splits[index] = 1 if long else inner
            kinds.setdefault((params[index].dtype, long, index in self._bases), []).append(index)
        lengths = {index: length * splits[index] for index, length in self._lengths.items()}
        self._sums = torch.zeros(sum(lengths.values()), device=self.device)
        sums = dict(zip(lengths, self._sums.split(list(lengths.values())), strict=True))
        for (dtype, long, to_base), indices in kinds.items():
            words, programs = array("q"), 0
            for index in indices:
                weights, dim = self._weights[index], self._dims[index]
                if not weights.numel():
                    continue
                inner, length = spacing(weights, dim), weights.shape[dim]
                start, outer = weights.data_ptr(), weights.numel() // (inner * length)
                base = self._bases[index].data_ptr() if to_base else 0
                first = sums[index][self._firsts[index] * splits[index] :].data_ptr()
                extents = {"outer": outer, "length": length, "inner": inner}
                memory = {"weights": start, "base": base, "aligned": (start | base | inner) % ALIGNMENT == 0}
                words.extend(row(first_chunk=programs, sums=first, **memory, **extents))
                programs += length if long else triton.cdiv(length * inner, _SIZES["WIDTH"])
            if programs:
                kind = {"PARAM": TYPES[dtype], "LONG": long, "TO_BASE": to_base}
                self._launches.append((words, programs, kind))
        self._members, self._layers = array("q"), array("q")
        first = begin = self._programs = 0
        for layer in units:
            for member in layer.members:
                addresses = sums[member.param].data_ptr(), self._whole_tables[member.param].data_ptr()
                split = splits[member.param]
                sums_of = member.offset * split, member.size * split
                self._members.extend((*addresses, *sums_of, member.offset, member.size))
            columns = {"first_member": first, "members": len(layer.members), "first_unit": begin, "count": layer.count}
            self._layers.extend(row(first_chunk=self._programs, unit_size=unit_size(layer, params), **columns))
            first, begin = first + len(layer.members), begin + layer.count
            self._programs += triton.cdiv(layer.count, _UNITS)
        self._count = len(units)
        self._rms, self._factors = torch.empty(2, begin, device=self.device)

    @staticmethod
    def takes(weights: Tensor) -> bool:
        """Whether the kernels can add up the squares of these weights."""
        known = weights.dtype in TYPES and weights.dtype != torch.float64 and weights.device.type in DEVICES
        if is_dtensor(weights):
            return known and local(weights).is_contiguous()
        return known and weights.numel() > 0 and is_flat(weights)

    def norms(self) -> Tensor:
        """Return the root mean squares, from squares summed in float32."""
        if self._process_groups:
            self._sums.zero_()
        with guard(self.device):
            for words, programs, kind in self._launches:
                table, rows = table_of(words, self.device), len(words) // COLUMNS.value
                square_sums[(programs,)](table, rows, **kind, **_SIZES, **OPTIONS)
            if self._process_groups:
                all_sum(self._sums, self._process_groups)
            tables = table_of(self._layers, self.device), table_of(self._members, self.device)
            norms[(self._programs,)](*tables, self._rms, self._count, UNITS=_UNITS, **OPTIONS)
        return self._rms

    def fill(self, p_norm: float, alpha_lambda: float | Tensor, dormant: Tensor | None = None) -> None:
        """Fill the tables with factors."""
        given = alpha_lambda if isinstance(alpha_lambda, Tensor) else None
        numbers = bits((2 - p_norm, 0.0 if given is not None else float(alpha_lambda), smallest(torch.float32)))
        with guard(self.device):
            tables = table_of(self._layers, self.device), table_of(self._members, self.device), self._rms, self._factors
            factors[(self._programs,)](*tables, dormant, given, self._count, *numbers, UNITS=_UNITS, **OPTIONS)

    def factors(self) -> Tensor:
        """Return the factors in a tensor that the next call of :meth:`fill` overwrites."""
        return self._factors


@triton.jit(do_not_specialize=["rows"])
def square_sums(
    table: tl.tensor,
    rows: tl.int32,
    PARAM: tl.constexpr,
    LONG: tl.constexpr,
    TO_BASE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
) -> None:
    """Sum squares of weights or changes: of one index of a dimension, or of WIDTH columns of a matrix.

    The rows of the matrix are the outer indices.
    """
    words = table + row_of(table, rows) * COLUMNS
    weights, sums = tl.load(words + 1), tl.load(words + 2).to(tl.pointer_type(tl.float32))
    outer, length, inner = tl.load(words + 3), tl.load(words + 4), tl.load(words + 5)
    program = tl.program_id(0) - tl.load(words)
    base = None
    if TO_BASE:
        base = tl.load(words + 10)
    if LONG:
        total = tl.zeros([BLOCK], tl.float32)
        for run in range(0, outer):
            begin = (run * length + program) * inner
            whole = begin + inner // BLOCK * BLOCK * tl.load(words + 9)
            total += _squares(weights, base, begin, whole, PARAM, BLOCK, True)
            total += _squares(weights, base, whole, begin + inner, PARAM, BLOCK, False)
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
            if base is not None:
                w -= load_block(base, 0, place, mask, PARAM, False)
            total += tl.sum(w * w, 0)
        tl.store(sums + column, total, mask=column < width)


@triton.jit
def _squares(
    weights: tl.tensor,
    base: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    PARAM: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(begin, end, BLOCK):
        place = tl.multiple_of(at, 16) if WHOLE else at
        mask = lane < tl.minimum(end - at, BLOCK).to(tl.int32)
        w = load_block(weights, place, lane, mask, PARAM, WHOLE)
        if base is not None:
            w -= load_block(base, place, lane, mask, PARAM, WHOLE)
        total += w * w
    return total


@triton.jit(do_not_specialize=["count"])
def norms(layers: tl.tensor, members: tl.tensor, rms: tl.tensor, count: tl.int32, UNITS: tl.constexpr) -> None:
    """Store the root mean squares of units of one layer, from the sums of its members."""
    words = layers + row_of(layers, count) * COLUMNS
    unit = (tl.program_id(0) - tl.load(words)) * UNITS + tl.arange(0, UNITS)
    mask = unit < tl.load(words + 4)
    total = tl.zeros([UNITS], tl.float32)
    first = tl.load(words + 1)
    for number in range(first, first + tl.load(words + 2)):
        member = members + number * 6
        size = tl.load(member + 3)
        sums = tl.load(member).to(tl.pointer_type(tl.float32)) + tl.load(member + 2) + unit * size
        for part in range(0, size):
            total += tl.load(sums + part, mask=mask, other=0.0)
    mean = total / tl.load(words + 5).to(tl.float32)
    tl.store(rms + tl.load(words + 3) + unit, tl.sqrt(mean), mask=mask)


@triton.jit(do_not_specialize=list(range(4, 10)))
def factors(
    layers: tl.tensor,
    members: tl.tensor,
    rms: tl.tensor,
    stored: tl.tensor,
    dormant: tl.tensor,
    given: tl.tensor,
    count: tl.int32,
    x: tl.int64,
    strength: tl.int64,
    least: tl.int64,
    UNITS: tl.constexpr,
) -> None:
    """Store the factors of units of one layer, also in the tables of its members. Numbers come as bits of a float64."""
    words = layers + row_of(layers, count) * COLUMNS
    unit = (tl.program_id(0) - tl.load(words)) * UNITS + tl.arange(0, UNITS)
    mask = unit < tl.load(words + 4)
    place = tl.load(words + 3) + unit
    norm = tl.load(rms + place, mask=mask, other=1.0)
    exponent = float64_of(x)
    alpha_lambda = float64_of(strength)
    if given is not None:
        alpha_lambda = tl.load(given).to(tl.float64)
    decays, log2, at_zero = felt(alpha_lambda, exponent, float64_of(least))
    # A dead unit stays dead, whatever the learning rate.
    at_zero = tl.where((exponent > 0) | decays, at_zero, 1.0).to(tl.float32)
    factor = factor_of(norm, (-exponent).to(tl.float32), log2.to(tl.float32), at_zero, False)
    if dormant is not None:
        sleeps = tl.load(dormant.to(tl.pointer_type(tl.int8)) + place, mask=mask, other=0)
        factor = tl.where(sleeps != 0, 1.0, factor)
    tl.store(stored + place, factor, mask=mask)
    first = tl.load(words + 1)
    for number in range(first, first + tl.load(words + 2)):
        member = members + number * 6
        size = tl.load(member + 5)
        table = tl.load(member + 1).to(tl.pointer_type(tl.float32)) + tl.load(member + 4) + unit * size
        for part in range(0, size):
            tl.store(table + part, factor, mask=mask)
