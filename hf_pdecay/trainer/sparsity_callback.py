"""The callback that counts zeros, or unchanged weights, during a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..checks import check_choice
from ..files import append_line, remove_leftovers, write_text
from ..optim.adamw_lp import AdamWLp
from ..optim.bases import decays_to_base
from ..optim.param_groups import is_decayed
from ..optim.shards import group_params, settle
from ..optim.unit_kinds import ELEMENT, kind_of
from ..rules.assign import decayed_parameter_names
from ..rules.table import group_table
from ..sparsity.counting import measure_sparsity
from ..sparsity.defaults import NEAR_ZERO_THRESHOLD
from ..sparsity.file_names import HISTORY_FILE, PICTURE_FILE, REPORT_FILE, RUN_FILES
from ..sparsity.history import history_line, is_history_of, read_history, set_history_aside
from ..sparsity.report import SparsityReport
from ..target.forecast import DecayingGroup, forecast
from ..terminal import get_logger, print_rich
from .first_callback import FirstCallback
from .measuring import all_must_count, measure_in_run
from .training_flags import SPARSITY_LOGGING


logger = get_logger(__name__)

_SCHEDULE_SAMPLES = 1000
_NAMED = 4  # tensors that a sentence names


class SparsityCallback(FirstCallback):
    """Logs the exact zeros of a model while it trains, and reports them at the end.

    When the training loss is logged, it adds ``sparsity/overall`` (decayed weights), ``sparsity/model`` and, where
    weights decay as units, the fraction of dead units, such as ``sparsity/neurons``, to the values, and appends a line
    to ``sparsity.jsonl`` in ``output_dir``. At the end it writes ``sparsity.json`` and ``sparsity.png`` and prints a
    table. Where weights decay to their base, it logs the fraction that is equal to it, as ``delta/overall`` and so on,
    and zeros only of what decays to zero. It must run before the trackers: ``PDecayTrainer`` puts it first, with
    another Trainer call :meth:`attach`.

        >>> trainer = Trainer(model=model, args=args, train_dataset=dataset)
        >>> SparsityCallback(sparsity_logging="layer").attach(trainer)

    Args:
        sparsity_logging: ``"overall"``, or ``"layer"`` to add ``sparsity/layer/<name>``, or ``delta/layer/<name>``, for
            each decayed tensor.
        near_zero_threshold: Magnitude below which a non-zero weight counts as near zero.

    Raises:
        ValueError: If ``sparsity_logging`` is neither of the two.
    """

    def __init__(self, sparsity_logging: str = "overall", near_zero_threshold: float = NEAR_ZERO_THRESHOLD) -> None:
        check_choice("sparsity_logging", sparsity_logging, SPARSITY_LOGGING)
        self.sparsity_logging = sparsity_logging
        self.near_zero_threshold = near_zero_threshold
        self.saved_weights: Callable[[], Iterable[tuple[str, Tensor]]] = tuple  # where they are not the model's
        self._skipped_steps = 0
        self._said_that_all_are_skipped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open ``sparsity.jsonl``, and forecast the decay."""
        if state.is_world_process_zero:
            _open_history(_folder(args), state)
            if hasattr(kwargs.get("model"), "peft_config"):
                from ..adapters.factors import warn_of_changed_base

                warn_of_changed_base(kwargs["model"])
        optimizer = kwargs.get("optimizer")
        decaying = _decaying_groups(optimizer)
        if optimizer is None or not decaying:
            return
        # Each process looks at its shards, and one reports.
        sums = _lr_sums(optimizer.param_groups, kwargs["lr_scheduler"], state)
        free = [
            group for group in decaying if "asked_sparsity" not in group.settings and not decays_to_base(group.settings)
        ]
        sentences = forecast(free, [sums[group.number] for group in free]) + _frozen_tensors(kwargs["model"], decaying)
        if state.is_world_process_zero:
            print_rich(group_table(optimizer.param_groups, group_params(optimizer)))
            for device, (name, reason) in _backends(optimizer).items():
                print_rich(f"Step on {device}: {name}, as {reason}.")
            for sentence in sentences:
                logger.warning(sentence)
            if "peft" in sys.modules:
                from ..adapters.factors import warn_of_sparse_factors

                warn_of_sparse_factors(kwargs["model"], _made_sparse(decaying))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the sparsity to what is logged of the training loss."""
        if logs is None or "loss" not in logs:
            return
        report = self._measure(kwargs["model"], kwargs.get("optimizer"), state)
        if report is None:
            return
        folder = _folder(args)
        values = self._values(report)
        if self._skipped_steps == state.global_step > 0 and not self._said_that_all_are_skipped:
            self._said_that_all_are_skipped = True
            logger.warning(
                "All %d steps so far were skipped for NaN or infinite gradients, so nothing is learned.",
                self._skipped_steps,
            )
        if self._skipped_steps:
            values["skipped_steps"] = self._skipped_steps
        # The Trainer has copied the dict into its history; the trackers after this get the dict itself.
        logs.update(values)
        if state.log_history and state.log_history[-1].get("loss") is logs["loss"]:  # a Trainer may keep no history
            state.log_history[-1].update(values)
        if not folder.is_dir():
            logger.warning(
                "output_dir=%r is gone. It is made again and the run goes on; what it held, with the checkpoints and "
                "the lines of %s before step %d, is lost.",
                str(args.output_dir),
                HISTORY_FILE,
                state.global_step,
            )
        append_line(folder / HISTORY_FILE, self._line(state, report))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report and the picture, and print the table."""
        report = self._measure(kwargs["model"], kwargs.get("optimizer"), state)
        if report is None:
            return
        report.save(_folder(args) / REPORT_FILE)
        history = read_history(_folder(args))
        if not history:
            # The history of a run too short for a log event is its end, if it was not stopped.
            history = [self._line(state, report)]
            if state.global_step >= state.max_steps:
                append_line(_folder(args) / HISTORY_FILE, history[0])
        # Imported here because it takes longer to import than this package.
        from ..sparsity.picture import plot_sparsity

        plot_sparsity(history, _folder(args) / PICTURE_FILE)
        print_rich(report)
        dead = report.dead_tensors
        if dead:
            logger.warning(
                "%d of %d decayed tensors are wholly zero: %s. If that is more than they can spare, give a target as "
                "sparsity_budget='tensor', or by rules in lp_rules; without a target take a smaller lambda_p.",
                len(dead),
                report.decayed.tensors,
                ", ".join(dead[:_NAMED]) + (" and others" if len(dead) > _NAMED else ""),
            )
        if 0 < self._skipped_steps < state.global_step:
            logger.warning("%d steps were skipped for NaN or infinite gradients.", self._skipped_steps)
        elif self._skipped_steps:
            logger.warning(
                "All %d steps were skipped for NaN or infinite gradients, so nothing was learned. Look at the data, "
                "the learning rate and the precision.",
                self._skipped_steps,
            )

    def _values(self, report: SparsityReport) -> dict[str, Any]:
        """What is logged of a report, the unchanged weights first."""
        values: dict[str, Any] = {}
        for kind, counts in (("delta", report.delta), ("sparsity", report)):
            if counts is None or (kind == "sparsity" and report.delta is not None and not report.decayed.tensors):
                continue
            values |= {f"{kind}/overall": counts.sparsity, f"{kind}/model": counts.model_sparsity}
            if self.sparsity_logging == "layer":
                values |= {
                    f"{kind}/layer/{tensor.name}": tensor.sparsity for tensor in counts.tensors if tensor.decayed
                }
            values |= {f"{kind}/{units.label.replace(' ', '_')}": units.sparsity for units in counts.units}
        return values

    def _line(self, state: TrainerState, report: SparsityReport) -> dict[str, Any]:
        return history_line(report, state.global_step, state.epoch, self._skipped_steps)

    def _measure(self, model: nn.Module, optimizer: Any, state: TrainerState) -> SparsityReport | None:
        """Count; None in processes that do not report."""
        settle(model)
        groups = _decaying_groups(optimizer)
        if not state.is_world_process_zero and not all_must_count(model, optimizer):
            return None
        report, skipped = measure_in_run(
            model,
            optimizer if groups else None,
            self.near_zero_threshold,
            self.saved_weights(),
            [group.settings.get("skipped_steps", 0) for group in groups],
        )
        self._skipped_steps = max(skipped, default=0)
        return report if state.is_world_process_zero else None


def _open_history(folder: Path, state: TrainerState) -> None:
    """Make ``sparsity.jsonl`` hold the lines of this run up to the step from which it goes on."""
    remove_leftovers(folder, RUN_FILES)
    kept = [line for line in read_history(folder) if line["step"] <= state.global_step]
    if not state.global_step or not is_history_of(kept, state.log_history):
        kept = []
        aside = set_history_aside(folder)
        if aside is not None:
            logger.warning("%s held the lines of another run, which are in %s now.", folder / HISTORY_FILE, aside)
    write_text(folder / HISTORY_FILE, "".join(f"{json.dumps(line)}\n" for line in kept))


def _lr_sums(groups: Sequence[Mapping[str, Any]], lr_scheduler: Any, state: TrainerState) -> list[float]:
    """Sum of the learning rates still to come, by group; the present rate for all steps unless it is a ``LambdaLR``."""
    steps = max(state.max_steps - state.global_step, 0)
    if isinstance(lr_scheduler, AcceleratedScheduler):
        lr_scheduler = lr_scheduler.scheduler
    if not isinstance(lr_scheduler, torch.optim.lr_scheduler.LambdaLR) or not steps:
        return [float(group["lr"]) * steps for group in groups]
    samples = min(steps, _SCHEDULE_SAMPLES)
    at = [state.global_step + int(steps * (sample + 0.5) / samples) for sample in range(samples)]
    return [
        float(base_lr) * sum(lr_lambda(step) for step in at) * steps / samples
        for base_lr, lr_lambda in zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
    ]


def _frozen_tensors(model: nn.Module, groups: Sequence[DecayingGroup]) -> list[str]:
    """A sentence for each tensor that ``keep_zeros`` will never let learn."""
    keeping = [group for group in groups if group.settings["keep_zeros"]]
    if not keeping:
        return []
    return [
        f"keep_zeros: {name} is wholly zero and will stay so. To let it learn, set it 'off' in lp_rules."
        for name in measure_sparsity(model, decayed=_names(model, keeping)).dead_tensors
    ]


def _decaying_groups(optimizer: Any) -> list[DecayingGroup]:
    """Param groups on which p-norm decay acts; empty for another optimizer."""
    if optimizer is None:
        return []
    return [
        DecayingGroup(number, group, params)
        for number, (group, params) in enumerate(zip(optimizer.param_groups, group_params(optimizer), strict=True))
        if is_decayed(group)
    ]


def _made_sparse(groups: Sequence[DecayingGroup]) -> Iterator[Tensor]:
    """The parameters in which single weights become zero, by a target or by λ_p."""
    for _, group, params in groups:
        by_decay = group["lambda_p"] > 0 and group["p_norm"] < 2
        if kind_of(group) == ELEMENT and (group.get("asked_sparsity") or by_decay):
            yield from params


def _names(model: nn.Module, groups: Sequence[DecayingGroup]) -> list[str]:
    return decayed_parameter_names(model, [group.settings for group in groups], [group.params for group in groups])


def _backends(optimizer: Any) -> dict[str, tuple[str, str]]:
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return inner.backends if isinstance(inner, AdamWLp) else {}


def _folder(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir))
