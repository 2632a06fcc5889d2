"""Conversions by which transformers decodes blocks while it loads a model."""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from .tensors import to_tensor


_ANY = r"\1"


class Decode(ConversionOps):
    """Turns each block into its tensor of at most ``limit`` bytes, and leaves tensors as they are."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # The parameter's dtype, once transformers has chosen it.
        self.dtype: torch.dtype | None = None

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Decode the tensors of a parameter: a list for each pattern."""
        name = kwargs["full_layer_name"]
        decoded = {key: [self._decode(tensor, name) for tensor in tensors] for key, tensors in input_dict.items()}
        # Alone it returns the tensor under its full name; before other conversions, under their pattern.
        return {name: next(iter(decoded.values()))} if target_patterns == [_ANY] else decoded

    def _decode(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        if tensor.dtype != torch.uint8:
            return tensor
        decoded = to_tensor(tensor, self.limit, repr(name))
        return decoded if self.dtype is None else decoded.to(self.dtype)


def decode_any(limit: int) -> WeightConverter:
    """Return the conversion of any tensor."""
    return WeightConverter(r"^(.+)$", _ANY, [Decode(limit)])


def decode_first(converter: WeightConverter, limit: int) -> WeightConverter:
    """Return a conversion that decodes blocks before another conversion."""
    return converter.copy(
        list(converter._original_source_patterns),
        list(converter._original_target_patterns),
        operations=[Decode(limit), *converter.operations],
    )
