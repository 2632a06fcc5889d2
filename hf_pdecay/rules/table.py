"""The table of param groups that a run prints before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..optim.param_groups import is_decayed
from ..optim.shards import full_numel
from ..optim.unit_kinds import ELEMENT, kind_of
from ..tables import NameTable


NO_TARGET = "no target"
"""The rule of what would decay by default, and does not because only rules have targets and no λ_p is given."""


def lambda_text(group: Mapping[str, Any]) -> str:
    """Return a group's λ_p as a string, or the sparsity that sets it."""
    asked, kind = group.get("asked_sparsity"), kind_of(group)
    if asked is None:
        return f"{group['lambda_p']:g}"
    return f"for {asked:.4g} zeros" if kind == ELEMENT or ":" in kind else f"for {asked:.4g} of the {kind}s"


def group_table(groups: Sequence[Mapping[str, Any]], params: Sequence[Sequence[Tensor]] | None = None) -> NameTable:
    """Return a table of param groups; ``params`` are the model's parameters in each, if the groups hold others."""
    with_kind = any(kind_of(group) != ELEMENT for group in groups)
    headings = ("rule", *(["group"] if with_kind else []), "tensors", "parameters", "p", "λ_p", "weight decay")
    table = NameTable("Parameter groups", headings)
    lists = [group["params"] for group in groups] if params is None else params
    for number, (group, tensors) in enumerate(zip(groups, lists, strict=True)):
        decayed = is_decayed(group)
        table.add_row(
            group.get("rule", f"group {number}"),
            *([kind_of(group) if decayed else "-"] if with_kind else []),
            f"{len(tensors):,}",
            f"{sum(map(full_numel, tensors)):,}",
            f"{group.get('p_norm_end', group['p_norm']):g}" if decayed else "-",
            lambda_text(group) if decayed else "-",
            f"{group['weight_decay']:g}",
        )
    if any(group.get("rule") == NO_TARGET for group in groups):
        table.caption = (
            f"{NO_TARGET}: only rules have targets, so nothing else decays. target_sparsity, lambda_p or a rule asks "
            "for more."
        )
    return table
