"""From blocks to torch's tensors, as a conversion that transformers runs while it loads a model."""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from .tensors import to_tensor


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
