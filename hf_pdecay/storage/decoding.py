"""From blocks to torch's tensors, as a conversion that transformers runs while it loads a model."""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from .container import FormatError
from .format import decode


_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),  # since torch 2.7
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_ANY = r"\1"


class Decode(ConversionOps):
    """Turns each block into its tensor, and leaves tensors alone.

    Args:
        limit: How many bytes a tensor may have at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # Of the parameter; set where transformers says what it is to be.
        self.dtype: torch.dtype | None = None

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Decode what has been read of a parameter: a list of tensors for each pattern."""
        name = kwargs["full_layer_name"]
        found = {pattern: [self._decode(each, name) for each in tensors] for pattern, tensors in input_dict.items()}
        # Alone it gives the tensor under its full name; before others, under the pattern that they look for.
        return {name: next(iter(found.values()))} if target_patterns == [_ANY] else found

    def _decode(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        if tensor.dtype != torch.uint8:
            return tensor
        decoded = to_tensor(tensor, self.limit, repr(name))
        return decoded if self.dtype is None else decoded.to(self.dtype)


def decode_any(limit: int) -> WeightConverter:
    """Return the conversion of any tensor."""
    return WeightConverter(r"^(.+)$", _ANY, [Decode(limit)])


def decode_first(converter: WeightConverter, limit: int) -> WeightConverter:
    """Return a conversion that decodes blocks and then does what another one does."""
    return converter.copy(
        list(converter._original_source_patterns),
        list(converter._original_target_patterns),
        operations=[Decode(limit), *converter.operations],
    )


def to_tensor(blob: torch.Tensor, limit: int, what: str) -> torch.Tensor:
    """Decode a block.

    Args:
        blob: Its bytes, in any shape, on any device.
        limit: How many bytes the tensor may have at most.
        what: Name for errors.

    Returns:
        The tensor, on the block's device.

    Raises:
        FormatError: If the block is damaged or forged, the tensor too large, or of a dtype that this torch lacks.
    """
    data, head = decode(blob.detach().cpu().reshape(-1).numpy(), limit, what)
    dtype = _DTYPES[head.dtype]
    if dtype is None:
        raise FormatError(f"{what} has the dtype {head.dtype}, which torch {torch.__version__} does not have.")
    if not data.size:
        return torch.empty(head.shape, dtype=dtype, device=blob.device)
    return torch.from_numpy(data).view(dtype).reshape(head.shape).to(blob.device)
