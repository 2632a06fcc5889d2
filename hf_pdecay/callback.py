"""The callback that counts zeros during a run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .cuts import root_mean_squares
from .decay import forecast_threshold, lambda_for_threshold
from .files import remove_leftovers, write_text
from .optim import AdamWLp
from .optim.couplings import COUPLED, couplings_of, kind_of
from .rules import decayed_parameter_names, group_table
from .selection import Ranked, Ranking
from .shards import group_params, held, is_sharded, settle
from .sparsity import NEAR_ZERO_THRESHOLD, REPORT_FILE, SparsityReport, measure_sparsity, measure_with_extra
from .structure import count_groups
from .targets import is_decayed


if TYPE_CHECKING:
    from rich.console import Console
    from transformers import Trainer

logger = logging.getLogger(__name__)

HISTORY_FILE = "sparsity.jsonl"
PICTURE_FILE = "sparsity.png"

# Below this forecast a run is told that its λ_p will not make it sparse.
_HARDLY_ANY = 0.05

_SCHEDULE_SAMPLES = 1000

_NAMED = 4  # tensors that a sentence names


class SparsityCallback(TrainerCallback):
    """Logs the exact zeros of a model while it trains, and reports them at the end.

    With every log event of the training loss it adds ``sparsity/overall`` (decayed weights), ``sparsity/model`` and,
    where weights decay by groups, the fraction of dead ones, such as ``sparsity/neurons``, to
    what ``Trainer.log`` hands out, and appends a line to ``sparsity.jsonl`` in ``output_dir``; counting waits for the
    device once. At the end it writes ``sparsity.json`` and ``sparsity.png`` and prints a table.

    Trackers get their values in the order of the callbacks. ``PDecayTrainer`` puts this one first; with another Trainer
    call :meth:`attach`, which does the same:

        >>> trainer = Trainer(model=model, args=args, train_dataset=dataset)
        >>> SparsityCallback(sparsity_logging="layer").attach(trainer)

    Args:
        sparsity_logging: ``"overall"``, or ``"layer"`` to add ``sparsity/layer/<name>`` for each decayed tensor.
        near_zero_threshold: Magnitude below which a non-zero weight counts as near zero.

    Raises:
        ValueError: If ``sparsity_logging`` is neither of the two.
    """

    def __init__(self, sparsity_logging: str = "overall", near_zero_threshold: float = NEAR_ZERO_THRESHOLD) -> None:
        if sparsity_logging not in ("overall", "layer"):
            raise ValueError(
                f"Invalid sparsity_logging: sparsity_logging={sparsity_logging!r}; it must be one of overall, layer."
            )
        self.sparsity_logging = sparsity_logging
        self.near_zero_threshold = near_zero_threshold
        self._skipped_steps = 0
        self._said_that_all_are_skipped = False

    def attach(self, trainer: Trainer) -> SparsityCallback:
        """Make this the first callback of a Trainer, before its trackers, and return it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open ``sparsity.jsonl``, and say what the decay will come to."""
        if state.is_world_process_zero:
            remove_leftovers(_folder(args))
            write_text(
                _folder(args) / HISTORY_FILE,
                "".join(
                    f"{json.dumps(line)}\n" for line in read_history(_folder(args)) if line["step"] <= state.global_step
                )
                if state.global_step
                else "",
            )
        optimizer = kwargs.get("optimizer")
        decaying = _decaying_groups(optimizer)
        if optimizer is None or not decaying:
            return
        # Each process looks at its shards, and one speaks.
        sums = _lr_sums(optimizer.param_groups, kwargs["lr_scheduler"], state)
        free = [each for each in decaying if "asked_sparsity" not in each.settings]
        sentences = forecast(free, [sums[each.number] for each in free]) + _frozen_tensors(kwargs["model"], decaying)
        if state.is_world_process_zero:
            _console().print(group_table(optimizer.param_groups, group_params(optimizer)))
            for device, (name, reason) in _backends(optimizer).items():
                _console().print(f"Step on {device}: {name}, as {reason}.")
            for sentence in sentences:
                logger.warning(sentence)

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
        values: dict[str, Any] = {"sparsity/overall": report.sparsity, "sparsity/model": report.model_sparsity}
        if self.sparsity_logging == "layer":
            values |= {f"sparsity/layer/{each.name}": each.sparsity for each in report.tensors if each.decayed}
        if self._skipped_steps == state.global_step > 0 and not self._said_that_all_are_skipped:
            self._said_that_all_are_skipped = True
            logger.warning(
                "All %d steps so far were skipped for NaN or infinite gradients, so nothing is learned.",
                self._skipped_steps,
            )
        values |= {f"sparsity/{each.label.replace(' ', '_')}": each.sparsity for each in report.groups}
        if self._skipped_steps:
            values["skipped_steps"] = self._skipped_steps
        # The Trainer has copied the dict into its history before it calls; the trackers after this get the dict itself.
        logs.update(values)
        state.log_history[-1].update(values)
        if not _folder(args).is_dir():
            logger.warning(
                "output_dir=%r is gone. It is made again and the run goes on; what it held, with the checkpoints and "
                "the lines of %s before step %d, is lost.",
                str(args.output_dir),
                HISTORY_FILE,
                state.global_step,
            )
        append_line(_folder(args) / HISTORY_FILE, self._line(state, report))

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
            # A run too short for a log event still has a history: its end, which is not that of one that was stopped.
            history = [self._line(state, report)]
            if state.global_step >= state.max_steps:
                append_line(_folder(args) / HISTORY_FILE, history[0])
        # Not needed before: matplotlib takes longer to import than all of this package.
        from .plots import plot_sparsity

        plot_sparsity(history, _folder(args) / PICTURE_FILE)
        _console().print(report)
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

    def _line(self, state: TrainerState, report: SparsityReport) -> dict[str, Any]:
        return {
            "step": state.global_step,
            "epoch": state.epoch,
            "sparsity": report.sparsity,
            "model_sparsity": report.model_sparsity,
            "near_zeros": report.decayed.near_zeros,
            "skipped_steps": self._skipped_steps,
            **({"groups": {each.label: each.sparsity for each in report.groups}} if report.groups else {}),
            "layers": {each.name: each.sparsity for each in report.tensors if each.decayed},
        }

    def _measure(self, model: nn.Module, optimizer: Any, state: TrainerState) -> SparsityReport | None:
        """Count; None on the processes that have nothing to count and nothing to say."""
        settle(model)
        if not state.is_world_process_zero and not any(is_sharded(param) for param in model.parameters()):
            return None
        groups = _decaying_groups(optimizer)
        report, skipped = measure_with_extra(
            model,
            decayed=_names(model, groups) if groups else None,
            near_zero_threshold=self.near_zero_threshold,
            extra=[each.settings.get("skipped_steps", 0) for each in groups],
            groups=count_groups([each.settings for each in groups], [each.params for each in groups]),
        )
        self._skipped_steps = max(skipped, default=0)
        return report if state.is_world_process_zero else None


def read_history(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of ``sparsity.jsonl`` in a folder; a last line cut short by a crash is left out."""
    path = Path(output_dir) / HISTORY_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # What follows the last newline is either nothing or a line that was not finished.
    return [json.loads(line) for line in lines[:-1]]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line of JSON to a file, whole or not at all; makes the file and its folder.

    Raises:
        OSError: If it cannot be written, as on a full disk; the file is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        text = f"{json.dumps(line)}\n".encode()
        try:
            while text:  # a disk that is nearly full takes a part
                text = text[file.write(text) :]
        except OSError:
            file.truncate(before)
            raise


class DecayingGroup(NamedTuple):
    """A param group on which p-norm decay acts.

    Attributes:
        number: Its place among the optimizer's groups.
        settings: The group itself.
        params: The model's parameters in it.
    """

    number: int
    settings: Mapping[str, Any]
    params: Sequence[Tensor]


def forecast(groups: Sequence[DecayingGroup], lr_sums: Sequence[float]) -> list[str]:
    """Say beforehand, group by group, what λ_p can come to, where that is little or nothing.

    The forecast is an upper one: the weights that would be dead by the end were there no gradient to hold them up.

    Args:
        groups: Param groups that decay.
        lr_sums: Σα of each of them, the sum of the learning rates of all steps still to come.

    Returns:
        A sentence for each group of which too few weights can become zero.
    """
    sentences = []
    for (number, group, params), lr_sum in zip(groups, lr_sums, strict=True):
        p_norm, lambda_p = group["p_norm"], group["lambda_p"]
        if lambda_p == 0 or lr_sum == 0:
            continue
        settings = (
            f"p_norm={p_norm:g}, lambda_p={lambda_p:g} on the {len(params)} tensors of "
            f"{group.get('rule', f'group {number}')!r}"
        )
        if p_norm >= 2:
            sentences.append(f"{settings} give no zeros: for p >= 2 no weight reaches 0. Take p_norm below 2.")
            continue
        ranking = Ranking(_units(group, params))
        sparsity, half = ranking.below(forecast_threshold(p_norm, lambda_p, lr_sum)), ranking.quantile(0.5)
        if sparsity < _HARDLY_ANY:
            sentences.append(
                f"{settings} can zero at most {sparsity:.1%} of these {_unit_name(group)}: the learning rates of this "
                f"run add up to only {lr_sum:.3g}. For up to 50% take lambda_p of about "
                f"{lambda_for_threshold(p_norm, half, lr_sum):.2g}, or raise the learning rate."
            )
    return sentences


def _units(group: Mapping[str, Any], params: Sequence[Tensor]) -> list[Ranked]:
    """What decays as one in a param group: the weights, or groups of them by their root mean square."""
    if kind_of(group) not in COUPLED:
        return [held(param) for param in params]
    return [Ranked(root_mean_squares(each, params)) for each in couplings_of(group)]


def _unit_name(group: Mapping[str, Any]) -> str:
    return f"{kind_of(group)}s" if kind_of(group) in COUPLED else "weights"


def _lr_sums(groups: Sequence[Mapping[str, Any]], lr_scheduler: Any, state: TrainerState) -> list[float]:
    """Sum of the learning rates of the steps still to come, group by group.

    Schedules that are functions of the step are sampled; for the others, which cannot be known beforehand, the present
    learning rate stands for all.
    """
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
    """Warn of tensors that ``keep_zeros`` will never let learn."""
    keeping = [each for each in groups if each.settings["keep_zeros"]]
    if not keeping:
        return []
    report = measure_sparsity(model, decayed=_names(model, keeping))
    return [
        f"keep_zeros: {each.name} is wholly zero and will stay so. If it is to learn, set it 'off' in lp_rules."
        for each in report.tensors
        if each.decayed and each.parameters and each.zeros == each.parameters
    ]


def _decaying_groups(optimizer: Any) -> list[DecayingGroup]:
    """Param groups on which p-norm decay acts; none for an optimizer that knows nothing of it."""
    if optimizer is None:
        return []
    return [
        DecayingGroup(number, group, params)
        for number, (group, params) in enumerate(zip(optimizer.param_groups, group_params(optimizer), strict=True))
        if is_decayed(group)
    ]


def _names(model: nn.Module, groups: Sequence[DecayingGroup]) -> list[str]:
    return decayed_parameter_names(model, [each.settings for each in groups], [each.params for each in groups])


def _backends(optimizer: Any) -> dict[str, tuple[str, str]]:
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return inner.backends if isinstance(inner, AdamWLp) else {}


def _folder(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir))


def _console() -> Console:
    from rich.console import Console

    return Console()
