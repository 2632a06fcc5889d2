"""Weights that are whole codes times scales, in the blocks that the products of int8 values know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..storage.code_search import search_codes
from .packed_weight import PackedWeight


WORD = 64
"""Weights of a word; a block is one or more of them."""
WORDS = 4
"""Words of the largest block."""

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_WIDTHS = {4: torch.int32, 2: torch.int16}


class KernelCodes(NamedTuple):
    """Codes of a matrix.

    Attributes:
        codes: Of shape (out, in); int8.
        scales: Of shape (out, blocks); float32.
        words: Of a block.
    """

    codes: Tensor
    scales: Tensor
    words: int

    def split(self, step: int) -> Iterator[KernelCodes]:
        """Yield some rows at a time."""
        for codes, scales in zip(self.codes.split(step), self.scales.split(step), strict=True):
            yield KernelCodes(codes, scales, self.words)


def codes_of(weight: Tensor | PackedWeight) -> KernelCodes | None:
    """Return the codes of a matrix of shape (out, in), from the file or from the weights themselves.

    None if it has none, or if its blocks do not fit: they must have a multiple of 64 columns, or be whole rows.
    """
    out, size = weight.shape
    if isinstance(weight, PackedWeight):
        stored = weight.codes()
        if stored is None:
            return None
        codes, scales, block = stored
    else:
        plain = weight.detach().contiguous()
        words = plain.view(_WIDTHS[plain.element_size()]).numpy().reshape(-1)
        found = search_codes(words.view(f"u{words.itemsize}"), _DTYPES[plain.dtype], (out, size))
        if found is None or found.offsets is not None or (found.inner, found.inputs) != (1, size):
            return None
        codes = torch.from_numpy(found.codes).view(out, size)
        scales, block = torch.from_numpy(found.scales).view(out, -1), found.block
    if block < size and block % WORD:
        return None
    words_of_block = next(words for words in (WORDS, 2, 1) if block >= size or block % (words * WORD) == 0)
    each = words_of_block * WORD
    if block >= size:
        scales = scales.expand(out, -(-size // each))
    else:
        scales = scales.repeat_interleave(block // each, 1)[:, : -(-size // each)]
    return KernelCodes(codes, scales.contiguous(), words_of_block)
