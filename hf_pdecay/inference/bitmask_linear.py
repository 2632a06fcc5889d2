"""A linear layer for CPUs that stores a bit for each weight, and packs the non-zero ones."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .codes import WORD, WORDS, KernelCodes, codes_of
from .cpu_linear import CpuLinear
from .kernels import address, kept_of, kind_of, library
from .packed_weight import PackedWeight


BEYOND = 64
"""Bytes that may be read after the last value."""

_WORD = WORD  # weights of a word of the mask
# More rows are multiplied by lists of the values or by dense blocks: torch's own product of bfloat16 is fast.
_FEW_LISTS, _FEW_INT8 = 24, 16  # where there are lists
_LEAST_FOR_LISTS = 0.48  # with fewer zeros, dense blocks are faster for more than 64 rows, but not of int8 values
_FEW, _FEW_BFLOAT16 = 64, 24  # where there are none
_DENSE = 1 << 22  # weights of a dense block: with rows of x they fit into a last cache of 32 MiB
_PACKED_AT_A_TIME = 1 << 24  # weights
_STORED_AT_A_TIME = 1 << 20  # those of a file become dense only for this, in several threads


class BitmaskLinear(CpuLinear):
    """y = x Wᵀ + b with the zeros of W marked in a bitmask, for inference on a CPU: for weights from 40% zeros on.

    A weight takes a bit, and a non-zero one the bytes of its value. Up to 64 rows of x (24 in bfloat16, 16 by int8
    values) are multiplied by the packed values. More rows of bfloat16, or by int8 values, meet lists of the values
    alone, so zeros save time for any number of rows; in float32, or on a processor without AVX-512 BF16 (for int8:
    AVX2), blocks of W become dense in the processor's caches and meet x in torch's own product. Sums are in float32; x
    and y have the layer's dtype. In a state dict the weight is dense.

    int8 values have a scale for each 256 columns of a row: the greatest magnitude over 127. If the weights are codes of
    at most 8 bits times the scales of blocks of a multiple of 64 columns, as those of ``hf-pdecay quantize`` and of a
    run with ``weight_bits`` are, these codes and scales are held, and no weight is rounded again. x meets them in 16
    bits, with one scale for each row, in sums of 32 bits: few rows if the processor has AVX-512 VNNI, many if it has
    AVX2, and else in float32.

    Args:
        weight: Weights of shape (out_features, in_features), of float32, bfloat16 or float16, on a CPU.
        bias: Of shape (out_features,), or None.
        transposed: Whether a state dict has the weight as (in_features, out_features), as HF's ``Conv1D`` does.
        values: The dtype in which non-zero weights are held: float32, bfloat16, float16 or int8; None for the weight's.
            int8 values without many zeros are held without the bits.

    Raises:
        ValueError: If the layer cannot hold the weight.
    """

    masks: Tensor | None
    starts: Tensor
    values: Tensor
    scales: Tensor | None
    shifts: Tensor | None
    form = "bitmask"
    _block = WORDS  # words that share a scale
    _parts = ("masks", "starts", "values", "scales", "shifts")

    def _compress(self, weight: Tensor | PackedWeight) -> None:
        out, size = weight.shape
        words = -(-size // _WORD)
        if isinstance(weight, PackedWeight) and self._held_as != torch.int8:
            self._count, self.form = weight.count_nonzero(), "bitmask"
            held = *weight.masks(self._held_as, BEYOND), None, None
            for part, tensor in zip(self._parts, held, strict=True):
                self.register_buffer(part, tensor, persistent=False)
            return
        together = _STORED_AT_A_TIME if isinstance(weight, PackedWeight) else _PACKED_AT_A_TIME
        step = max(together // max(size, 1), 1)
        # Without bits a value takes 1 byte; with them 1/8, and 1 if it is not zero.
        masked = self._held_as != torch.int8 or int(weight.count_nonzero()) < weight.numel() * 7 / 8
        codes = codes_of(weight) if self._held_as == torch.int8 else None
        if codes is not None:
            self._block = codes.words
            parts = [_pack_codes(part, masked) for part in codes.split(step)]
        else:
            self._block = WORDS
            parts = [_pack(part, self._held_as, masked) for part in (weight.split(step) if out else [weight])]  # type: ignore[arg-type]
        masks, counts, values, scales, sums = (torch.cat(column) for column in zip(*parts, strict=True))
        starts = torch.zeros(out, dtype=torch.int64)
        starts[1:] = counts[:-1].cumsum(0)
        self._count = int(weight.count_nonzero())
        self.form = "bitmask" if masked else "dense"
        beyond = torch.zeros(BEYOND // values.element_size(), dtype=values.dtype)
        self.register_buffer("masks", masks.view(out, 8 * words) if masked else None, persistent=False)
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer("values", torch.cat([values, beyond]), persistent=False)
        whole = self._held_as == torch.int8
        self.register_buffer("scales", scales if whole else None, persistent=False)
        self.register_buffer("shifts", (scales.double() * sums).sum(1).mul(32768).float() if whole else None, False)

    @classmethod
    def _refusal(cls, weight: Tensor, values: torch.dtype | None) -> str | None:
        if (reason := super()._refusal(weight, values)) is None and values == torch.int8:
            return None if bool(weight.isfinite().all()) else "it has NaN or infinite weights, which int8 cannot hold"
        return reason

    def _dense(self) -> Tensor:
        columns = -(-self.in_features // _WORD) * _WORD
        values = self.values[: len(self.values) - BEYOND // self.values.element_size()]
        if self.masks is None:
            weight = values.float().view(self.out_features, columns)
        else:
            kept = torch.from_numpy(np.unpackbits(self.masks.cpu().numpy(), axis=1, bitorder="little")).bool()
            weight = torch.zeros(kept.shape, dtype=torch.float32, device=values.device)
            weight[kept.to(values.device)] = values.float()
        if self.scales is not None:
            weight *= self.scales.repeat_interleave(self._block * _WORD, 1)[:, :columns]
            weight += 0.0  # 0 times a negative scale is a negative zero
        return weight[:, : self.in_features].to(self.dtype)

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that are zero."""
        return 1 - self._count / max(self.out_features * self.in_features, 1)

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        compiled = library() if x.is_cpu and self.values.is_cpu else None
        if compiled is None or not x.numel() or not self.out_features:
            bias = None if self.bias is None else self.bias.to(dtype)
            with torch.autocast(x.device.type, enabled=False):
                return functional.linear(x.to(dtype), self._dense().to(dtype), bias)
        whole = self._held_as == torch.int8
        by_lists = whole or len(x) <= _FEW or self.sparsity >= _LEAST_FOR_LISTS
        few = _FEW_INT8 if whole else _FEW_LISTS
        if len(x) > few and by_lists and (y := self._by_lists(compiled, x, dtype)) is not None:
            return y
        if len(x) <= (_FEW_BFLOAT16 if dtype == torch.bfloat16 else _FEW):
            return self._few(compiled, x)
        return self._many(compiled, x.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32))

    def _few(self, compiled: ctypes.CDLL, x: Tensor) -> Tensor:
        n, size = x.shape
        rows, bias = x.float().contiguous(), self._float_bias()
        y = torch.empty(n, self.out_features)
        together = compiled.hf_pdecay_bitmask_rows()
        scratch = torch.empty(-(-n // together) * together * -(-size // _WORD) * _WORD)
        compiled.hf_pdecay_bitmask_product(
            *(kind_of(self.values), *self._addresses(), address(bias), self.out_features, size, self._block),
            *(rows.data_ptr(), x.dtype == torch.bfloat16, n, y.data_ptr(), scratch.data_ptr(), torch.get_num_threads()),
        )
        return y

    def _by_lists(self, compiled: ctypes.CDLL, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The product of many rows with lists of the values, or None if there is none for these."""
        kind = kind_of(self.values)
        brain = x.dtype == dtype == self._held_as == torch.bfloat16 and compiled.hf_pdecay_list_rows(kind, True) > 0
        together = compiled.hf_pdecay_list_rows(kind, brain)
        if not together:
            return None
        n, size = x.shape
        rows, bias = (x if brain else x.float()).contiguous(), self._float_bias()
        y = torch.empty(n, self.out_features, dtype=rows.dtype)
        scratch = torch.empty(-(-n // together) * together * size)
        *packed, _ = self._addresses()
        done = compiled.hf_pdecay_list_product(
            *(kind, brain, *packed, address(bias), self.out_features, size, self._block),
            *(rows.data_ptr(), n, y.data_ptr(), scratch.data_ptr(), torch.get_num_threads()),
        )
        return y if done else None

    def _addresses(self) -> list[int | None]:
        """Where masks, starts, values, scales and shifts begin."""
        return [address(self._buffers[part]) for part in self._parts]

    def _many(self, compiled: ctypes.CDLL, x: Tensor) -> Tensor:
        n, size = x.shape
        out, threads = self.out_features, torch.get_num_threads()
        step = max(min(_DENSE // size, out), 1)
        block = torch.empty(step, size, dtype=x.dtype)
        scratch = torch.empty(threads, -(-size // _WORD) * _WORD)
        y = torch.empty(n, out, dtype=x.dtype)
        *packed, _ = self._addresses()
        weight = kind_of(self.values), kind_of(x), *packed, size, self._block
        for first in range(0, out, step):
            last = min(first + step, out)
            compiled.hf_pdecay_bitmask_dense(*weight, first, last, address(block), address(scratch), threads)
            torch.mm(x, block[: last - first].t(), out=y[:, first:last])
        return y if self.bias is None else y.add_(self.bias)


def _pack(weight: Tensor, held_as: torch.dtype, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Masks, numbers of values, values, scales and sums of int8 values, of some rows of a weight."""
    rows, size = weight.shape
    weight = functional.pad(weight, (0, -size % _WORD))
    kept = weight != 0
    scales = sums = torch.empty(rows, 0)
    if held_as == torch.int8:
        block = WORDS * _WORD
        blocks = functional.pad(weight.float(), (0, -weight.shape[1] % block)).unflatten(1, (-1, block))
        scales = blocks.abs().amax(2) / 127
        whole = torch.where(scales[:, :, None] > 0, blocks / scales[:, :, None], 0).round_().clamp_(-127, 127)
        sums = whole.sum(2)
        weight = whole.flatten(1)[:, : weight.shape[1]]
    stored = weight.to(held_as)
    masks = torch.from_numpy(np.packbits(kept.numpy(), axis=1, bitorder="little"))
    counts = kept.sum(1) if masked else torch.full((rows,), weight.shape[1])
    return masks, counts, kept_of(stored, kept) if masked else stored.flatten(), scales, sums


def _pack_codes(part: KernelCodes, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same of some rows that have codes."""
    rows, size = part.codes.shape
    whole = functional.pad(part.codes, (0, -size % _WORD))
    kept = whole != 0
    block = part.words * _WORD
    sums = functional.pad(whole.float(), (0, -whole.shape[1] % block)).unflatten(1, (-1, block)).sum(2)
    masks = torch.from_numpy(np.packbits(kept.numpy(), axis=1, bitorder="little"))
    counts = kept.sum(1) if masked else torch.full((rows,), whole.shape[1])
    return masks, counts, kept_of(whole, kept) if masked else whole.flatten(), part.scales, sums
