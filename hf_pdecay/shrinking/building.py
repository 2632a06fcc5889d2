"""Building models that a config describes which nobody has looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..storage.container import FormatError


# What models raise, beside ValueError, for configs that are wrong: no heads to divide by, a key of another model's, no
# package for the attention that is named.
WRONG_CONFIG = (
    *(OSError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, ImportError),
    StrictDataclassError,
)

# Times that a model may register a parameter for each tensor in its files: tied ones are made before they are tied.
_REGISTERED = 8


@contextmanager
def at_most(tensors: int, folder: str) -> Iterator[None]:
    """Stop building a model once it has many times the tensors that its files hold.

    Even without weights a model of as many layers as a forged config may ask for takes hours and all of the memory.

    Args:
        tensors: How many there are in its files.
        folder: Its folder, for the message.

    Raises:
        FormatError: If it has.
    """
    left = _REGISTERED * (tensors + 1)

    def count(module: torch.nn.Module, name: str, param: Any) -> None:
        nonlocal left
        left -= param is not None
        if left < 0:
            raise FormatError(
                f"{folder!r} is no whole model: its config tells of many more tensors than the {tensors:,} that its "
                "files have."
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
