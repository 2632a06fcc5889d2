"""Weights that are quantised again with the scales that they have, so that those of a merged model stay quantised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.matrices import is_transposed
from ..sparsity.file_names import CODES_FILE
from ..storage.codes import code_range, find_codes
from ..storage.folder import read_json
from ..storage.quantized import dense_weight, four_bits
from ..terminal import get_logger


logger = get_logger(__name__)

_CHUNK = 1 << 20  # weights for which distances to all codes are held at once


class Quantised(ABC):
    """The packed weight of a layer."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def dense(self) -> Tensor:
        """Return what the weight stands for."""
        found = dense_weight(self._layer, self._layer.weight)
        if found is None:
            raise TypeError(f"{type(self._layer).__name__} has no packed weight.")
        return found.detach()

    def knows_itself(self) -> bool:
        """Whether the weight, quantised again as it is, has the codes that it has."""
        return torch.equal(self._codes(self.dense().float()), self._stored())

    def store(self, weight: Tensor) -> None:
        """Quantise a weight of the same shape in the place of the one that is there."""
        self._stored().copy_(self._codes(weight))

    @abstractmethod
    def _stored(self) -> Tensor:
        """The packed codes, whose memory the layer uses."""

    @abstractmethod
    def _codes(self, weight: Tensor) -> Tensor:
        """The codes nearest to a weight in float32, packed as the layer has them."""


class FourBit(Quantised):
    """Weights of bitsandbytes in 4 bits: codes from a table, two in a byte, with a scale for some consecutive ones."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        layer.weight.data, layer.weight.quant_state = four_bits(layer.weight)
        layer.quant_state = layer.weight.quant_state

    def _stored(self) -> Tensor:
        packed: Tensor = self._layer.weight.data
        return packed

    def _codes(self, weight: Tensor) -> Tensor:
        state = self._layer.weight.quant_state
        scales = state.absmax
        if state.nested:
            from bitsandbytes.functional import dequantize_blockwise

            scales = dequantize_blockwise(scales, state.state2) + state.offset
        table = state.code.to(weight.device)
        flat = nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % state.blocksize))
        blocks = flat.view(-1, state.blocksize) / scales.float().view(-1, 1)
        nearest = [(part[:, None] - table).abs_().argmin(1) for part in blocks.view(-1).split(_CHUNK // len(table))]
        codes = torch.cat(nearest)[: weight.numel()].to(torch.uint8)
        codes = nn.functional.pad(codes, (0, codes.numel() % 2))
        packed = codes[::2] << 4 | codes[1::2]
        return packed.view(self._stored().dtype).view(self._stored().shape)


class EightBit(Quantised):
    """Weights of bitsandbytes in 8 bits, with a scale for each row."""

    def _stored(self) -> Tensor:
        packed: Tensor = self._layer.weight.data
        return packed

    def _codes(self, weight: Tensor) -> Tensor:
        scales = self._layer.state.SCB if self._layer.state.SCB is not None else self._layer.weight.SCB
        steps = scales.float().view(-1, 1) / 127
        return (weight / steps.masked_fill(steps == 0, 1)).round_().clamp_(-127, 127).to(torch.int8)


class TorchAo(Quantised):
    """Weights of torchao as whole codes in int8, with a scale for each block."""

    def _stored(self) -> Tensor:
        codes: Tensor = self._layer.weight.data.qdata
        return codes

    def _codes(self, weight: Tensor) -> Tensor:
        whole = self._layer.weight.data
        scales, points = whole.scale.float(), getattr(whole, "zero_point", None)
        for dim, size in enumerate(whole.block_size):
            scales = scales.repeat_interleave(size, dim)
            points = None if points is None else points.repeat_interleave(size, dim)
        codes = (weight / scales).round_().add_(0 if points is None else points)
        width = str(getattr(whole, "target_dtype", torch.int8)).removeprefix("torch.int")
        return codes.clamp_(*code_range(int(width))).to(torch.int8)


def quantised_layer(layer: Any) -> Quantised | None:
    """Return the packed weight of a layer; None if it is plain, or packed in a way that is not known."""
    weight = getattr(layer, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        return FourBit(layer)
    if kind == "Int8Params" and weight is not None and weight.dtype == torch.int8:
        return EightBit(layer)
    if type(getattr(weight, "data", None)).__name__ in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        return TorchAo(layer)
    return None


class Codes(NamedTuple):
    """Width of codes, and consecutive inputs that share a scale."""

    bits: float
    block: int


def codes_of_base(model: Any) -> dict[str, Codes]:
    """Return the codes of the tensors of a model that ``hf-pdecay quantize`` has written, by the names of these."""
    folder = Path(str(getattr(model.config, "_name_or_path", "") or "")) if hasattr(model, "config") else Path()
    if not (folder / CODES_FILE).is_file():
        return {}
    said = read_json(folder / CODES_FILE)
    return dict.fromkeys(said["tensors"], Codes(said["bits"], said["block"]))


def on_codes(weight: Tensor, before: Tensor, grid: Codes, name: str, layer: nn.Module) -> Tensor:
    """Return a weight rounded to codes times the scales of the same weight before; zeros stay zeros.

    Args:
        weight: The merged weight.
        before: That of the base, in which each number is a code times the scale of its block.
        grid: Its codes.
        name: Its name.
        layer: The layer that holds it.
    """
    transposed = is_transposed(layer)
    matrix = weight.detach().T if transposed else weight.detach()
    try:
        _, scales = find_codes(before.T if transposed else before, *grid)
    except ValueError:
        logger.warning(
            "%s has no codes of %g bits in blocks of %d, as %s says: the merged weights stay as they are. Load the "
            "base in the dtype of its files.",
            *(name, *grid, CODES_FILE),
        )
        return weight.detach()
    wide = scales.repeat_interleave(grid.block, -1)[..., : matrix.shape[-1]]
    codes = (matrix.float() / wide).round_().clamp_(*code_range(grid.bits))
    result = (codes * wide).masked_fill_(codes == 0, 0).to(weight.dtype)
    return result.T if transposed else result
