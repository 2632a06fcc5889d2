"""Which parameter decays, and how: module types and rules → param groups.

By default the matrices of linear layers, of HF's ``Conv1D`` and of convolutions decay; embeddings, the LM head (tied or
not), norms and biases do not. Layers are told apart by their type, never by the names of one architecture.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..layers.matrices import decayable_parameter_names
from ..names import clean_name
from ..optim.param_groups import is_decayed
from ..optim.shards import full_numel, full_shape, wholly_zero
from ..optim.units import ELEMENT, kind_of
from .claims import Claim, as_data, claimed
from .spec import Rule, RuleSpec, parse_rules
from .spec import load_rules as load_rules


if TYPE_CHECKING:
    from rich.table import Table

    from ..optim.units import Units


@dataclass(frozen=True)
class Assignment:
    """How one parameter decays."""

    decayed: bool
    p_norm: float
    lambda_p: float
    rule: str
    target_sparsity: float | None = None
    group: str = ELEMENT


def assign(model: nn.Module, *, p_norm: float, lambda_p: float, rules: RuleSpec | None = None) -> dict[str, Assignment]:
    """Decide how each trainable parameter of a model decays.

    A rule with a ``group`` takes whole groups of weights, biases included: see :func:`.structure.claimed`. Of the
    others a pattern that matches any matrix sets matrices only, so ``"attn"`` does not draw in the biases beside them;
    one that matches nothing but biases and norms sets those. ``"off"`` acts on all that it matches.

    Args:
        model: Any module, wrapped or not.
        p_norm: The run's p.
        lambda_p: The run's λ_p.
        rules: ``lp_rules``; the first one that sets a parameter wins.

    Returns:
        Clean name → :class:`Assignment`, for every trainable parameter, shared ones once.

    Raises:
        ValueError: If a pattern matches no trainable parameter, where the message lists near matches, or its groups
            cannot be had.
    """
    return _assigned(model, p_norm, lambda_p, rules)[0]


def _assigned(
    model: nn.Module, p_norm: float, lambda_p: float, rules: RuleSpec | None
) -> tuple[dict[str, Assignment], dict[str, list[Units[str]]]]:
    """What :func:`assign` returns, and the groups of weights that each rule takes, by its pattern."""
    default = set(decayable_parameter_names(model))
    trainable = _trainable(model)
    matches = {rule: _matches(rule, trainable) for rule in parse_rules(rules or {})}
    for each, matched in matches.items():
        if not matched:
            aliases = [alias for _, some in trainable.values() for alias in some]
            raise ValueError(_no_match(each.pattern.pattern, aliases))
    units, owners = _grouped(model, matches, trainable, default)
    result: dict[str, Assignment] = {}
    for key, (_, aliases) in trainable.items():
        name = aliases[0]
        plain = (rule for rule, matched in matches.items() if key in matched and rule.group == ELEMENT)
        rule = owners.get(name) or next(plain, None)
        if rule is None:
            on = name in default
            result[name] = Assignment(on, p_norm, lambda_p if on else 0.0, "default" if on else "not decayed")
        else:
            result[name] = Assignment(
                decayed=not rule.off,
                p_norm=p_norm if rule.p_norm is None else rule.p_norm,
                lambda_p=0.0 if rule.off else lambda_p if rule.lambda_p is None else rule.lambda_p,
                rule=rule.pattern.pattern,
                target_sparsity=None if rule.off else rule.target_sparsity,
                group=rule.group,
            )
    return result, units


def _grouped(
    model: nn.Module,
    matches: Mapping[Rule, set[int]],
    trainable: Mapping[int, tuple[Tensor, list[str]]],
    default: set[str],
) -> tuple[dict[str, list[Units[str]]], dict[str, Rule]]:
    """The groups of weights that each rule takes, and the rule of each parameter that lies in one."""
    if all(rule.group == ELEMENT for rule in matches):
        return {}, {}
    claims = [
        Claim(rule.pattern.pattern, rule.group, frozenset(trainable[key][1][0] for key in matched))
        for rule, matched in matches.items()
    ]
    taken = claimed(model, claims, {names[0]: param for param, names in trainable.values()}, default)
    owners = {m.param: rule for rule, some in zip(matches, taken, strict=True) for each in some for m in each.members}
    return {rule.pattern.pattern: some for rule, some in zip(matches, taken, strict=True) if some}, owners


def _trainable(model: nn.Module) -> dict[int, tuple[Tensor, list[str]]]:
    """Trainable parameters by identity, each with all of its names."""
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if param.requires_grad:
            found.setdefault(id(param), (param, []))[1].append(clean_name(name))
    return found


def _matches(rule: Rule, trainable: Mapping[int, tuple[Tensor, list[str]]]) -> set[int]:
    found = {key for key, (_, names) in trainable.items() if any(rule.pattern.search(name) for name in names)}
    matrices = {key for key in found if len(full_shape(trainable[key][0])) > 1}
    return found if rule.off else matrices or found


def _no_match(pattern: str, names: list[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
    if not near:
        # A pattern is usually a part of a name: compare it with parts of the same length in dots.
        parts = {part: name for name in names for part in name.split(".")}
        near = [parts[part] for part in difflib.get_close_matches(pattern, list(parts), n=3, cutoff=0.5)]
    shown = ", ".join(near or names[:3])
    return (
        f"Invalid lp_rules: the pattern {pattern!r} matches no trainable parameter; "
        f"{'near matches' if near else 'parameters are named like'}: {shown}."
    )


def build_param_groups(
    model: nn.Module,
    *,
    p_norm: float,
    lambda_p: float,
    weight_decay: float = 0.0,
    keep_zeros: bool = False,
    rules: RuleSpec | None = None,
    weight_decay_names: Collection[str] | None = None,
    isolate_zero: bool = False,
) -> list[dict[str, Any]]:
    """Return param groups for :class:`~hf_pdecay.AdamWLp`.

    Each holds beside the hyperparameters ``decayed``, whether its weights take part in p-norm decay (their λ_p may be 0
    at times), and ``rule``, what put them there. DTensors on different meshes, as under expert parallelism, are in
    different groups. A group whose weights decay by groups has ``group`` and ``units`` too.

    Args:
        model: Any module, wrapped or not.
        p_norm: The run's p.
        lambda_p: The run's λ_p.
        weight_decay: λ₂ of the parameters in ``weight_decay_names``; the others get none. Where weights decay by groups
            their biases have that of the matrices.
        keep_zeros: Whether decayed weights that are zero stay zero.
        rules: ``lp_rules``.
        weight_decay_names: Names of the parameters with L2 decay; those that decay by p norm if None.
        isolate_zero: Whether each wholly zero tensor that decays gets a group of its own. DeepSpeed lays the weights of
            a group end to end, and among others that are not zero it could not be told that such a tensor is to learn.

    Raises:
        ValueError: If a pattern matches no trainable parameter, or no parameter is trainable.
    """
    assignments, units = _assigned(model, p_norm, lambda_p, rules)
    if not assignments:
        raise ValueError("The model has no trainable parameter: set requires_grad on what is to be trained.")
    l2_names = None if weight_decay_names is None else {clean_name(name) for name in weight_decay_names}
    groups: dict[tuple[Assignment, float, str, Any], dict[str, Any]] = {}
    members: dict[str, list[str]] = {}
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    alone = wholly_zero([param for _, param in named]) if isolate_zero else [False] * len(named)
    for (name, param), zero in zip(named, alone, strict=True):
        how = assignments[clean_name(name)]
        l2 = how.decayed if l2_names is None else clean_name(name) in l2_names
        if how.group != ELEMENT:
            l2 = l2_names is None or any(m.param in l2_names for each in units[how.rule] for m in each.members)
            members.setdefault(how.rule, []).append(clean_name(name))
        group = groups.setdefault(
            (
                how,
                weight_decay if l2 else 0.0,
                name if zero and how.decayed and not keep_zeros else "",
                getattr(param, "device_mesh", None),
            ),
            {
                "params": [],
                "weight_decay": weight_decay if l2 else 0.0,
                "p_norm": how.p_norm,
                "lambda_p": how.lambda_p,
                "keep_zeros": keep_zeros and how.decayed,
                "decayed": how.decayed,
                "rule": how.rule,
                "target_sparsity": how.target_sparsity,
            },
        )
        group["params"].append(param)
        if how.group != ELEMENT:
            group["group"] = how.group
    for group in groups.values():
        if kind_of(group) != ELEMENT:
            group["units"] = as_data(units[group["rule"]], members[group["rule"]])
    return sorted(groups.values(), key=lambda group: not group["decayed"])


def decayed_parameter_names(
    model: nn.Module, groups: Iterable[Mapping[str, Any]], params: Iterable[Sequence[Tensor]] | None = None
) -> list[str]:
    """Return the names of the model's parameters in the groups that decay, in the model's order.

    Args:
        model: The model whose parameters the groups hold.
        groups: An optimizer's ``param_groups``; a group without the key ``decayed`` counts if its λ_p is above 0.
        params: The model's parameters in each group, where the groups hold others.
    """
    groups = list(groups)
    lists = [group["params"] for group in groups] if params is None else params
    chosen = {id(param) for group, some in zip(groups, lists, strict=True) if is_decayed(group) for param in some}
    return [clean_name(name) for name, param in model.named_parameters() if id(param) in chosen]


def lambda_text(group: Mapping[str, Any]) -> str:
    """Return a group's λ_p as text, or the sparsity that sets it."""
    asked, kind = group.get("asked_sparsity"), kind_of(group)
    if asked is None:
        return f"{group['lambda_p']:g}"
    return f"for {asked:.4g} zeros" if kind == ELEMENT or ":" in kind else f"for {asked:.4g} of the {kind}s"


def group_table(groups: Sequence[Mapping[str, Any]], params: Sequence[Sequence[Tensor]] | None = None) -> Table:
    """Return a rich table of param groups: tensors, parameters, p, λ_p and weight decay of each.

    Args:
        groups: An optimizer's ``param_groups``.
        params: The model's parameters in each group, where the groups hold others.
    """
    from rich.table import Table

    table = Table(title="Parameter groups")
    table.add_column("rule", overflow="fold")
    structured = any(kind_of(group) != ELEMENT for group in groups)
    for heading in (*(["group"] if structured else []), "tensors", "parameters", "p", "λ_p", "weight decay"):
        table.add_column(heading, justify="right")
    for number, (group, some) in enumerate(zip(groups, params or [group["params"] for group in groups], strict=True)):
        decayed = is_decayed(group)
        table.add_row(
            group.get("rule", f"group {number}"),
            *([kind_of(group) if decayed else "-"] if structured else []),
            f"{len(some):,}",
            f"{sum(full_numel(param) for param in some):,}",
            f"{group.get('p_norm_end', group['p_norm']):g}" if decayed else "-",
            lambda_text(group) if decayed else "-",
            f"{group['weight_decay']:g}",
        )
    return table
