"""Makes the optimizer of a run and its param groups."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import nn

from ..checks import is_number
from ..layers.matrices import is_linear
from ..names import clean_name
from ..optim.adamw_lp import AdamWLp
from ..optim.bases import ZERO
from ..optim.lp_decay import LpDecay
from ..optim.optimizer_names import arranged, make_optimizer
from ..optim.unit_kinds import ELEMENT, kind_of
from ..rules.assign import build_param_groups
from ..rules.table import NOT_IN_BASE
from .settings import DecaySettings


if TYPE_CHECKING:
    from transformers import TrainingArguments


def build_optimizer(
    model: nn.Module, args: TrainingArguments, settings: DecaySettings, **grouping: Any
) -> AdamWLp | LpDecay:
    """Make the optimizer of a run; ValueError if a rule or target matches nothing, or no parameter is trainable.

    Args:
        model: Any module, wrapped or not.
        args: Arguments of the run: learning rate, betas, eps and weight decay are read.
        settings: The settings of the decay.
        **grouping: ``weight_decay_names``, the names of the parameters with L2 decay, by default those that decay by p
            norm; ``isolate_zero``, whether each wholly zero tensor that decays gets its own group; ``theirs``, param
            groups of a Trainer such as sentence-transformers', whose losses may have weights. Their learning rates and
            weight decay hold; parameters that they leave out stay out. ``new``: names of the parameters that the
            base of the run has not.
    """
    return make_optimizer(
        settings.optim,
        _divided(model, args, settings, **grouping),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        options=settings.options,
        p_norm=settings.p_norm,
        lambda_p=settings.strength,
        skip_nonfinite=settings.skip_nonfinite,
    )


def param_groups_of(
    model: nn.Module, args: TrainingArguments, settings: DecaySettings, **grouping: Any
) -> list[dict[str, Any]]:
    """Return the param groups that :func:`build_optimizer` makes; takes the same arguments."""
    return arranged(settings.optim, _divided(model, args, settings, **grouping))


def check_hyperparameters(args: TrainingArguments) -> None:
    """Raise ValueError, with the name that the user knows, if a hyperparameter of Hugging Face is out of its range.

    A string, as YAML makes of ``1e-4``, becomes the number that it names.
    """
    most = {"learning_rate": math.inf, "weight_decay": math.inf, "adam_epsilon": math.inf}
    for name, limit in {**most, "adam_beta1": 1, "adam_beta2": 1}.items():
        value = getattr(args, name)
        if isinstance(value, str):
            with suppress(ValueError):
                value = float(value)
                setattr(args, name, value)
        if not (is_number(value) and 0 <= value < limit):
            right = "a finite number of at least 0" if limit == math.inf else "at least 0 and below 1"
            raise ValueError(f"Invalid {name}: {name}={value!r}; it must be {right}.")


def name_of(args: TrainingArguments) -> str:
    """Return the name in ``args.optim``, which is a string or an enum of Hugging Face's."""
    return str(getattr(args.optim, "value", args.optim))


def _divided(
    model: nn.Module,
    args: TrainingArguments,
    settings: DecaySettings,
    *,
    weight_decay_names: Collection[str] | None = None,
    isolate_zero: bool = False,
    theirs: Sequence[Mapping[str, Any]] | None = None,
    new: Collection[str] = (),
) -> list[dict[str, Any]]:
    _check_dense(model, settings.optim)
    # A target of the run, or modules to decay, ask for more than the rules do.
    everywhere = settings.target_sparsity is not None or settings.target_modules is not None
    groups = build_param_groups(
        model,
        p_norm=settings.p_norm,
        lambda_p=settings.strength if everywhere else settings.lambda_p,
        weight_decay=args.weight_decay,
        keep_zeros=settings.keep_zeros,
        rules=settings.lp_rules if isinstance(settings.lp_rules, dict) else None,
        weight_decay_names=weight_decay_names,
        isolate_zero=isolate_zero,
        decay_to=settings.decay_to,
        new=new,
    )
    if settings.target_modules is not None:
        groups = _in_target_modules(model, groups, settings.target_modules)
    return groups if theirs is None else _merged(groups, theirs)


def _check_dense(model: nn.Module, optim: str) -> None:
    """Raise ValueError for an embedding whose gradient will be sparse, which no optimizer with p-norm decay takes."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            raise ValueError(
                f"Invalid optim: optim={optim!r} takes no sparse gradients, and {clean_name(name)} is made with "
                "sparse=True. Set its attribute sparse to False, or freeze its weight."
            )


def _undecayed(group: Mapping[str, Any], params: list[nn.Parameter], rule: str = "not decayed") -> dict[str, Any]:
    """A group like another, without p-norm decay."""
    off = {"lambda_p": 0.0, "keep_zeros": False, "decayed": False, "target_sparsity": None, "decay_to": ZERO}
    return {**group, **off, "rule": rule, "params": params}


def _in_target_modules(
    model: nn.Module, groups: list[dict[str, Any]], targets: str | Sequence[str]
) -> list[dict[str, Any]]:
    """Take from the decay what decays by default outside the target modules; what a rule brought in stays."""
    chosen = {
        id(param)
        for name, module in model.named_modules()
        if _is_target(clean_name(name), module, targets)
        for param in module.parameters(recurse=False)
    }
    default = [group for group in groups if _is_by_default(group)]
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
            f"modules are named like: {', '.join(near)}. Give a list of substrings, a regular expression for the "
            f"whole name such as '.*{near[0].rpartition('.')[2]}', or 'all-linear'."
        )
    kept, rest = [], []
    for group in groups:
        if _is_by_default(group):
            outside = [param for param in group["params"] if id(param) not in chosen]
            if outside:
                rest.append(_undecayed(group, outside, "not in optim_target_modules"))
            group = {**group, "params": [param for param in group["params"] if id(param) in chosen]}
        if group["params"]:
            kept.append(group)
    decayed = [group for group in kept if group["decayed"]]
    return [*decayed, *rest, *(group for group in kept if not group["decayed"])]


def _is_by_default(group: Mapping[str, Any]) -> bool:
    """Whether what a group holds decays, and not by a rule."""
    return group["decayed"] and group["rule"] in ("default", NOT_IN_BASE)


def _is_target(name: str, module: nn.Module, targets: str | Sequence[str]) -> bool:
    """Whether Hugging Face's optimizers for chosen modules, such as GaLore, would take a module."""
    from transformers.trainer_utils import check_target_module_exists

    if isinstance(targets, str) and targets.replace("_", "-") == "all-linear":
        return is_linear(module)
    if not isinstance(targets, str) and not all(isinstance(part, str) for part in targets):
        raise ValueError(
            f"Invalid optim_target_modules: optim_target_modules={targets!r}; it must be a list of strings, a regular "
            "expression or 'all-linear'."
        )
    try:
        return bool(check_target_module_exists(targets, name))
    except re.error as error:
        raise ValueError(
            f"Invalid optim_target_modules: optim_target_modules={targets!r} is not a regular expression ({error})."
        ) from error


def _merged(ours: list[dict[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Our groups, divided as another Trainer's, with the learning rates and other options of its groups."""
    structured = [group for group in ours if kind_of(group) != ELEMENT]
    if structured:
        raise ValueError(
            f"Invalid lp_rules: group={kind_of(structured[0])!r} in a Trainer with param groups of its own, which "
            "could divide a unit; take a Trainer without, or rules without group."
        )
    index_of = {id(param): index for index, group in enumerate(ours) for param in group["params"]}
    merged = []
    for group in theirs:
        overrides = {key: value for key, value in group.items() if key != "params"}
        shares: dict[int | None, list[nn.Parameter]] = {}
        for param in group["params"]:
            shares.setdefault(index_of.get(id(param)), []).append(param)
        for index, params in shares.items():
            # Without an index they belong to no module of the model but, for example, to a loss.
            base = _undecayed(ours[0], params) if index is None else {**ours[index], "params": params}
            merged.append({**base, **overrides})
    return sorted(merged, key=lambda group: not group["decayed"])
