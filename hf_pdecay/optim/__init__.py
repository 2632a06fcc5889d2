"""Optimizers with weight decay for any p norm. Nothing here knows of transformers."""

from .adamw_lp import AdamWLp, adamw_lp


__all__ = ["AdamWLp", "adamw_lp"]
