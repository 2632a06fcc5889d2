"""Names of parameters and modules, as they are without the wrappers that a run puts around a model."""

from __future__ import annotations

import re


_ADAPTER = re.compile(r"(\.lora_(?:embedding_)?[AB])\.[^.]+")
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)|^module(?=\.)")


def clean_name(name: str) -> str:
    """Return a parameter's name without what ``torch.compile``, DDP and FSDP put before it."""
    while (shorter := _WRAPPERS.sub(r"\1", name).replace("..", ".").lstrip(".")) != name:
        name = shorter
    return name


def saved_names(name: str) -> tuple[str, str]:
    """Return the name of a weight and that by which PEFT saves it if it is an adapter's: without the adapter's name."""
    return name, _ADAPTER.sub(r"\1", name)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a key by which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
