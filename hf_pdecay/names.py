"""Names of parameters: without the wrappers of a run, in the files of an adapter, and in natural order."""

from __future__ import annotations

import re


_LORA = re.compile(r"(?P<layer>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?=\.|$)")
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)|^module(?=\.)")


def clean_name(name: str) -> str:
    """Return a parameter's name without the prefixes of ``torch.compile``, DDP and FSDP."""
    while (shorter := _WRAPPERS.sub(r"\1", name).replace("..", ".").lstrip(".")) != name:
        name = shorter
    return name


def lora_factor(name: str) -> tuple[str, str] | None:
    """Return the layer and the factor, ``"A"`` or ``"B"``, of a weight in the file of a LoRA adapter; else None."""
    match = _LORA.match(name)
    return (match["layer"], match["factor"]) if match and name[match.end() :] in ("", ".weight") else None


def saved_names(name: str) -> tuple[str, str]:
    """Return the name of a weight, and the name under which PEFT saves it: without the name of the adapter."""
    match = _LORA.match(name)
    rest = name[match.end() :].split(".")[2:] if match else []
    return name, ".".join([match[0], *rest]) if match else name


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
