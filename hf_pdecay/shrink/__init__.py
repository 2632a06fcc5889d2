"""Smaller models: dead neurons and attention heads are cut out of the weights."""

from .folder import shrink_folder
from .model import shrink
from .report import LayerCount, ShrinkReport


__all__ = ["LayerCount", "ShrinkReport", "shrink", "shrink_folder"]
