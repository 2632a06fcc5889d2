"""Which parameter decays, and how: module types and rules → param groups.

By default the type of a layer decides, never its name: see :func:`.decayable_parameter_names`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from ..checks import check_choice
from ..layers.matrices import bias_names, decayable_parameter_names
from ..layers.parametrized import adapter_parameters, parametrized
from ..layers.saved_names import names_in_files
from ..names import clean_name
from ..optim.bases import BASE, DECAY_TO, ZERO, decays_to_base
from ..optim.defaults import LAMBDA_P
from ..optim.param_groups import DECAYED_DTYPES, can_decay, is_decayed
from ..optim.shards import full_numel, full_shape, is_sharded, wholly_zero
from ..optim.unit_kinds import ELEMENT
from ..optim.units import Member, Units
from ..target.still import still_weights
from .claims import claims_by_name
from .matching import Finder
from .spec import Rule, RuleSpec, parse_rules
from .table import NO_TARGET, NOT_IN_BASE


@dataclass(frozen=True)
class Assignment:
    """How one parameter decays.

    Args:
        rule: The pattern that took it, ``"default"``, ``"not decayed"``, :data:`.table.NO_TARGET` for what would
            decay by default, or :data:`.table.NOT_IN_BASE` for what is new in a run whose weights decay to a base.
        units: All units that the rule takes, of other parameters too; empty for ``"element"``.
    """

    decayed: bool
    p_norm: float
    lambda_p: float
    rule: str
    target_sparsity: float | None = None
    group: str = ELEMENT
    decay_to: str = ZERO
    units: tuple[Units[str], ...] = field(default=(), compare=False)


def assign(
    model: nn.Module,
    *,
    p_norm: float,
    lambda_p: float | None = None,
    rules: RuleSpec | None = None,
    decay_to: str = ZERO,
    new: Collection[str] = (),
) -> dict[str, Assignment]:
    """Decide how each trainable parameter of a model decays, by its clean name; shared ones are listed once.

    The first rule that sets a parameter wins. A rule with a ``group`` takes whole units, biases included: see
    :func:`.claims.claims_by_name`. For the other rules, a pattern that matches any matrix sets matrices only, so
    ``"attn"`` does not draw in the biases beside them. ``"off"`` acts on all that it matches.

    With ``decay_to="base"`` all parameters decay by default, biases and embeddings too, and a rule takes all that it
    matches. Those in ``new``, which the base has not, decay to zero as in other runs, without a target; a rule takes
    them if it matches no others, or says ``decay_to="zero"``.

    Raises:
        ValueError: If a pattern matches no trainable parameter, or a rule cannot have the units that it asks for.
    """
    matrices = set(decayable_parameter_names(model))
    parsed = [rule for rule in parse_rules(rules or {}) if rule.sets_decay]
    trainable = {clean_name(name): param for name, param in model.named_parameters() if param.requires_grad}
    left_out = _left_out(model, matrices)
    new = {name for name in trainable if name in new}
    changing = {name for name in trainable if can_decay(trainable[name])} - new if decay_to == BASE else set()
    default = changing | (matrices if decay_to == ZERO else matrices & new)
    computed = {name for name, param in trainable.items() if id(param) in left_out.computing}
    biases = bias_names(model)
    find = finder(model, names_in_files(model) if parsed else {}, [name for name in trainable if name in default])
    matches, aims = {}, {}
    for rule in parsed:
        matches[rule], aims[rule] = _aimed(rule, find(rule), decay_to, new)
        if aims[rule] == ZERO:
            matches[rule] = _narrowed(rule, matches[rule], trainable, biases, computed)
    unasked = lambda_p is None and any(rule.targeted for rule in matches)
    strength = LAMBDA_P if lambda_p is None else lambda_p
    claims = claims_by_name(model, matches, trainable, matrices)
    result = {}
    for name in trainable:
        if name not in claims:
            on = name in default and not unasked
            to_base = name in changing
            why = "default" if on else NO_TARGET if name in default else left_out.reason(trainable[name])
            if decay_to == BASE and name in new:
                why = NOT_IN_BASE
            target = 0.0 if decay_to == BASE and on and not to_base else None
            aim = BASE if on and to_base else ZERO
            result[name] = Assignment(on, p_norm, strength if on else 0.0, why, target, decay_to=aim)
            continue
        rule = claims[name].rule
        if not rule.off and not can_decay(trainable[name]):
            raise ValueError(
                f"Invalid lp_rules: the rule {rule.text!r} takes {name}, whose dtype {trainable[name].dtype} does not "
                f"decay; only {', '.join(map(str, DECAYED_DTYPES))} do. Give it a rule before this one: {name!r}: off."
            )
        result[name] = Assignment(
            decayed=not rule.off,
            p_norm=p_norm if rule.p_norm is None else rule.p_norm,
            lambda_p=0.0 if rule.off else strength if rule.lambda_p is None else rule.lambda_p,
            rule=rule.text,
            target_sparsity=rule.target_sparsity,
            group=rule.group,
            decay_to=ZERO if rule.off else aims[rule],
            units=claims[name].units,
        )
    return result


def _aimed(rule: Rule, names: set[str], decay_to: str, new: Set[str]) -> tuple[set[str], str]:
    """What a rule takes of what it matches, in view of what is new, and what that decays to."""
    aim = rule.decay_to or decay_to
    old = names - new
    if rule.off or aim == ZERO or old:
        return (names if rule.off or aim == ZERO else old), aim
    if rule.decay_to == BASE:
        raise ValueError(
            f"Invalid lp_rules: {rule.text!r} has decay_to='base', and the base has nothing that it matches, such as "
            f"{min(names)}; leave decay_to out, and it decays to zero."
        )
    return names, ZERO


def finder(model: nn.Module, saved: Mapping[str, Sequence[str]], default: Sequence[str]) -> Finder:
    """Return what finds the trainable parameters that a rule matches.

    Args:
        model: The model, wrapped or not.
        saved: The names in files of parameters, if these differ; see :func:`.layers.saved_names.names_in_files`.
        default: Names of the trainable parameters that decay by default.
    """
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if param.requires_grad:
            name = clean_name(name)
            # Several names in files are those of its parts.
            more = saved[name] if len(saved.get(name, ())) == 1 else ()
            names.setdefault(id(param), []).extend(dict.fromkeys((name, *more)))
    aliases = {known[0]: known for known in names.values()}
    return Finder(aliases, {name: saved[name] for name in aliases if len(saved.get(name, ())) > 1}, default)


def _narrowed(
    rule: Rule, names: set[str], trainable: Mapping[str, Tensor], biases: Set[str], computed: Set[str]
) -> set[str]:
    """What a rule takes of what it matches: matrices only, if there are any, and nothing from which others come."""
    matrices = {name for name in names - biases if len(full_shape(trainable[name])) > 1}
    if rule.off:
        return names
    if names <= computed or (matrices and matrices <= computed):
        raise ValueError(
            f"Invalid lp_rules: {rule.text!r} matches only what a parametrization computes a weight from, such as "
            f"{min(names & computed)}, and that cannot decay: the norm of zeros is 0, and divides. Remove the "
            "parametrization before training (torch.nn.utils.parametrize.remove_parametrizations), or leave the layer "
            "out of the rules."
        )
    return matrices - computed or names - computed


@dataclass(frozen=True)
class _LeftOut:
    """Parameters that do not decay although their layer multiplies by a matrix, by ``id``, and what they belong to."""

    computing: Mapping[int, str]
    adapters: Mapping[int, str]

    def reason(self, param: Tensor) -> str:
        """Why a parameter does not decay by default."""
        if id(param) in self.computing:
            return f"parametrized: {self.computing[id(param)]}"
        if id(param) in self.adapters:
            return f"adapter: {self.adapters[id(param)]}"
        return "not decayed"


def _left_out(model: nn.Module, default: Set[str]) -> _LeftOut:
    layers = [layer for layer in parametrized(model) if not layer.pruned]
    adapters = adapter_parameters(model)
    # Beside A and B of LoRA, which decay, a bias or magnitude is nothing to be told.
    decaying = {adapters.get(id(param)) for name, param in model.named_parameters() if clean_name(name) in default}
    adapters = {key: method for key, method in adapters.items() if method not in decaying}
    return _LeftOut({id(param): layer.by for layer in layers for param in layer.params}, adapters)


def _warn_of_left_out(named: Sequence[tuple[str, Tensor]], groups: Mapping[str, Assignment]) -> None:
    """Warn of matrices that neither decay nor keep zeros because of what computes them."""
    prefixes = "parametrized: ", "adapter: "
    reasons = [(name, reason) for name, _ in named if (reason := groups[name].rule).startswith(prefixes)]
    if reasons:
        kinds = ", ".join(sorted({reason.partition(": ")[2] for _, reason in reasons}))
        warnings.warn(
            f"{len(reasons)} tensors, such as {reasons[0][0]}, neither decay nor keep zeros, because a weight is "
            f"computed from them ({kinds}). A target is for the other tensors. To include these, merge the adapter, or "
            "remove the parametrization (torch.nn.utils.parametrize.remove_parametrizations), before training.",
            stacklevel=3,
        )


def _check_keeps_zeros(model: nn.Module) -> None:
    """Raise ValueError if zeros of a layer that computes its weight would have to be kept."""
    for layer in parametrized(model):
        matrices = [param for param in layer.params if param.dim() > 1 and not (param.is_meta or is_sharded(param))]
        if layer.pruned:
            module = layer.name.rpartition(".")[0]
            raise ValueError(
                f"Invalid keep_zeros: keep_zeros=True, and {layer.name} is under torch.nn.utils.prune, whose mask "
                f"hides weights that are not zero. Call prune.remove(module, {layer.name.rpartition('.')[2]!r}) on "
                f"{module or 'the model'} and its like before training."
            )
        if any(bool((param == 0).any()) for param in matrices):
            raise ValueError(
                f"Invalid keep_zeros: keep_zeros=True, and {layer.name} has zeros, but {layer.by} computes it, so they "
                "cannot be kept. Call remove_parametrizations (torch.nn.utils.parametrize) before training."
            )


def build_param_groups(
    model: nn.Module,
    *,
    p_norm: float,
    lambda_p: float | None = None,
    weight_decay: float = 0.0,
    keep_zeros: bool = False,
    rules: RuleSpec | None = None,
    weight_decay_names: Collection[str] | None = None,
    isolate_zero: bool = False,
    decay_to: str = ZERO,
    new: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return param groups for :class:`~hf_pdecay.AdamWLp`, those that decay first.

    Beside the hyperparameters each has ``decayed``, whether p-norm decay acts on it (its λ_p may be 0 at times), and
    ``rule``, the pattern that took its parameters. DTensors on different meshes, as under expert parallelism, are in
    different groups. A param group that decays by units has ``group`` and ``units`` too.

    Args:
        model: Any module, wrapped or not.
        p_norm: The run's p, unless a rule sets it.
        lambda_p: The run's λ_p, unless a rule sets it. None for the default, 0.01; if a rule has a target, what no rule
            takes then does not decay.
        weight_decay: λ₂ of the parameters in ``weight_decay_names``; the others get none. Biases that decay in units
            get that of the matrices.
        keep_zeros: Whether decayed weights that are zero stay zero.
        rules: ``lp_rules``, as :func:`~hf_pdecay.load_rules` returns them.
        weight_decay_names: Names of the parameters with L2 decay; those that decay by p norm if None.
        isolate_zero: Whether each wholly zero tensor that decays alone gets a param group of its own. DeepSpeed lays
            the weights of a group end to end: in it, such a tensor could not be recognised as one that must learn.
        decay_to: ``"zero"``, or ``"base"`` for all parameters to decay to their weights from before the first step,
            embeddings, norms and biases too.
        new: With ``"base"``, names of parameters that the base has not, such as those of a new head. They decay to zero
            as without it, and have no target.

    Raises:
        ValueError: If no parameter is trainable, a pattern matches no trainable one, or a rule cannot have the units
            that it asks for, as when one lies on several device meshes.
    """
    check_choice("decay_to", decay_to, DECAY_TO)
    assignments = assign(model, p_norm=p_norm, lambda_p=lambda_p, rules=rules, decay_to=decay_to, new=new)
    if not assignments:
        raise ValueError("The model has no trainable parameter: set requires_grad on what must be trained.")
    if keep_zeros:
        _check_keeps_zeros(model)
    l2_names = _weight_decay_names(assignments, weight_decay_names)
    named = [(clean_name(name), param) for name, param in model.named_parameters() if param.requires_grad]
    _warn_of_left_out(named, assignments)
    alone = wholly_zero([param for _, param in named]) if isolate_zero else [False] * len(named)
    together: dict[tuple[Assignment, float, str, Any], list[tuple[str, Tensor]]] = {}
    for (name, param), zero in zip(named, alone, strict=True):
        assignment = assignments[name]
        isolated = zero and assignment.decayed and assignment.group == ELEMENT and not keep_zeros
        mesh = getattr(param, "device_mesh", None)
        key = assignment, weight_decay if name in l2_names else 0.0, name if isolated else "", mesh
        together.setdefault(key, []).append((name, param))
    groups = []
    for (assignment, l2, *_), members in together.items():
        group = {
            "params": [param for _, param in members],
            "weight_decay": l2,
            "p_norm": assignment.p_norm,
            "lambda_p": assignment.lambda_p,
            "keep_zeros": keep_zeros and assignment.decayed,
            "decayed": assignment.decayed,
            "decay_to": assignment.decay_to,
            "rule": assignment.rule,
            "target_sparsity": assignment.target_sparsity,
        }
        if assignment.group != ELEMENT:
            group |= {"group": assignment.group, "units": _as_data(assignment, [name for name, _ in members])}
        groups.append(group)
    return sorted(groups, key=lambda group: not group["decayed"])


def _weight_decay_names(assignments: Mapping[str, Assignment], names: Collection[str] | None) -> set[str]:
    """Names of the parameters with L2 decay: all that share units if one of them has it."""
    if names is None:
        return {name for name, assignment in assignments.items() if assignment.decayed}
    chosen = {clean_name(name) for name in names}
    for assignment in set(assignments.values()):
        members = {member.param for layer in assignment.units for member in layer.members}
        chosen |= members if members & chosen else set()
    return chosen


def _as_data(assignment: Assignment, names: Sequence[str]) -> list[dict[str, Any]]:
    """The units in a param group as plain data, with parameters by their index among the group's names."""
    index = {name: number for number, name in enumerate(names)}
    units = []
    for layer in assignment.units:
        elsewhere = [member.param for member in layer.members if member.param not in index]
        if len(elsewhere) == len(layer.members):
            continue  # the whole layer is on another device mesh
        if elsewhere:
            raise ValueError(
                f"Invalid lp_rules: {assignment.rule!r} has group={assignment.group!r}, but {elsewhere[0]} is on "
                f"another device mesh than other parameters of {layer.name}; leave {layer.name} out of the rule."
            )
        members = [_member_as_data(member, index) for member in layer.members]
        units.append({"kind": layer.kind, "count": layer.count, "members": members, "name": layer.name})
    return units


def _member_as_data(member: Member[str], index: Mapping[str, int]) -> dict[str, Any]:
    data = asdict(member) | {"param": index[member.param]}
    if member.matrix is None:
        del data["matrix"]
    return data


def decayed_parameter_names(
    model: nn.Module, groups: Iterable[Mapping[str, Any]], params: Iterable[Sequence[Tensor]] | None = None
) -> list[str]:
    """Return the names of the model's parameters in the groups that decay, in the model's order.

    Tensors that a target leaves alone as a whole (:mod:`.target.still`) are not among them. Those that decay to a base
    are: they are unchanged, which counts.

    Args:
        model: The model whose parameters the groups hold.
        groups: An optimizer's ``param_groups``; a group without the key ``decayed`` counts if its λ_p is above 0.
        params: The model's parameters in each group, if the groups hold others.
    """
    groups = list(groups)
    lists = [group["params"] for group in groups] if params is None else params
    chosen = {
        id(param)
        for group, tensors in zip(groups, lists, strict=True)
        if is_decayed(group)
        for param, still in zip(tensors, still_weights(group, tensors), strict=True)
        if still < full_numel(param) or not still or decays_to_base(group)
    }
    return [clean_name(name) for name, param in model.named_parameters() if id(param) in chosen]


def still_by_name(
    model: nn.Module, groups: Iterable[Mapping[str, Any]], params: Iterable[Sequence[Tensor]]
) -> dict[str, int]:
    """Return how many weights a target leaves alone, by the name of the parameter; takes what groups hold as above."""
    counts = {
        id(param): still
        for group, tensors in zip(groups, params, strict=True)
        if is_decayed(group)
        for param, still in zip(tensors, still_weights(group, tensors), strict=True)
        if still
    }
    return {clean_name(name): counts[id(param)] for name, param in model.named_parameters() if id(param) in counts}
