"""How many units are dead: neurons, heads, rows, columns and ranks whose weights are all exactly zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..optim.distributed import all_sum, common_groups, local, span_of
from ..optim.unit_operations import alive_units
from ..optim.units import ELEMENT, kind_of, n_of_m, units_of


@dataclass(frozen=True)
class UnitSparsity:
    """How many groups of a kind are dead, or for N:M how many blocks have at most N weights that are not zero.

    Args:
        kind: ``"row"``, ``"column"``, ``"neuron"``, ``"head"``, ``"rank"`` or N:M.
        groups: How many there are.
        dead: How many of them have no weight but exact zeros; for N:M how many blocks fit.
    """

    kind: str
    groups: int
    dead: int

    @property
    def sparsity(self) -> float:
        """Fraction of dead groups, in [0, 1]."""
        return self.dead / self.groups if self.groups else 0.0

    @property
    def label(self) -> str:
        """The groups in the plural."""
        return f"{self.kind} blocks" if ":" in self.kind else f"{self.kind}s"

    def __str__(self) -> str:
        """Return a part of a sentence: "neurons: 50.0% of 2,048 dead"."""
        return f"{self.label}: {self.sparsity:.1%} of {self.groups:,} {'fit' if ':' in self.kind else 'dead'}"


@torch.no_grad()
def count_units(
    groups: Iterable[Mapping[str, Any]], params: Iterable[Sequence[Tensor]] | None = None
) -> dict[str, tuple[int, Tensor]]:
    """Count the groups of each kind that an optimizer decays, without a wait for the device.

    Args:
        groups: An optimizer's ``param_groups``.
        params: The model's parameters in each, where the groups hold others.

    Returns:
        Kind → how many groups there are, and how many are dead (:class:`UnitSparsity`) as a 0-dim tensor.
    """
    groups = list(groups)
    found: dict[str, tuple[int, Tensor]] = {}
    for group, some in zip(groups, [g["params"] for g in groups] if params is None else params, strict=True):
        kind = kind_of(group)
        if kind == ELEMENT:
            continue
        blocks = n_of_m(kind)
        for each in units_of(group):
            if blocks is None:
                units, died = each.count, (~alive_units(each, some)).sum()
            else:
                param = some[each.members[0].param]
                weights = local(param.detach()).movedim(each.members[0].dim, -1)
                fits = (weights != 0).unflatten(-1, (-1, blocks[1])).sum(-1) <= blocks[0]
                units = param.numel() // blocks[1]
                died = all_sum(fits.sum(), common_groups([span_of(param)]))
            total, dead = found.get(kind, (0, died.new_zeros(())))
            found[kind] = total + units, dead + died.to(dead.device)
    return found
