"""Smaller models: dead neurons and attention heads are cut out of the weights."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .folder import shrink_folder
    from .model import shrink
    from .report import LayerCount, ShrinkReport

_MODULES = {"LayerCount": "report", "ShrinkReport": "report", "shrink": "model", "shrink_folder": "folder"}

__all__ = ["LayerCount", "ShrinkReport", "shrink", "shrink_folder"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value
