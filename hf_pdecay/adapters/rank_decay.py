"""Group decay over the ranks of a LoRA adapter, so that whole ranks die: a callback for any Trainer.

A rank is one group: row r of A and column r of B. Decay for any p norm (https://huggingface.co/papers/2404.10824) acts
on the root mean square of a group in place of each weight alone. With w_g the n weights of the group before the step:

    s_g = (‖w_g‖₂ / √n)^(2-p),   w_g ← w'_g · s_g / (s_g + α λ_p)

It minimises (λ_p / p) Σ_g n (‖w_g‖₂ / √n)^p: for p = 1 the group lasso.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optim.decay import check_lambda_p, check_p_norm, shrink_factor
from ..optim.shards import is_sharded
from ..target.budgets import check_p_norms, check_target
from ..target.schedule import BEGIN, END, Schedule, check_schedule
from .factors import LoraFactors, alive, lora_factors


if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

# With a target: by which part a rank shrinks in a step whose root mean square is that of the next one to be cut.
_PRESSURE = 0.05


class RankDecayCallback(TrainerCallback):
    """Decays the ranks of a LoRA adapter as groups while it trains, so that ranks die and can be cut.

    Works with any Trainer and any optimizer; the shrink follows the optimizer's step. Give the weights of the adapter
    no decay of their own beside it (``lambda_p=0``, or another optimizer). Ranks whose B is still zero, as all are at
    the start, are left alone until it is not; dead ranks stay dead. All that it must know is in the weights, so a
    resumed run goes on as it was.

        >>> trainer = Trainer(model=peft_model, args=args, train_dataset=dataset)
        >>> RankDecayCallback(target_rank_sparsity=0.5).attach(trainer)
        >>> trainer.train()
        >>> shrink_ranks(peft_model).save_pretrained("adapter")

    Every log event of the training loss carries ``sparsity/ranks``, the fraction of dead ranks.

    Args:
        p_norm: p of the group norm, above 0 and below 2; 0.5 by default, as the ranks of a layer hardly differ in size
            and a higher p lets all die at once.
        lambda_p: λ_p, at least 0; has no effect where there is a target.
        target_rank_sparsity: Fraction of dead ranks at the end, in [0, 1): between ``begin`` and ``end`` the ranks with
            the least ‖scaling · B_r A_r‖ are cut, over all layers together, and decay before they are. None for what
            λ_p gives.
        begin: Fraction of the run after which ranks begin to be cut.
        end: Fraction of the run after which the target is reached.
        adapter_name: Which adapter.

    Raises:
        ValueError: If an argument is out of range; when training begins, if the model has no such adapter, its weights
            are not float32 or sharded, or the optimizer does not train them.
    """

    def __init__(
        self,
        *,
        p_norm: float = 0.5,
        lambda_p: float = 0.01,
        target_rank_sparsity: float | None = None,
        begin: float = BEGIN,
        end: float = END,
        adapter_name: str = "default",
    ) -> None:
        self.p_norm = check_p_norm(p_norm)
        check_p_norms(p_norm, targeted=True)  # above 2 no rank would die without a target either
        self.lambda_p = check_lambda_p(lambda_p)
        self.target = check_target(target_rank_sparsity, "target_rank_sparsity")
        check_schedule(begin, end)
        self._span = begin, end
        self.adapter_name = adapter_name
        self._layers: list[LoraFactors] = []
        self._groups: list[dict[str, Any]] = []
        self._norms: list[tuple[Tensor, Tensor]] = []
        self._schedule = Schedule(0, 0)

    def attach(self, trainer: Trainer) -> RankDecayCallback:
        """Make this the first callback of a Trainer, before its trackers, and return it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the adapter and the param groups of its weights."""
        self._layers = [each for each in lora_factors(kwargs["model"], self.adapter_name) if each.a.requires_grad]
        if not self._layers:
            raise ValueError(f"RankDecayCallback: the model has no LoRA adapter {self.adapter_name!r} that is trained.")
        by_param = {id(param): group for group in kwargs["optimizer"].param_groups for param in group["params"]}
        for each in self._layers:
            if is_sharded(each.a) or id(each.a) not in by_param:
                raise ValueError(
                    "RankDecayCallback takes an optimizer that steps whole weights: one process or DDP, no FSDP, no "
                    "DeepSpeed."
                )
            if each.a.dtype != torch.float32:
                raise ValueError(
                    f"RankDecayCallback takes adapter weights in float32, and those of {each.name!r} are "
                    f"{each.a.dtype}, in which a small shrink is lost to rounding: leave autocast_adapter_dtype=True, "
                    "PEFT's default."
                )
        self._groups = [by_param[id(each.a)] for each in self._layers]
        begin, end = self._span
        self._schedule = Schedule(round(begin * state.max_steps), round(end * state.max_steps))

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the norms before the step."""
        self._norms = [each.norms for each in self._layers]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shrink each rank."""
        step = state.global_step + 1
        strength = None
        if self.target is not None:
            strength = self._pressure(step)
        for each, group, norms in zip(self._layers, self._groups, self._norms, strict=True):
            rms = _rms(each, norms)
            factor = shrink_factor(rms, self.p_norm, group["lr"] * self.lambda_p if strength is None else strength)
            # One of the two is zero: not yet awake. Both: dead, and momentum is not to bring it back.
            factor.masked_fill_((norms[0] == 0) ^ (norms[1] == 0), 1).masked_fill_(rms == 0, 0)
            _scale(each, factor)

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Cut, where the schedule has a cut after this step."""
        step = state.global_step
        if self.target is None or not (self._schedule.prunes(step) or step == self._schedule.end):
            return
        least = [each.layer.scaling[self.adapter_name] * torch.mul(*each.norms) for each in self._layers]
        count = self._asked(step)
        flat = torch.cat([each.cpu() for each in least])
        doomed = torch.zeros(len(flat), dtype=torch.bool)
        doomed[torch.argsort(flat, stable=True)[:count]] = True
        for each, some in zip(self._layers, doomed.split([len(each) for each in least]), strict=True):
            _scale(each, (~some).to(each.a.device, torch.float32))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the fraction of dead ranks to what is logged of the training loss."""
        if logs is None or "loss" not in logs or not self._layers:
            return
        dead = sum(int((~alive(each)).sum()) for each in self._layers)
        value = {"sparsity/ranks": dead / self._total}
        logs.update(value)
        state.log_history[-1].update(value)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what came of it."""
        dead = sum(int((~alive(each)).sum()) for each in self._layers)
        if state.is_world_process_zero:
            logger.info("%d of %d ranks are dead; shrink_ranks() takes them out.", dead, self._total)

    @property
    def _total(self) -> int:
        return sum(each.a.shape[0] for each in self._layers)

    def _asked(self, step: int) -> int:
        """How many ranks are to be dead after a step."""
        return round((self.target or 0.0) * self._schedule.progress(step) * self._total)

    def _pressure(self, step: int) -> float:
        """α λ_p for a step on the way to a target: the rank that the next cut takes last shrinks by a small part."""
        count = self._asked(self._schedule.next_pruning(step))
        if not self._schedule.begin < step <= self._schedule.end or not count:
            return 0.0
        found = [_rms(each, norms).cpu() for each, norms in zip(self._layers, self._norms, strict=True)]
        return _PRESSURE * float(torch.cat(found).kthvalue(count)[0]) ** (2 - self.p_norm)


def _rms(factors: LoraFactors, norms: tuple[Tensor, Tensor]) -> Tensor:
    """Root mean square of the weights of each rank."""
    return torch.hypot(*norms) / math.sqrt(factors.size)


def _scale(factors: LoraFactors, factor: Tensor) -> None:
    """Multiply each rank by a factor, in place; 0 sets it to zero."""
    factors.a.mul_(factor.view(-1, *[1] * (factors.a.ndim - 1)))
    factors.b.mul_(factor.view(-1, *[1] * (factors.b.ndim - 2)))
