"""Names of parameters and modules, as they are without the wrappers that a run puts around a model."""

from __future__ import annotations

import re


_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)|^module(?=\.)")


def clean_name(name: str) -> str:
    """Return a parameter's name without what ``torch.compile``, DDP and FSDP put before it."""
    while (shorter := _WRAPPERS.sub(r"\1", name).replace("..", ".").lstrip(".")) != name:
        name = shorter
    return name
