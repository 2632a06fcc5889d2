"""Coupled groups of weights: which rows and columns of which parameters make a neuron, an attention head or a rank.

:func:`find` finds them; :func:`add` teaches it an architecture that it does not know.
"""

from .finding import KINDS, find
from .tables import Heads, Neurons, add


__all__ = ["KINDS", "Heads", "Neurons", "add", "find"]
