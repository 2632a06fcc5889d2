"""A Trainer that learns from a teacher beside the data, as the settings ``teacher_*`` say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from packaging.version import Version
from torch import nn
from transformers import Trainer

from ..files import write_text
from .engines import engine_of
from .lesson import LABELS, Lesson
from .settings import DecaySettings
from .teacher import SELF
from .teacher_cache import FlushCallback


if TYPE_CHECKING:
    from .trainer import PDecayTrainerMixin

    _Base = PDecayTrainerMixin
else:
    _Base = object

TEACHER_FILE = "teacher.json"
"""The file in a checkpoint that says which teacher the run has."""


def distil(trainer: Trainer, settings: DecaySettings) -> None:
    """Have a complete Trainer learn from the teacher that its settings name.

    Raises:
        ValueError: If the teacher does not fit the model, the memory, or how the run is set up.
    """
    _check_run(trainer, settings)
    same = {name: getattr(type(trainer), name) for name in ("__module__", "__qualname__", "__doc__")}
    trainer.__class__ = type(type(trainer).__name__, (DistillingMixin, type(trainer)), same)
    trainer._learn_from(settings, trainer.model)  # type: ignore[attr-defined]
    if settings.teacher_cache is not None:
        trainer.add_callback(FlushCallback(lambda: trainer._lesson.cache))  # type: ignore[attr-defined]


class DistillingMixin(_Base):
    """What a Trainer with a teacher does otherwise; :func:`distil` puts it before the Trainer's class."""

    if TYPE_CHECKING:
        model: nn.Module
        _lesson: Lesson

    def _learn_from(self, settings: DecaySettings, model: nn.Module) -> None:
        self._lesson = Lesson(self, model, settings)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a model, and its teacher."""
        settings = self._lesson.settings
        del self._lesson  # the teacher of the model before, which need not be kept beside the new one
        model: nn.Module = super().call_model_init(trial)
        self._learn_from(settings, model)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        settings = self._settings
        for name in ("teacher", "teacher_cache"):
            ours, made = getattr(settings, name), getattr(self._lesson.settings, name)
            if ours != made:
                raise ValueError(
                    f"Invalid {name}: a trial has {name}={ours!r} and the Trainer was made with {name}={made!r}; a "
                    f"search varies teacher_logits and the like, not {name}."
                )
        self._lesson.settings = settings

    def _check_checkpoint(self, folder: str | bool | None, *, warn: bool = False) -> None:
        super()._check_checkpoint(folder, warn=warn)
        if isinstance(folder, str) and os.path.isdir(folder):
            _check_same_teacher(Path(folder), self._lesson)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and in a checkpoint which teacher it has."""
        if _internal_call and output_dir and self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            write_text(Path(output_dir) / TEACHER_FILE, json.dumps({"digest": self._lesson.teacher.digest}))
        super().save_model(output_dir, _internal_call)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Collect the batches of a step, and count what the error of the hidden states is divided by."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._lesson.count(self, batches, summed=items is not None)
        return batches, items

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss; in training the teacher has its part in it."""
        options: dict[str, Any] = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if not self.model.training:
            return super().compute_loss(model, inputs, **options)
        labels = {key: inputs[key] for key in LABELS if key in inputs}
        if not labels:
            raise ValueError(
                f"Invalid teacher: teacher={self._lesson.settings.teacher!r}, and the batches of {type(self).__name__} "
                f"have no labels, only {', '.join(map(str, inputs))}; a teacher needs them. Train without one."
            )
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
    if Version(transformers.__version__).major < 5:
        raise ValueError(
            f"{what} with transformers {transformers.__version__}, which divides a loss by other counts of tokens; it "
            "takes version 5 or later."
        )
    if engine_of(trainer) == "DeepSpeed":
        raise ValueError(f"{what} under DeepSpeed, which shards the model; take one process, DDP or FSDP2.")
    if trainer.is_fsdp_enabled and settings.teacher == SELF and hasattr(trainer.model, "peft_config"):
        raise ValueError(
            f"{what} with adapters under FSDP, which cannot run the model below them amid a step of the same weights; "
            "take DDP, or give teacher the folder or name of that model."
        )
    if trainer.is_fsdp_enabled and settings.teacher_cache is not None:
        raise ValueError(
            f"Invalid teacher_cache: teacher_cache={settings.teacher_cache!r} under FSDP, where all processes must ask "
            "the teacher at once, and one may have the row; leave it out, or take DDP."
        )
    if getattr(trainer, "is_model_parallel", False):
        raise ValueError(f"{what} and a model that a device_map divides; put it on one device, or take DDP.")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{what} in one process on {trainer.args.n_gpu} GPUs; start one process for each, by accelerate launch."
        )
    if getattr(trainer.args, "use_liger_kernel", False):
        raise ValueError(f"{what} with use_liger_kernel, which computes no logits in training; leave it out.")
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and any(getattr(parallel, f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp")):
        raise ValueError(f"{what} with tensor, context or sequence parallelism; take DDP.")


def _check_same_teacher(checkpoint: Path, lesson: Lesson) -> None:
    """Raise ValueError if a checkpoint was written by a run with another teacher."""
    name, file = lesson.settings.teacher, checkpoint / TEACHER_FILE
    if not file.exists():
        if name == SELF:
            raise ValueError(
                f"Invalid teacher: teacher='self', and the run of {str(checkpoint)!r} had no teacher, so nobody knows "
                "its weights before training; give teacher the folder or name of the model that it began with."
            )
        return
    if json.loads(file.read_text(encoding="utf-8"))["digest"] != lesson.teacher.digest:
        began = "make the Trainer with the model that the run began with" if name == SELF else "name the same"
        raise ValueError(
            f"Invalid teacher: teacher={name!r} has other weights than the teacher of the run of {str(checkpoint)!r}; "
            f"{began}, in the same teacher_dtype."
        )
