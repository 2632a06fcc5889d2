"""The keys that this package adds to an optimizer's param groups, and which groups decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor


Entries = Sequence[bool | list[int]]
"""For each parameter True if all of it is still, or the indices of the still matrices of a stack."""

DENSE, PRUNING, HEALING = "dense", "pruning", "healing"
"""The phases of a run with a target: before the first zeros, while zeros are made, and after the last ones."""


class DecayGroup(TypedDict, total=False):
    """What a param group may hold beside the keys of ``torch.optim``."""

    p_norm: float  # p of the penalty
    lambda_p: float  # λ_p in the next step; a target sets it, to 0.0 while nothing decays
    keep_zeros: bool  # whether weights that are zero stay zero
    decay_to: str  # what weights decay to: "zero", or "base", see bases.py
    skip_nonfinite: bool  # whether a NaN or infinite gradient skips the step
    rate_scale: float  # what multiplies the learning rate in a step; only where a target of changes sets it
    moments: str | None  # how both moments are stored; only in AdamWLp
    decayed: bool  # whether p-norm decay acts on the group in this run, whatever λ_p is now
    rule: str  # the rule of lp_rules that made the group, or "default"
    group: str  # the kind of unit that decays as one: "element", "row", "neuron", ..., or N:M
    units: list[dict[str, Any]] | None  # where these units lie in the group's parameters
    dormant_units: list[Tensor]  # for each layer a mask of its units that have been zero since the start
    target_sparsity: float | None  # the group's own target; 0 for none, None for the run's
    asked_sparsity: float  # the target that SparsityControl took for the group
    still: list[bool | list[int]]  # by parameter: True if the target leaves it alone, or which of its matrices
    still_unchanged: list[int]  # by parameter: how many of its still weights equal their base
    p_norm_end: float  # p at the end of a run that changes it
    phase: str  # DENSE, PRUNING or HEALING; only in groups with a target
    skipped_steps: int | Tensor  # steps skipped for NaN or infinite gradients
    decay_steps: int  # steps made; only in LpDecay
    use_muon: bool  # whether MuonWithAdamW steps the group by Muon


DECAYED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def can_decay(param: Tensor) -> bool:
    """Whether a parameter is of a dtype that p-norm decay acts on."""
    return param.dtype in DECAYED_DTYPES


def highest_rate(group: Mapping[str, Any]) -> float:
    """Return a group's highest learning rate: schedulers leave it in the group, OneCycleLR by another name."""
    return max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)


def is_left_alone(group: Mapping[str, Any], index: int) -> bool:
    """Whether a target leaves alone the parameter of that index, or matrices of it: then no decay acts on it."""
    return bool(still_entries(group, group["params"])[index])


def still_entries(group: Mapping[str, Any], params: Sequence[Tensor]) -> Entries:
    """Return for each parameter of a group what a target has noted under ``still``.

    Under DeepSpeed that is of the model's parameters, not of the flat tensors in the group.
    """
    entries: Entries = group.get("still") or ()
    return entries if len(entries) == len(params) else [[] for _ in params]


def steps_decay(group: Mapping[str, Any]) -> bool:
    """Whether a group's steps are those of weights that decay, as in all phases of a group with a target."""
    return group["lambda_p"] != 0 or "phase" in group


def is_decayed(group: Mapping[str, Any]) -> bool:
    """Whether p-norm decay acts on a group in this run: as ``decayed`` says, else if its steps decay."""
    return "p_norm" in group and bool(group.get("decayed", steps_decay(group)))


def decayed_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups on which p-norm decay acts."""
    return [group for group in groups if is_decayed(group)]
