"""The optimizer of a run and its param groups, from the run's arguments and the settings of the decay."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..layers.matrices import is_linear
from ..names import clean_name
from ..optim.adamw_lp import AdamWLp
from ..optim.lp_decay import LpDecay
from ..optim.named import arranged, make_optimizer
from ..optim.units import ELEMENT, kind_of
from ..rules.assign import build_param_groups
from .settings import DecaySettings


if TYPE_CHECKING:
    from transformers import TrainingArguments


def make(args: TrainingArguments, settings: DecaySettings, groups: list[dict[str, Any]]) -> AdamWLp | LpDecay:
    """Make the optimizer of a run.

    Args:
        args: Arguments of the run, from which learning rate, betas and eps are taken.
        settings: Those of the decay.
        groups: What :func:`param_groups_of` returned.
    """
    return make_optimizer(
        settings.optim,
        groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        options=settings.options,
        p_norm=settings.p_norm,
        lambda_p=settings.lambda_p,
        skip_nonfinite=settings.skip_nonfinite,
    )


def check_hyperparameters(args: TrainingArguments) -> None:
    """Check Hugging Face's own arguments that the optimizer takes, under the names that the user knows.

    Raises:
        ValueError: If one is out of its range.
    """
    most = {"learning_rate": math.inf, "weight_decay": math.inf, "adam_epsilon": math.inf}
    for name, limit in {**most, "adam_beta1": 1, "adam_beta2": 1}.items():
        value = getattr(args, name)
        if not 0 <= value < limit:
            right = "a finite number of at least 0" if limit == math.inf else "at least 0 and below 1"
            raise ValueError(f"Invalid {name}: {name}={value!r}; it must be {right}.")


def name_of(args: TrainingArguments) -> str:
    """Return the name in ``args.optim``, which is a text or an enum of Hugging Face's."""
    return str(getattr(args.optim, "value", args.optim))


def param_groups_of(
    model: nn.Module,
    args: TrainingArguments,
    settings: DecaySettings,
    *,
    weight_decay_names: Collection[str] | None = None,
    isolate_zero: bool = False,
    theirs: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Return the param groups of a run; see :func:`.rules.build_param_groups`.

    Args:
        model: Any module, wrapped or not.
        args: Arguments of the run, from which the weight decay is taken.
        settings: Those of the decay.
        weight_decay_names: Names of the parameters with L2 decay; those that decay by p norm if None.
        isolate_zero: Whether each wholly zero tensor that decays gets a group of its own.
        theirs: Param groups that a Trainer has in place of Hugging Face's, such as sentence-transformers', whose losses
            may have weights. Their learning rates and weight decay hold, and so does what they leave out.

    Raises:
        ValueError: If ``lp_rules`` or ``optim_target_modules`` match nothing, or no parameter is trainable.
    """
    groups = build_param_groups(
        model,
        p_norm=settings.p_norm,
        lambda_p=settings.lambda_p,
        weight_decay=args.weight_decay,
        keep_zeros=settings.keep_zeros,
        rules=settings.lp_rules if isinstance(settings.lp_rules, dict) else None,
        weight_decay_names=weight_decay_names,
        isolate_zero=isolate_zero,
    )
    if settings.target_modules is not None:
        groups = _in_target_modules(model, groups, settings.target_modules)
    return arranged(settings.optim, groups if theirs is None else _adopted(groups, theirs))


def _undecayed(group: Mapping[str, Any], params: list[nn.Parameter], rule: str = "not decayed") -> dict[str, Any]:
    """A group like another, without p-norm decay."""
    off = {"lambda_p": 0.0, "keep_zeros": False, "decayed": False, "target_sparsity": None}
    return {**group, **off, "rule": rule, "params": params}


def _in_target_modules(
    model: nn.Module, groups: list[dict[str, Any]], targets: str | Sequence[str]
) -> list[dict[str, Any]]:
    """Leave undecayed what decays by default and is no weight of a target module; what a rule brought in stays."""
    chosen = {
        id(param)
        for name, module in model.named_modules()
        if _is_target(clean_name(name), module, targets)
        for param in module.parameters(recurse=False)
    }
    default = [group for group in groups if group["decayed"] and group["rule"] == "default"]
    if not any(id(param) in chosen for group in default for param in group["params"]):
        decaying = {id(param) for group in default for param in group["params"]}
        owners = [
            clean_name(name)
            for name, module in model.named_modules()
            if any(id(param) in decaying for param in module.parameters(recurse=False))
        ]
        wanted = targets if isinstance(targets, str) else " ".join(targets)
        near = difflib.get_close_matches(wanted, owners, n=3, cutoff=0.3) or owners[:3]
        raise ValueError(
            f"Invalid optim_target_modules: optim_target_modules={targets!r} matches no module whose weights decay; "
            f"modules are named like: {', '.join(near)}. Give a list of parts of names, a regular expression for the "
            f"whole name such as '.*{near[0].rpartition('.')[2]}', or 'all-linear'."
        )
    kept, rest = [], []
    for group in groups:
        if group["decayed"] and group["rule"] == "default":
            outside = [param for param in group["params"] if id(param) not in chosen]
            if outside:
                rest.append(_undecayed(group, outside, "not in optim_target_modules"))
            group = {**group, "params": [param for param in group["params"] if id(param) in chosen]}
        if group["params"]:
            kept.append(group)
    return [*(each for each in kept if each["decayed"]), *rest, *(each for each in kept if not each["decayed"])]


def _is_target(name: str, module: nn.Module, targets: str | Sequence[str]) -> bool:
    """Whether Hugging Face's optimizers for chosen modules, such as GaLore, would take a module."""
    from transformers.trainer_utils import check_target_module_exists

    if isinstance(targets, str) and targets.replace("_", "-") == "all-linear":
        return is_linear(module)
    if not isinstance(targets, str) and not all(isinstance(each, str) for each in targets):
        raise ValueError(
            f"Invalid optim_target_modules: optim_target_modules={targets!r}; it must be a list of texts, a regular "
            "expression or 'all-linear'."
        )
    try:
        return bool(check_target_module_exists(targets, name))
    except re.error as error:
        raise ValueError(
            f"Invalid optim_target_modules: optim_target_modules={targets!r} is not a regular expression ({error})."
        ) from error


def _adopted(ours: list[dict[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Our groups, parted and ordered as another Trainer parts the parameters, each part with what it says of them."""
    structured = [group for group in ours if kind_of(group) != ELEMENT]
    if structured:
        raise ValueError(
            f"Invalid lp_rules: group={kind_of(structured[0])!r} in a Trainer that parts the parameters into param "
            "groups of its own, across which groups of weights could lie; take a Trainer without, or rules without "
            "group."
        )
    place = {id(param): number for number, group in enumerate(ours) for param in group["params"]}
    found = []
    for group in theirs:
        said = {key: value for key, value in group.items() if key != "params"}
        parts: dict[int | None, list[nn.Parameter]] = {}
        for param in group["params"]:
            parts.setdefault(place.get(id(param)), []).append(param)
        for number, params in parts.items():
            if number is None:  # no parameter of the model, such as one of a loss
                found.append({**_undecayed(ours[0], params), **said})
            else:
                found.append({**ours[number], **said, "params": params})
    return sorted(found, key=lambda group: not group["decayed"])
