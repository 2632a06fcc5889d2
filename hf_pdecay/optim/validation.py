"""Checks of the arguments and checkpoints that a user gives to an optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..checks import check_choice, check_lambda_p, check_p_norm, is_number
from .bases import DECAY_TO
from .moments import check_moments
from .param_groups import DECAYED_DTYPES, DecayGroup, can_decay, steps_decay


# Keys of the groups of torch.optim.AdamW that say how it computes, not what.
FOREIGN_KEYS = ("amsgrad", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")


def check_hyperparameters(group: dict[str, Any]) -> None:
    """Check all settings of a group of AdamWLp; ValueError names the argument, its value and what would be right."""
    check_decay_settings(group)
    betas = group["betas"]
    are_valid = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(_in(beta, 0, 1) for beta in betas)
    _check(group, "betas", are_valid, "two numbers in [0, 1), such as (0.9, 0.999)")
    _check(group, "eps", _in(group["eps"], 0), "a finite number of at least 0, such as 1e-8")
    _check(group, "weight_decay", _in(group["weight_decay"], 0), "a finite number of at least 0")
    _check(group, "maximize", isinstance(group["maximize"], bool), "True or False")
    check_moments(group["moments"])


def check_decay_settings(group: dict[str, Any]) -> None:
    """Check a group's settings of p-norm decay, whatever the optimizer; raises ValueError likewise."""
    lr = group["lr"]
    single = isinstance(lr, Tensor) and lr.numel() == 1
    _check(group, "lr", _in(lr.item() if single else lr, 0), "a finite number of at least 0, or a tensor of one")
    check_p_norm(group["p_norm"])
    check_lambda_p(group["lambda_p"])
    for name in ("keep_zeros", "skip_nonfinite"):
        _check(group, name, isinstance(group[name], bool), "True or False")
    check_choice("decay_to", group["decay_to"], DECAY_TO)


def _in(value: Any, low: float, high: float = math.inf) -> bool:
    return is_number(value) and low <= float(value) < high


def _check(group: dict[str, Any], name: str, ok: bool, right: str) -> None:
    if not ok:
        raise ValueError(f"Invalid {name}: {name}={group[name]!r}; it must be {right}.")


def check_dtypes(group: Mapping[str, Any], name: str) -> None:
    """Raise ValueError, in the name of the optimizer, if a group has parameters of a dtype that it cannot step.

    Complex ones are stepped where nothing decays, and those without a gradient, as of quantised layers, need no step.
    """
    decays = steps_decay(group) or group["keep_zeros"]
    for param in group["params"]:
        if can_decay(param) or (not decays and (param.is_complex() or not param.requires_grad)):
            continue
        advice = "leave it out"
        if param.is_complex():
            advice = "put it into a group with lambda_p=0 and keep_zeros=False, or split it by torch.view_as_real"
        able, size = ", ".join(map(str, DECAYED_DTYPES)), len(group["params"])
        raise ValueError(
            f"{name} cannot {'decay' if decays else 'train'} a parameter of {param.dtype} (shape {tuple(param.shape)}, "
            f"group of {size}), but only {able}; {advice}."
        )


def check_state_dict(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Raise ValueError if a checkpoint cannot be one of an AdamW over the same parameters."""
    saved = state_dict["param_groups"]
    check_saved_groups(saved, groups)
    if any(group.get("amsgrad") for group in saved):
        raise ValueError("The optimizer checkpoint is of AdamW with amsgrad=True, which AdamWLp does not support.")
    params = [param for group in groups for param in group["params"]]
    ids = [key for group in saved for key in group["params"]]
    for param, key in zip(params, ids, strict=True):
        state = state_dict["state"].get(key)
        if not state:
            continue
        missing = {"step", "exp_avg", "exp_avg_sq"} - set(state)
        if missing:
            raise ValueError(
                f"The optimizer checkpoint has no {sorted(missing)[0]} for parameter {key}: it is of another "
                "optimizer, not of AdamW or AdamWLp."
            )
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != param.shape:
                raise ValueError(
                    f"The optimizer checkpoint holds {name} of shape {tuple(state[name].shape)} for parameter {key}, "
                    f"whose shape is {tuple(param.shape)}: it is of another model."
                )


# Keys of a param group that do not tell one base optimizer from another.
_NOT_OF_BASE = {*DecayGroup.__annotations__, "params", "param_names", "initial_lr", "max_lr"}


def check_saved_groups(
    saved: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]], source: str = "The optimizer checkpoint"
) -> None:
    """Check that the param groups of a checkpoint fit those of an optimizer; messages call the checkpoint ``source``.

    Raises ValueError if the numbers of tensors or the rules differ: moments would silently go to other weights. It also
    does if each has hyperparameters that the other lacks, as SGD and AdamW have: moments would silently be lost.
    """
    sizes, saved_sizes = ([len(group["params"]) for group in side] for side in (groups, saved))
    if sizes != saved_sizes:
        raise ValueError(
            f"{source} has param groups of {saved_sizes} tensors, this optimizer has {sizes}: it is of another model, "
            "or of another optim, lp_rules or weight_decay."
        )
    for ours, theirs in zip(groups, saved, strict=True):
        # A newer release may add hyperparameters to one side.
        strange, missing = (
            sorted(one.keys() - other.keys() - _NOT_OF_BASE) for one, other in ((theirs, ours), (ours, theirs))
        )
        if strange and missing:
            raise ValueError(
                f"{source} has a param group with {strange[0]} and without {missing[0]}, which this optimizer has: it "
                "is of another optimizer."
            )
        names = ("rule", "group", "decay_to") if "rule" in theirs else ("decay_to",)
        for name in names if "decay_to" in theirs else names[:-1]:
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"{source} has a param group with {name}={theirs.get(name)!r}, this optimizer has "
                    f"{name}={ours.get(name)!r} there: it is of another optim or of other lp_rules."
                )
