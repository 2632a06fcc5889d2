"""The callback that brings a run to its target_sparsity."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..one_shot.methods import AUTO, OFF
from ..optim.bases import decays_to_base
from ..optim.param_groups import decayed_groups, is_decayed
from ..optim.shards import full_numel, group_params
from ..rules.assign import still_by_name
from ..rules.spec import parse_rules
from ..target.control import SparsityControl
from ..terminal import get_logger
from .arguments import settings_of
from .first_callback import FirstCallback
from .settings import DecaySettings


if TYPE_CHECKING:
    from .few_bits import RoundingMixin
    from .one_shot_cut import OneShotCut

logger = get_logger(__name__)

# More than the error of the sample from which zeros are counted.
_MISSED = 0.02
_NAMED = 4  # tensors that a sentence names


class SparsityControlCallback(FirstCallback):
    """Drives a ``SparsityControl`` through a run; does nothing without ``target_sparsity`` and ``p_norm_begin``.

    Args:
        one_shot: How the model is pruned at once, if it is: a method, ``"auto"`` or ``"off"``.

    Attributes:
        rounding: The Trainer, if it rounds weights.
    """

    def __init__(self, one_shot: str = OFF) -> None:
        self.one_shot = one_shot
        self.rounding: RoundingMixin | None = None
        self._cut: OneShotCut | None = None
        self._control: SparsityControl | None = None
        self._told: set[str] = set()  # names of what the target leaves alone

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Plan the run; ValueError if its steps cannot reach the target."""
        settings = settings_of(args)
        if settings is None:
            return
        begin = None if self.one_shot == OFF else self._plan_cut(settings, args, state, **kwargs)
        self._control = SparsityControl(kwargs["optimizer"], state.max_steps, settings, prunes_after=begin)
        if self.rounding is not None:
            self._control.first = self.rounding.vanishing
        self._prune_at_once(state, kwargs["model"])
        self._control.before_step(state.global_step + 1)
        self._note_zeros(state)
        if state.global_step >= self._control.schedule.end:
            missing = self._control.shortfall()  # all processes count together
            if missing > _MISSED and state.is_world_process_zero:
                logger.warning(
                    "The run goes on after step %d, past sparsity_end at step %d, and %.1f%% of what decays is missing "
                    "to target_sparsity: no more weights are pruned. Ask for a later sparsity_end, or for more steps.",
                    state.global_step,
                    self._control.schedule.end,
                    100 * missing,
                )
        to_base = any(budget.to_base for budget in self._control.budgets)
        # keep_zeros holds zeros, not unchanged weights; these may move while there are too many, until healing.
        kept = settings.keep_zeros and not to_base
        why = "keep_zeros keeps it" if kept else "past sparsity_begin zeros stay"
        zeros = "zero", why, "zeros", " without keep_zeros"
        schedule = self._control.schedule
        if state.global_step > (schedule.end if to_base else schedule.begin) or kept:
            excess = self._control.excess()
            if excess > _MISSED and state.is_world_process_zero:
                logger.warning(
                    "%.1f%% of what decays is %s beyond target_sparsity, and %s: the run will end with more %s than it "
                    "is asked for. Ask for as many, or start another from these weights%s.",
                    100 * excess,
                    *(("unchanged", "past sparsity_end unchanged weights stay", "of them", "") if to_base else zeros),
                )
        if self._control.lets_go and state.is_world_process_zero:
            logger.warning(
                "More of what decays is %s than target_sparsity asks for: these %s may learn until sparsity_begin "
                "and are made anew after it. Ask for as many as there are, and they stay.",
                *(("unchanged", "weights") if to_base else ("zero", "zeros")),
            )
        overruled = _overruled(settings) if self._control.budgets and state.is_world_process_zero else []
        if overruled:
            logger.warning(
                "target_sparsity wins over %s: it sets λ_p from the weights, step by step.", " and ".join(overruled)
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Prune if this is a pruning step, and set p, λ_p and ``keep_zeros`` for the next step."""
        if self._control is None:
            return
        self._prune_at_once(state, kwargs["model"])
        self._control.after_step(state.global_step)
        self._note_zeros(state)
        if self._control.schedule.prunes(state.global_step) and state.is_world_process_zero:
            self._tell_still(kwargs["model"], kwargs["optimizer"])
        if state.global_step < state.max_steps:
            # Here, not before the optimizer's step: DeepSpeed steps within backward, before any callback is called.
            self._control.before_step(state.global_step + 1)
        if self._control.budgets and state.global_step <= self._control.schedule.end:
            # So far no model is as sparse as asked: load_best_model_at_end and EarlyStoppingCallback start anew.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def _plan_cut(
        self, settings: DecaySettings, args: TrainingArguments, state: TrainerState, **kwargs: Any
    ) -> float | None:
        """Choose whether the run prunes at once, as its checkpoint says if it is resumed; return when, None if not."""
        from .one_shot_cut import OneShotCut, cut_at

        groups = decayed_groups(kwargs["optimizer"].param_groups)
        method = self.one_shot
        if state.global_step > 0:
            method = next((group["one_shot"] for group in groups if "one_shot" in group), OFF)
        elif method == AUTO and self.rounding is not None and self.rounding.widths():
            method = OFF  # measured: codes that training has not moved yet leave it less to repair
        begin = cut_at(settings, state.max_steps)
        step = replace(settings, sparsity_begin=begin).schedule(state.max_steps).begin
        self._cut = None
        if method != OFF and state.global_step <= step:
            with nullcontext() if self.rounding is None else self.rounding.without_rounding():
                self._cut = OneShotCut(
                    kwargs["model"], kwargs["train_dataloader"], method, must=self.one_shot != AUTO, seed=args.seed
                )
            method = self._cut.method
        for group in groups:
            group["one_shot"] = method
        if method == OFF:
            self._cut = None
        return None if method == OFF else begin

    def _prune_at_once(self, state: TrainerState, model: nn.Module) -> None:
        if self._cut is None or self._control is None or state.global_step != self._control.schedule.begin:
            return
        widths = {} if self.rounding is None else self.rounding.widths()
        with nullcontext() if self.rounding is None else self.rounding.without_rounding():
            self._cut.prune(model, self._control.moving_budgets(), widths, tell=state.is_world_process_zero)
        self._cut = None

    def _note_zeros(self, state: TrainerState) -> None:
        if self.rounding is not None and self._control is not None:
            self.rounding.note_zeros(made=state.global_step >= self._control.schedule.end)

    def _tell_still(self, model: nn.Module, optimizer: Any) -> None:
        """Warn of what the target leaves alone since this pruning step."""
        groups = decayed_groups(optimizer.param_groups)
        params = [
            tensors
            for group, tensors in zip(optimizer.param_groups, group_params(optimizer), strict=True)
            if is_decayed(group)
        ]
        still = still_by_name(model, groups, params)
        new = [name for name in still if name not in self._told]
        self._told = {*still}
        if not new:
            return
        count, of = sum(still.values()), sum(full_numel(param) for tensors in params for param in tensors)
        logger.warning(
            "The target leaves alone what has had no gradient yet or is frozen, %s of the %s weights that decay, %s: "
            "%s. %s",
            f"{count:,}",
            f"{of:,}",
            "in one tensor" if len(still) == 1 else f"in {len(still)} tensors",
            ", ".join(new[:_NAMED]) + (" and others" if len(new) > _NAMED else ""),
            "Nothing can move, so it cannot be met."
            if count == of
            else "They are unchanged, and count towards it."
            if any(map(decays_to_base, groups))
            else "It is a fraction of the others.",
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if the run was stopped before it reached target_sparsity."""
        if self._control is None or not self._control.budgets or state.global_step >= self._control.schedule.end:
            return
        missing = self._control.shortfall()  # all processes count together
        if state.is_world_process_zero:
            logger.warning(
                "The run stopped after step %d, before sparsity_end at step %d: %.1f%% of what decays is missing to "
                "target_sparsity. Resume it, or ask for an earlier sparsity_end.",
                state.global_step,
                self._control.schedule.end,
                100 * missing,
            )


def _overruled(settings: DecaySettings) -> list[str]:
    """The values of λ_p that the user gave and a target overrides."""
    given = []
    if settings.lambda_p is not None and settings.target_sparsity is not None:
        given.append(f"lambda_p={settings.lambda_p:g}")
    for rule in parse_rules(settings.lp_rules if isinstance(settings.lp_rules, dict) else {}):
        target = settings.target_sparsity if rule.target_sparsity is None else rule.target_sparsity
        if rule.lambda_p is not None and target:
            given.append(f"lambda_p={rule.lambda_p:g} in the rule {rule.text!r}")
    return given
