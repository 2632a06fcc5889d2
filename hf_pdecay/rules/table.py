"""The table of param groups that a run prints before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..optim.bases import ZERO, decays_to_base
from ..optim.param_groups import is_decayed
from ..optim.shards import full_numel
from ..optim.unit_kinds import ELEMENT, kind_of
from ..tables import NameTable


NO_TARGET = "no target"
"""The rule of what would decay by default, and does not because only rules have targets and no λ_p is given."""


NOT_IN_BASE = "not in the base"
"""The rule of new parameters in a run whose weights decay to their base, unless a rule takes them."""

_CAPTIONS = {
    NO_TARGET: "only rules have targets, so nothing else decays. target_sparsity, lambda_p or a rule asks for more.",
    NOT_IN_BASE: "new parameters, such as a head. What decays of them decays to zero by λ_p, without a target unless a "
    "rule gives one.",
}


def lambda_text(group: Mapping[str, Any]) -> str:
    """Return a group's λ_p as a string, or the sparsity that sets it."""
    asked, kind = group.get("asked_sparsity"), kind_of(group)
    if asked is None:
        return f"{group['lambda_p']:g}"
    if kind != ELEMENT and ":" not in kind:
        return f"for {asked:.4g} of the {kind}s"
    return f"for {asked:.4g} {'unchanged' if decays_to_base(group) else 'zeros'}"


def group_table(groups: Sequence[Mapping[str, Any]], params: Sequence[Sequence[Tensor]] | None = None) -> NameTable:
    """Return a table of param groups; ``params`` are the model's parameters in each, if the groups hold others."""
    with_kind = any(kind_of(group) != ELEMENT for group in groups)
    to_base = any(map(decays_to_base, groups))
    more = [*(["group"] if with_kind else []), *(["decays to"] if to_base else [])]
    table = NameTable("Parameter groups", ("rule", *more, "tensors", "parameters", "p", "λ_p", "weight decay"))
    lists = [group["params"] for group in groups] if params is None else params
    for number, (group, tensors) in enumerate(zip(groups, lists, strict=True)):
        decayed = is_decayed(group)
        table.add_row(
            group.get("rule", f"group {number}"),
            *([kind_of(group) if decayed else "-"] if with_kind else []),
            *([group.get("decay_to", ZERO) if decayed else "-"] if to_base else []),
            f"{len(tensors):,}",
            f"{sum(map(full_numel, tensors)):,}",
            f"{group.get('p_norm_end', group['p_norm']):g}" if decayed else "-",
            lambda_text(group) if decayed else "-",
            f"{group['weight_decay']:g}",
        )
    rules = {group.get("rule") for group in groups}
    table.caption = " ".join(f"{rule}: {text}" for rule, text in _CAPTIONS.items() if rule in rules) or None
    return table
