"""Optimizers with weight decay for any p norm. Nothing here knows of transformers."""

from .adamw_lp import AdamWLp, adamw_lp
from .wrapper import LpDecay


__all__ = ["AdamWLp", "LpDecay", "adamw_lp"]
