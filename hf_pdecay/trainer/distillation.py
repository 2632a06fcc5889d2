"""A Trainer that learns from a teacher beside the data, as the settings ``teacher_*`` say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer

from .engines import engine_of
from .lesson import LABELS, Lesson
from .settings import DecaySettings


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


def distil(trainer: Trainer, settings: DecaySettings) -> None:
    """Have a complete Trainer learn from the teacher that its settings name.

    Raises:
        ValueError: If the teacher does not fit the model, the memory, or how the run is set up.
    """
    _check_run(trainer, settings)
    same = {name: getattr(type(trainer), name) for name in ("__module__", "__qualname__", "__doc__")}
    trainer.__class__ = type(type(trainer).__name__, (DistillingMixin, type(trainer)), same)
    trainer._learn_from(settings, trainer.model)  # type: ignore[attr-defined]


class DistillingMixin(_Base):
    """What a Trainer with a teacher does otherwise; :func:`distil` puts it before the Trainer's class."""

    if TYPE_CHECKING:
        model: nn.Module
        _lesson: Lesson

    def _learn_from(self, settings: DecaySettings, model: nn.Module) -> None:
        self._lesson = Lesson(self, model, settings)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a model, and its teacher."""
        model: nn.Module = super().call_model_init(trial)
        self._learn_from(self._lesson.settings, model)
        return model

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Collect the batches of a step, and count what the error of the hidden states is divided by."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if items is not None:
            self._lesson.count(batches, self)
        return batches, items

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss; in training the teacher has its part in it."""
        options: dict[str, Any] = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if not self.model.training:
            return super().compute_loss(model, inputs, **options)
        labels = {key: inputs[key] for key in LABELS if key in inputs}
        with self._lesson.watch(model) as seen:
            result = super().compute_loss(model, inputs, **options)
        task, *outputs = result if isinstance(result, tuple) else (result,)
        loss = self._lesson.loss(self, seen, labels, task, num_items_in_batch)
        return (loss, *outputs) if outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with a training loss, its two parts."""
        if "loss" in logs:
            logs.update(self._lesson.means(self))
        super().log(logs, *args, **kwargs)


def _check_run(trainer: Trainer, settings: DecaySettings) -> None:
    """Raise ValueError for what a teacher cannot be part of."""
    what = f"Invalid teacher: teacher={settings.teacher!r}"
    if engine_of(trainer):
        raise ValueError(f"{what} under {engine_of(trainer)}, which shards the model; take one process, or DDP.")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{what} in one process on {trainer.args.n_gpu} GPUs; start one process for each, by accelerate launch."
        )
    if getattr(trainer.args, "use_liger_kernel", False):
        raise ValueError(f"{what} with use_liger_kernel, which computes no logits in training; leave it out.")
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and any(getattr(parallel, f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp")):
        raise ValueError(f"{what} with tensor, context or sequence parallelism; take DDP.")
