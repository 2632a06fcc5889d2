"""Groups of weights that live and die together: rows, columns, neurons, attention heads, LoRA ranks.

A group may lie in several parameters: a neuron of an FFN is a row of the up and gate projections, an entry of their
biases and a column of the down projection. Pure data; which groups a model has is found in ``coupling``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """Where the groups of a coupling lie in one parameter.

    Group g has the indices from ``offset + g * size`` up to ``offset + (g + 1) * size`` of dimension ``dim``.

    Args:
        name: Clean name of the parameter.
        dim: Dimension along which the groups lie.
        size: Consecutive indices of it that belong to one group.
        offset: Index at which the first group begins.
    """

    name: str
    dim: int
    size: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Coupling:
    """As many groups as one layer has of a kind, and where they lie.

    Args:
        kind: ``"row"``, ``"column"``, ``"neuron"``, ``"head"`` or ``"rank"``.
        count: Number of groups.
        members: The parameters that they lie in; two members may be parts of the same parameter.
        name: Clean name of the module that they belong to, for messages.
    """

    kind: str
    count: int
    members: tuple[Member, ...]
    name: str
