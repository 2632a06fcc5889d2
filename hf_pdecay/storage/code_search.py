"""Finds the codes and scales of quantised weights again, from the weights alone.

A block of weights w has codes if whole numbers q and a scale s exist so that s q, rounded to the dtype, is w. Each
weight limits s to an interval; a block has codes if the intervals of all its weights meet. The largest weight has some
code from 1 to 128, which fixes the codes of the others, so each is tried. Of the scales in the interval that with the
fewest digits is taken. Blocks with an offset o, the least weight, have s q + o.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..low_bit.grid import BLOCK
from .coded import CODED, Codes, layouts, number_of, symbol_bits
from .floats import DIGITS, is_short, widened


_LARGEST_CODE, _LARGEST_WITH_OFFSET = 128, 15
_BLOCKS = (32, 64, 128, 256, 512, 1024)
_LEAST = 256  # weights of a tensor that is looked at
_SAMPLES = 64  # blocks
_LOOKED_AT = 8  # weights of a block by which codes are tried
_CHUNK = 1 << 16  # weights
_INSIDE = 1e-12  # of an interval's ends, where a weight may be rounded to either side
_DIGITS = (8, 24)  # of a scale: those of bfloat16, else those of float32
_MOST_SHIFT = 36  # so that whole numbers of 24 digits fit into 63
_MOST_TRIED = 2  # sizes of blocks and layouts


def search_codes(elements: Any, dtype: str, shape: tuple[int, ...], block: int | None = None) -> Codes | None:
    """Find codes and scales that give exactly the elements of a tensor.

    Args:
        elements: Of one dimension, as unsigned integers.
        dtype: By safetensors' name.
        shape: Of the tensor.
        block: Inputs that share a scale, if that is known.

    Returns:
        The codes, for the largest blocks that have some; None if a weight has none.
    """
    if dtype not in CODED or len(shape) < 2 or elements.size < _LEAST or not elements.any():
        return None
    views = [_View(elements.reshape(layout), dtype) for layout in layouts(shape) if layout[1] > 1]
    promises: list[_Promise] = []
    for known in dict.fromkeys((block, None)):
        if not promises:
            promises = [each for view in views for offset in (False, True) for each in _promises(view, known, offset)]
    for promise in sorted(promises, key=lambda promise: promise.bits)[:_MOST_TRIED]:
        found = _all_codes(promise)
        if found is not None:
            return found
    return None


class _View(NamedTuple):
    """A tensor of shape (outer, inputs, inner), as unsigned integers."""

    words: Any
    dtype: str

    def some(self, size: int) -> Any:
        """Return some blocks, of shape (blocks, size); shorter ones repeat their last weight."""
        outer, inputs, inner = self.words.shape
        count = -(-inputs // size)
        chosen = np.unique(np.linspace(0, outer * count * inner - 1, _SAMPLES, dtype=np.int64))
        result = np.zeros((chosen.size, size), dtype=self.words.dtype)
        for row, place in enumerate(chosen.tolist()):
            first = place // inner % count * size
            block = self.words[place // inner // count, first : first + size, place % inner]
            result[row] = block[-1]
            result[row, : block.size] = block
        return result

    def pieces(self, size: int) -> Iterator[tuple[Any, Any]]:
        """Yield all blocks, some at a time: where they lie, and the blocks in the order of their scales."""
        outer, inputs, inner = self.words.shape
        rows = max(_CHUNK // max(inputs * inner, 1), 1)
        step = inputs if rows > 1 or inner == 1 else max(_CHUNK // (size * inner), 1) * size
        for row in range(0, outer, rows):
            for first in range(0, inputs, step):
                where = slice(row, row + rows), slice(first, first + step)
                yield where, _in_blocks(self.words[where], size)


def _in_blocks(words: Any, size: int) -> Any:
    outer, inputs, inner = words.shape
    count = -(-inputs // size)
    if inputs % size:
        padded = np.empty((outer, count * size, inner), dtype=words.dtype)
        padded[:, :inputs] = words
        padded[:, inputs:] = words[:, -1:]
        words = padded
    return np.ascontiguousarray(words.reshape(outer, count, size, inner).transpose(0, 1, 3, 2)).reshape(-1, size)


class _Promise(NamedTuple):
    """What a sample of blocks of a size has: about how many bits a weight takes, and codes and scales."""

    bits: float
    view: _View
    size: int
    sample: _Solution


def _promises(view: _View, block: int | None, offset: bool) -> Iterator[_Promise]:
    """Yield the sizes of blocks for which a sample has codes."""
    inputs = view.words.shape[1]
    sizes = [each for each in _BLOCKS if each < inputs]
    if view.words.shape[2] == 1 or inputs <= _BLOCKS[-1]:
        sizes.append(inputs)
    if block is not None or offset:
        sizes = [min(block or BLOCK, inputs)]
    for size in sizes:
        found = _solve(view.some(size), view.dtype, _every_code(offset), offset, _DIGITS)
        if found is None:
            return
        stored = found.codes if offset else found.codes[found.codes != 0]
        kept = 1.0 if offset else np.count_nonzero(view.words) / view.words.size
        places = -sum(share * np.log2(share) for share in (kept, 1 - kept) if share > 0)
        each = symbol_bits(np.unique(stored).size)
        yield _Promise(places + kept * each + (32 if offset else 16) / size, view, size, found)


def _every_code(offset: bool) -> range:
    return range(1, (_LARGEST_WITH_OFFSET if offset else _LARGEST_CODE) + 1)


def _all_codes(promise: _Promise) -> Codes | None:
    """Find all codes of a tensor, trying first what the sample has."""
    _, view, size, sample = promise
    offset = sample.offsets is not None
    _, inputs, inner = view.words.shape
    known = Counter(np.abs(sample.codes.astype(np.int64)).max(1).tolist())
    order = [code for code, _ in known.most_common() if code]
    order += [code for code in _every_code(offset) if code not in known]
    limits = _DIGITS if is_short(sample.scales) else _DIGITS[1:]
    codes = np.empty(view.words.shape, dtype=np.int8)
    scales, offsets = [], []
    for where, words in view.pieces(size):
        found = _solve(words, view.dtype, order, offset, limits)
        if found is None:
            return None
        there = codes[where]
        back = found.codes.reshape(there.shape[0], -1, inner, size).transpose(0, 1, 3, 2)
        there[:] = back.reshape(there.shape[0], -1, inner)[:, : there.shape[1]]
        scales.append(found.scales)
        offsets.append(found.offsets)
    every = np.concatenate(offsets) if offset else None
    return Codes(inputs, inner, size, codes.reshape(-1), np.concatenate(scales), every)


class _Solution(NamedTuple):
    codes: Any  # int8, of shape (blocks, size)
    scales: Any  # float32
    offsets: Any  # float32, or None


def _solve(words: Any, dtype: str, order: Sequence[int], offset: bool, limits: Sequence[int]) -> _Solution | None:
    """Return codes and scales of blocks; None if one has none.

    Args:
        words: Of shape (blocks, size).
        dtype: By safetensors' name.
        order: The codes that are tried for the largest weight of a block.
        offset: Whether blocks have offsets.
        limits: How many digits a scale may have: the first, or if it has none the next.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN
        numbers = widened(words, dtype).astype(np.float64)
    if not np.isfinite(numbers).all() or (np.signbit(numbers) & (numbers == 0)).any():
        return None
    problem = _Problem(words, numbers, dtype, offset)
    if not problem.is_hopeful(order):
        return None
    for limit in limits[:1] if offset else limits:
        if not offset and DIGITS[dtype] < DIGITS["F32"]:
            problem.try_divisors(limit)
        for turn, code in enumerate(order):
            if problem.left.size == 0:
                break
            problem.try_code(code, limit, everywhere=turn == 0)
    if problem.left.size:
        return None
    codes, scales = problem.codes, problem.scales
    if not offset:
        codes = np.copysign(codes, numbers)
        # A code like -8 of 4 bits, which has no counterpart.
        high = codes.max(1)
        flipped = (high > -codes.min(1)) & (high > 1) & (np.frexp(high)[0] == 0.5)
        codes[flipped] *= -1
        scales[flipped] *= -1
    if codes.max() >= _LARGEST_CODE:  # and so is the least
        return None
    return _Solution(codes.astype(np.int8), scales, problem.base)


def _ends(words: Any, dtype: str) -> tuple[Any, Any]:
    """Return the ends of the interval that is rounded to each number's magnitude, as float64.

    What lies in the middle of two numbers is rounded to the one whose last digit is 0.
    """
    kind = words.dtype.type
    sizes = words & kind((1 << 8 * words.itemsize - 1) - 1)
    here = widened(sizes, dtype).astype(np.float64)
    below = widened(sizes - (sizes > 0).astype(words.dtype), dtype).astype(np.float64)
    above = widened(sizes + kind(1), dtype).astype(np.float64)
    inside = np.where(sizes & kind(1), _INSIDE, -_INSIDE)
    return (below + here) * (0.5 + inside), (above + here) * (0.5 - inside)


class _Problem:
    """Blocks whose codes and scales are wanted; ``left`` has the indices of those without."""

    def __init__(self, words: Any, numbers: Any, dtype: str, offset: bool) -> None:
        self._dtype, self._digits = dtype, DIGITS[dtype]
        least, most = _ends(words, dtype)
        if offset:
            base, below = numbers.min(1), numbers < 0
            least[words == 0] = -most[words == 0]
            least, most = np.where(below, -most, least), np.where(below, -least, most)
            least -= base[:, None]
            most -= base[:, None]
            self.base = base.astype(np.float32)
            self._wanted, self._words, error = numbers - base[:, None], words, np.abs(base)
        else:
            self.base, error = None, np.zeros(len(words))
            self._wanted, self._words = np.abs(numbers), words & words.dtype.type((1 << 8 * words.itemsize - 1) - 1)
        self._least, self._most = np.maximum(least, 0), most
        self._top = self._wanted.max(1)
        self.codes, self.scales = np.zeros(words.shape), np.ones(len(words), dtype=np.float32)
        self.left = np.flatnonzero(self._top > 0)
        # How far the quotient of two weights may be off.
        self._slack = 2.0 ** (2 - self._digits) * (1 + error / np.where(self._top, self._top, 1))
        self._few: Any = None

    def is_hopeful(self, order: Sequence[int]) -> bool:
        """Whether some code may be that of the largest weight in each of a few blocks."""
        some = self.left[:_LOOKED_AT]
        shown = min(_LOOKED_AT, self._wanted.shape[1])
        largest = np.partition(self._wanted[some], -shown, axis=1)[:, -shown:]
        steps = (largest / self._top[some, None])[:, :, None] * np.array(order, dtype=np.float64)
        near = np.abs(steps - np.rint(steps)) <= np.array(order) * self._slack[some, None, None]
        return bool(near.all(1).any(1).all())

    def try_code(self, code: int, limit: int, everywhere: bool) -> None:
        """Look for blocks whose largest weight has a code; first by a few weights of each, unless it is likely."""
        tried = self.left
        if not everywhere:
            if self._few is None:
                shown = min(_LOOKED_AT, self._wanted.shape[1])
                largest = np.partition(self._wanted, self._wanted.shape[1] - shown, axis=1)[:, -shown:]
                self._few = largest / np.where(self._top, self._top, 1)[:, None]
            steps = self._few[tried] * code
            tried = tried[(np.abs(steps - np.rint(steps)) <= code * self._slack[tried, None]).all(1)]
        self._try(tried, self._top[tried] / code, limit)

    def try_divisors(self, limit: int) -> None:
        """Look for blocks all of whose weights are exactly codes times their greatest common divisor."""
        mantissas, exponents = np.frexp(self._wanted[self.left])
        exponents = np.where(mantissas > 0, exponents, 1 << 20)
        lowest = exponents.min(1, keepdims=True)
        shifts = np.where(mantissas > 0, exponents - lowest, 0)
        near = shifts.max(1) < _MOST_SHIFT
        tried = self.left[near]
        whole = np.ldexp(mantissas[near], shifts[near] + self._digits).astype(np.int64)
        divisors = np.gcd.reduce(whole, axis=1)
        few = whole.max(1, initial=0) <= divisors * _LARGEST_CODE
        self._try(tried[few], np.ldexp(divisors[few].astype(np.float64), lowest[near, 0][few] - self._digits), limit)

    def _try(self, tried: Any, scales: Any, limit: int) -> None:
        if not tried.size:
            return
        some = slice(None) if tried.size == len(self._wanted) else tried
        parts = self._wanted[some], self._least[some], self._most[some]
        codes, found = _fit(*parts, scales, self._digits, limit)
        narrow = found.astype(np.float32)
        base = None if self.base is None else self.base[some, None]
        back = number_of(codes.astype(np.float32), narrow[:, None], base, self._dtype)
        done = (back == self._words[some]).all(1)
        self.codes[tried[done]], self.scales[tried[done]] = codes[done], narrow[done]
        self.left = np.setdiff1d(self.left, tried[done], assume_unique=True)


def _fit(wanted: Any, least: Any, most: Any, scales: Any, digits: int, limit: int) -> tuple[Any, Any]:
    """Return the codes of blocks at about some scales, and scales with few digits; NaN where there is none.

    Args:
        wanted: What the codes stand for, at least 0, of shape (blocks, size).
        least: The least number that is rounded to it.
        most: The largest.
        scales: Of each block.
        digits: Of the numbers in ``wanted``.
        limit: Digits of a scale.
    """
    codes = np.rint(wanted / scales[:, None])
    if digits < DIGITS["F32"]:  # by all weights, as the largest alone has few digits
        scales = (wanted * codes).sum(1) / (codes * codes).sum(1)
        codes = np.rint(wanted / scales[:, None])
        # Of codes from here on, the last digit of a number is a quarter of a code or more: smaller ones come first.
        sure = 2.0 ** (digits - 2)
        for part in (1, 1.2, 1.4, 1.6, 1.8) if codes.max() > sure else ():
            low, high = _interval(least, most, np.where(codes > part * sure, 0, codes))
            middle = np.where(low <= high, (low + high) / 2, np.inf)
            codes = np.rint(wanted / np.where(np.isfinite(middle), middle, scales)[:, None])
    low, high = _interval(least, most, codes)
    high[((wanted > 0) & (codes == 0)).any(1)] = -1
    found = np.full(len(low), np.nan)
    _, exponents = np.frexp(low)
    left = np.flatnonzero(low <= high)
    for count in range(1, limit + 1):
        if not left.size:
            break
        shift = count - exponents[left]
        rough = np.ldexp(np.ceil(np.ldexp(low[left], shift)), -shift)
        fits = rough <= high[left]
        found[left[fits]] = rough[fits]
        left = left[~fits]
    return codes, found


def _interval(least: Any, most: Any, codes: Any) -> tuple[Any, Any]:
    """Return the least and the largest scale of each block that suits all codes but those of 0."""
    some = codes > 0
    divisors = np.where(some, codes, 1)
    return np.where(some, least / divisors, 0).max(1), np.where(some, most / divisors, np.inf).min(1)
