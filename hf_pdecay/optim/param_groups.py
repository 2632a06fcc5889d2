"""The keys that this package adds to an optimizer's param groups, and which groups decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict


if TYPE_CHECKING:
    from torch import Tensor


P_NORM = 0.8
"""p by default."""

LAMBDA_P = 0.01
"""λ_p by default."""

DENSE, PRUNING, HEALING = "dense", "pruning", "healing"
"""The phases of a run with a target: before the first zeros, while zeros are made, and after the last ones."""


class DecayGroup(TypedDict, total=False):
    """What a param group may hold beside the keys of ``torch.optim``.

    Attributes:
        p_norm: p of the penalty.
        lambda_p: λ_p in the next step. A target sets it, to 0.0 while nothing decays.
        keep_zeros: Whether weights that are zero stay zero.
        skip_nonfinite: Whether a NaN or infinite gradient skips the step.
        moments: What both moments are stored as; AdamWLp alone has it.
        decayed: Whether p-norm decay acts on the group in this run, whatever λ_p is now.
        rule: The rule of ``lp_rules`` that made the group, or ``"default"``.
        group: The kind of unit that decays as one: ``"element"``, ``"row"``, ``"neuron"``, ..., or N:M.
        units: Where these units lie in the group's parameters.
        dormant_units: For each layer a mask of its units that have been zero since the start.
        target_sparsity: The group's own target; 0 for none, None for the run's.
        asked_sparsity: The target that :class:`~hf_pdecay.SparsityControl` took for the group.
        p_norm_end: p at the end of a run that changes it.
        phase: :data:`DENSE`, :data:`PRUNING` or :data:`HEALING`; groups with a target alone have it.
        skipped_steps: Steps skipped for NaN or infinite gradients.
        decay_steps: Steps made; LpDecay alone has it.
        use_muon: Whether MuonWithAdamW steps the group by Muon.
    """

    p_norm: float
    lambda_p: float
    keep_zeros: bool
    skip_nonfinite: bool
    moments: str | None
    decayed: bool
    rule: str
    group: str
    units: list[dict[str, Any]] | None
    dormant_units: list[Tensor]
    target_sparsity: float | None
    asked_sparsity: float
    p_norm_end: float
    phase: str
    skipped_steps: int | Tensor
    decay_steps: int
    use_muon: bool


def steps_decay(group: Mapping[str, Any]) -> bool:
    """Whether a group's steps are those of weights that decay: stochastically rounded, on the backend for them.

    Those of a group with a target are so in all phases, also while its λ_p is 0.
    """
    return group["lambda_p"] != 0 or "phase" in group


def is_decayed(group: Mapping[str, Any]) -> bool:
    """Whether p-norm decay acts on a group in this run: as ``decayed`` says, else if its steps decay."""
    return "p_norm" in group and bool(group.get("decayed", steps_decay(group)))


def decayed_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups on which p-norm decay acts."""
    return [group for group in groups if is_decayed(group)]
