"""How a run reaches its target sparsity: pruning on a schedule, the law that sets λ_p, and healing.

From ``begin`` to ``end`` the share of zeros follows a schedule up to the target: after some steps as many of the least
salient weights are set to 0 as the schedule asks for. Saliency is the magnitude in Adam's metric, |w| v^(1/4): its
square, w² √v, is the loss that removing a weight costs to second order (optimal brain damage, LeCun et al. 1989), with
√v, Adam's divisor, for the curvature. Units have the mean of w² √v, and their root mean square as magnitude.

Between prunings the weights compete. λ_p is a share of the one that would zero half of the weights to be kept by the
end of the run, if they had no gradient. In a short run at a low learning rate, as in fine-tuning, that λ_p would move
weights further than Adam's steps can, so it is also at most a share of the one whose decay of the median weight equals
Adam's largest step, the learning rate. And it never makes more weights die than the next pruning takes. After ``end``
zeros stay and the other weights train on ("healing").

Where weights decay to a base, all of this is about their changes: an unchanged weight is what a zero is elsewhere, and
pruned weights get the value of their base. Changes begin at 0 and grow, and λ_p with them, as it is set from their
magnitudes at each pruning. At first all weights move freely, until fewer of them have not moved yet than the next
pruning asks for: in low precision at a small learning rate that takes a while. In healing unchanged weights are held by
a λ_p that changes nothing else, as ``keep_zeros`` is about zeros of the weights.

A model that may change 1% of its weights learns slowly at a rate for all of them: at one rate the length of Adam's step
falls with the root of their number. So the learning rate of such a group grows by (1 / share that may change) to the
power ``rate_growth``, by default 1/2, which keeps that length. The scheduler's rate in the group stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim.bases import decays_to_base
from ..optim.decay import lambda_for_threshold
from ..optim.defaults import LAMBDA_P
from ..optim.param_groups import DENSE, HEALING, PRUNING, decayed_groups, highest_rate, is_decayed
from ..optim.shards import change_here, group_params, is_sharded, publish
from ..optim.unit_kinds import UNIT_KINDS, kind_of, n_of_m
from ..optim.unit_operations import Values, alive_units
from ..optim.units import units_of
from ..terminal import get_logger
from .budgets import Budget, divide_target, has_target, implied_target
from .pruning import excess, lacking_moments, prune, rank_by_magnitude, zeros_in, zeros_wanted
from .settings import Target, check_p_norms
from .still import mark_still


logger = get_logger(__name__)

_MIN_STEPS = 10

# The λ_p that holds zeros, as zero absorbs, and leaves all other weights as they are. Unlike keep_zeros it lets tensors
# that have been zero from the start become non-zero.
HOLDING = 1e-24
# The same for α λ_p: the next rate may be less than the present one.
_HELD = 1e-34
# A dense model has as few zeros at the start, in low precision, which need not be held.
_FEW_ZEROS = 1e-3

# At a ``sparsity_decay`` of 1 a weight of the median magnitude decays by at most this share of the learning rate in a
# step. Runs from scratch stay far below it.
_OF_RATE = 0.1

# How much of the change is made when the decay ends, so that pruning alone chooses the last weights.
_LAST_DECAY = 0.99


class SparsityControl:
    """Brings the decayed weights of an optimizer to a sparsity, step by step.

    A training loop calls it around each step of the optimizer, counted from 1:

        >>> control = SparsityControl(optimizer, total_steps, target_sparsity=0.9)
        >>> for step in range(1, total_steps + 1):
        ...     control.before_step(step)
        ...     loss.backward()  # where DeepSpeed steps
        ...     optimizer.step()
        ...     control.after_step(step)

    Its memory lies in the param groups, so a checkpoint of the optimizer carries it: a resumed loop goes on at the next
    step. Groups on which no decay acts (:func:`~hf_pdecay.optim.param_groups.is_decayed`) do not change.

    Args:
        optimizer: An :class:`~hf_pdecay.AdamWLp`. A group may name a ``target_sparsity`` of its own.
        total_steps: Number of optimizer steps of the whole run.
        target: The settings, a :class:`~hf_pdecay.target.settings.Target`; its defaults if None.
        prunes_after: Fraction of the run after which zeros begin, if that is later than ``sparsity_begin``, from which
            p goes to its last value.
        **fields: Fields of ``Target`` that win over those of ``target``.

    Raises:
        ValueError: If an argument is out of range, a target cannot be reached, or p is 2 or more where there is one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        target: Target | None = None,
        *,
        prunes_after: float | None = None,
        **fields: Any,
    ) -> None:
        self._optimizer = optimizer
        self._total_steps = total_steps
        self._target = replace(target or Target(), **fields)
        # The schedules of p and of the zeros.
        self._annealing = self._target.schedule(total_steps)
        begin = self._target.sparsity_begin if prunes_after is None else prunes_after
        self.schedule = replace(self._target, sparsity_begin=begin).schedule(total_steps)
        # Gives marks of the weights that go first, by the ids of parameters, if no more are marked than are to go.
        self.first: Callable[[], Mapping[int, Tensor]] | None = None
        self._told = False  # by which score weights are ranked
        # Whether zeros, or unchanged weights, that were there at the start are made anew, as they are too many.
        self.lets_go = False
        self._adopt()

    def _adopt(self) -> None:
        """Plan for the optimizer's present param groups."""
        groups, params = self._optimizer.param_groups, group_params(self._optimizer)
        self._adopted = groups, params
        self.budgets = plan_target(groups, self._total_steps, self._target, params)
        self._groups = [group for group in groups if has_target(group, self._target.target_sparsity, groups)]
        for group in decayed_groups(groups):
            group.setdefault("p_norm_end", group["p_norm"])
        # Whether λ_p is still the user's. A checkpoint of shards brings the λ_p that a control has set, but not
        # `asked_sparsity`: torch.distributed.checkpoint restores only entries that the new groups have.
        whole = _same([group["params"] for group in groups], params)
        whole = whole and not any(is_sharded(param) for tensors in params for param in tensors)
        unset = any("asked_sparsity" not in group for group in self._groups)
        self._unset = unset and (whole or not self._optimizer.state)
        self._note_targets()

    def _note_targets(self) -> None:
        for budget in self.budgets:
            for group, _ in budget.members:
                group["asked_sparsity"] = budget.target

    def _look(self) -> None:
        """Divide the targets anew over what can move now."""
        mark_still(self._optimizer)
        groups, params = self._adopted
        self.budgets = divide_target(groups, self._target.target_sparsity, self._target.sparsity_budget, params)
        self._note_targets()

    def moving_budgets(self) -> list[Budget]:
        """Return the budgets, with the targets divided anew over what can move now."""
        self._refresh()
        self._look()
        return self.budgets

    def _refresh(self) -> None:
        """Plan anew if the optimizer has other param groups (as after loading a state) or parameters (FSDP2)."""
        groups, params = self._adopted
        if self._optimizer.param_groups is not groups or not _same(group_params(self._optimizer), params):
            self._adopt()

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Set p, λ_p, ``keep_zeros`` and the phase of the groups for the next step.

        Args:
            step: Number of that step, counted from 1.
        """
        self._refresh()
        schedule = self.schedule
        if self._target.p_norm_begin is not None:
            for group in decayed_groups(self._optimizer.param_groups):
                begin, end = self._target.p_norm_begin, group["p_norm_end"]
                group["p_norm"] = begin + self._annealing.progress(step) * (end - begin)
        upcoming = schedule.progress(schedule.next_pruning(step))
        decaying = self._target.sparsity_decay > 0 and schedule.begin < step and upcoming < _LAST_DECAY
        fresh = schedule.prunes(step - 1) or step == schedule.begin + 1 or self._unset
        if step <= schedule.begin and (step == 1 or self._unset):
            self._hold_first_zeros(step)
        for group in self._groups:
            if decays_to_base(group):
                # By the target as it was given: that of what moves is not known yet when a run resumes.
                own = implied_target(kind_of(group), group.get("target_sparsity"))
                own = group.get("target_sparsity") if own is None else own
                target = self._target.target_sparsity if own is None else own
                group["rate_scale"] = (1 - (target or 0.0) * schedule.done(step)) ** -self._target.rate_growth
        if fresh and schedule.begin < step <= schedule.end:
            self._set_lambda_p(upcoming, decaying)
        self._unset = False
        for group in self._groups:
            group["phase"] = DENSE if step <= schedule.begin else PRUNING if step <= schedule.end else HEALING
            if decays_to_base(group):
                if group["phase"] == HEALING:
                    group["lambda_p"] = _holding(group)
                group["keep_zeros"] = self._target.keep_zeros
                continue
            if not decaying and step > schedule.begin:
                group["lambda_p"] = 0.0
            # While nothing decays pruned weights must be held (else zero absorbs). Pruned units hold by themselves, and
            # single zeros in living units need not be kept.
            pruned = group["phase"] != DENSE and kind_of(group) not in UNIT_KINDS
            group["keep_zeros"] = self._target.keep_zeros or (pruned and group["lambda_p"] == 0)

    def _hold_first_zeros(self, step: int) -> None:
        """Set λ_p before the first pruning: zeros stay, unless there are more than the target asks for.

        So do unchanged weights, if their base is not what the run starts from, so that others differ from theirs.
        """
        sparse, excessive = set(), set()
        for budget in self.budgets:
            if budget.to_base and step > 1:
                continue  # some have just not moved yet
            zeros = zeros_in(budget, self._optimizer)
            if zeros > _FEW_ZEROS * budget.units:
                sparse |= {id(group) for group, _ in budget.members}
            # A block can have more zeros than its pattern asks for.
            if zeros > zeros_wanted(budget, 1.0) and n_of_m(budget.kind) is None:
                excessive |= {id(group) for group, _ in budget.members}
        for group in self._groups:
            held = id(group) in sparse - excessive
            group["lambda_p"] = HOLDING if held else 0.0
            if held and kind_of(group) in UNIT_KINDS and "dormant_units" not in group:
                # Units that are zero beside living ones have been pruned: only a layer of zeros waits to learn.
                layers = units_of(group)
                changes = Values(partial(change_here, optimizer=self._optimizer)) if decays_to_base(group) else None
                group["dormant_units"] = []
                for layer in layers:
                    values = None if changes is None else changes.of(layer, group["params"])
                    some = alive_units(layer, group["params"], values).any().cpu()
                    group["dormant_units"].append((~some).expand(layer.count).clone())
        self.lets_go = bool(excessive)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Prune, if the schedule says so after this step.

        Args:
            step: Number of the step that was just made, counted from 1.
        """
        if not self._told:
            self._tell_score()
        if not self.schedule.prunes(step):
            return
        marks = {} if self.first is None else self.first()
        for budget in self.moving_budgets():
            prune(budget, self._optimizer, self.schedule.progress(step), marks)
        for group in self._groups if step == self.schedule.end else []:
            if kind_of(group) in UNIT_KINDS:
                # Units that have not learned by now count as zeros of the target.
                masks = group.get("dormant_units") or ()
                group["dormant_units"] = [torch.zeros(len(mask), dtype=torch.bool) for mask in masks]
        publish(self._optimizer)

    def _tell_score(self) -> None:
        """Warn, as soon as the optimizer has made its state, if it keeps second moments that cannot rank weights."""
        self._refresh()
        states = [self._optimizer.state.get(param) for budget in self.budgets for param in budget.params]
        self._told = any(states)
        lacking = [param for budget in self.budgets for param in lacking_moments(budget, self._optimizer)]
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not lacking or not any(state and "exp_avg_sq" in state for state in states):
            return
        if not distributed or torch.distributed.get_rank() == 0:
            logger.warning(
                "The optimizer keeps no second moment of each weight for %d of %d tensors that have a target, such as "
                "one of shape %s: all weights that share their target are ranked by magnitude alone.",
                len(lacking),
                len(states),
                tuple(lacking[0].shape),
            )

    def shortfall(self) -> float:
        """Return about which fraction of the controlled weights, or units, is missing to the targets."""
        return self._mean_excess(-1)

    def excess(self) -> float:
        """Return about which fraction of the controlled weights, or units, is zero or unchanged beyond the targets."""
        return self._mean_excess(1)

    def _mean_excess(self, sign: int) -> float:
        """Return the mean over all budgets of the excess of one sign, weighted by their numbers of weights."""
        budgets = self.moving_budgets()
        parts = [max(sign * excess(budget, self._optimizer), 0.0) * budget.numel for budget in budgets]
        return sum(parts) / sum(budget.numel for budget in budgets) if parts else 0.0

    def _set_lambda_p(self, upcoming: float, decaying: bool) -> None:
        """Set λ_p of all groups to what their weights can bear until the next pruning, at progress ``upcoming``.

        If nothing decays any more, only those that decay to a base get one.
        """
        if not decaying and not any(decays_to_base(group) for group in self._groups):
            return
        self._look()
        limits: dict[int, float] = {}
        bound: set[int] = set()  # groups in which unchanged weights must stay
        for budget in self.budgets:
            if not decaying and not budget.to_base:
                continue
            ranking = rank_by_magnitude(budget, self._optimizer)
            median, next_pruning = ranking.quantile((1 + budget.target) / 2), ranking.quantile(budget.target * upcoming)
            for group, _ in budget.members:
                limit = self._lambda_p(group, median, next_pruning) if decaying else 0.0
                limits[id(group)] = min(limits.get(id(group), limit), limit)
                if next_pruning > 0:
                    bound.add(id(group))
        for group in self._groups:
            # What was held once stays so.
            free = decays_to_base(group) and id(group) not in bound and (self._unset or group["lambda_p"] == 0)
            group["lambda_p"] = limits.get(id(group), 0.0) or (0.0 if free else HOLDING)

    def _lambda_p(self, group: dict[str, Any], median: float, next_pruning: float) -> float:
        """Return λ_p for a group from its budget's magnitudes at the median and at the next threshold."""
        rate = highest_rate(group) * group.get("rate_scale", 1.0)
        if rate <= 0:
            return 0.0
        # Most schedules fall to 0: their rates add up to about half of the highest rate times the steps.
        halving = lambda_for_threshold(group["p_norm"], median, 0.5 * rate * self._total_steps)
        # A step shrinks |w| by about α λ_p |w|^(p - 1).
        bearable = _OF_RATE * median ** (1 - group["p_norm"]) if median > 0 else math.inf
        wanted = self._target.sparsity_decay * min(halving, bearable)
        return min(wanted, lambda_for_threshold(group["p_norm"], next_pruning, rate * self.schedule.interval))


def _holding(group: Mapping[str, Any]) -> float:
    """The λ_p that holds unchanged weights of a group at its present rate: α λ_p must not vanish in float32."""
    rate = group["lr"]
    if isinstance(rate, Tensor) and not rate.is_cpu:
        return HOLDING  # without a wait for the device
    return _HELD / float(rate) if float(rate) > 0 else HOLDING


def _same(one: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> bool:
    """Whether two lists of lists hold the very same tensors."""
    return [list(map(id, tensors)) for tensors in one] == [list(map(id, tensors)) for tensors in other]


def _why_none(groups: Sequence[dict[str, Any]]) -> str:
    """Why no group decays, and what to do about it."""
    able = [group for group in groups if "p_norm" in group]
    if able and not any("decayed" in group for group in able):
        return (
            "all param groups have lambda_p=0, which says that nothing decays. Give lambda_p above 0, such as "
            f"{LAMBDA_P:g}, to the groups that shall become sparse: the target then sets λ_p step by step"
        )
    kept = sorted({rule for group in able if ": " in (rule := str(group.get("rule", ""))) and not is_decayed(group)})
    return (
        f"nothing that is trained decays by p norm{f' ({kept[0]})' if kept else ''}. Train layers that do, "
        f"{'remove the parametrization or merge the adapter first, ' if kept else ''}bring weights in by lp_rules, or "
        "take AdamWLp or LpDecay"
    )


def plan_target(
    groups: Sequence[dict[str, Any]],
    total_steps: int | None,
    target: Target,
    params: Sequence[Sequence[Tensor]] | None = None,
) -> list[Budget]:
    """Divide a run's weights into the budgets that share a target, and check that the run can reach them.

    ``total_steps`` is None if not known yet. Give the model's parameters of each group as ``params`` where groups hold
    others. Raises ValueError if a target cannot be reached, or p is 2 or more where there is one.
    """
    shares = divide_target(groups, target.target_sparsity, target.sparsity_budget, params)
    if target.target_sparsity and not any(decayed_groups(groups)):
        raise ValueError(
            f"Invalid target_sparsity: target_sparsity={target.target_sparsity!r}, and {_why_none(groups)}."
        )
    for group in decayed_groups(groups):
        p_norm = group.get("p_norm_end", group["p_norm"])
        check_p_norms(
            targeted=has_target(group, target.target_sparsity), p_norm=p_norm, p_norm_begin=target.p_norm_begin
        )
    if not shares or total_steps is None:
        return shares
    schedule, begin, end = target.schedule(total_steps), target.sparsity_begin, target.sparsity_end
    if schedule.end - schedule.begin < _MIN_STEPS:
        raise ValueError(
            f"Invalid max_steps: of {total_steps} steps only {schedule.end - schedule.begin} lie between "
            f"sparsity_begin={begin:g} and sparsity_end={end:g}, too few to reach target_sparsity. It takes at least "
            f"{_MIN_STEPS} there, so max_steps of at least {math.ceil((_MIN_STEPS + 1) / (end - begin))}, or as many "
            "by num_train_epochs; or move the two apart."
        )
    return shares
