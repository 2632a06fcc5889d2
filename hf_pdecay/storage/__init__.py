"""Smaller files: models whose zeros are not stored, and the loader that plain ``from_pretrained`` uses for them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .container import FormatError
    from .hub import push_to_hub
    from .reader import decompress
    from .report import StorageReport
    from .writer import compress, save_compressed

_MODULES = {
    "FormatError": "container",
    "StorageReport": "report",
    "compress": "writer",
    "decompress": "reader",
    "push_to_hub": "hub",
    "save_compressed": "writer",
}

__all__ = ["FormatError", "StorageReport", "compress", "decompress", "push_to_hub", "save_compressed"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value
