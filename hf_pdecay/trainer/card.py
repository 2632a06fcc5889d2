"""Writes the model card beside a Trainer's model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import write_text
from ..low_bit.inputs import rounded_inputs
from ..one_shot.methods import OFF
from ..optim.bases import decays_to_base
from ..optim.param_groups import is_decayed
from ..optim.shards import group_params
from ..sparsity.card_text import add_tags
from ..sparsity.file_names import CARD_FILE, PICTURE_FILE
from ..sparsity.model_card import (
    SparsityCard,
    SparsitySection,
    add_sparsity,
    origin_of,
    settings_in_words,
    summary_of,
)
from ..sparsity.report import SparsityReport
from ..target.budgets import overall_target
from .few_bits import widths_of
from .optimizer import name_of
from .settings import DecaySettings


def write_card(
    trainer: Trainer,
    folder: Path,
    report: SparsityReport,
    settings: DecaySettings,
    given: Mapping[str, Any],
    *,
    extend: bool,
) -> None:
    """Write the card; ``given`` are arguments of ``create_model_card``, ``extend`` keeps the Trainer's own card."""
    file = folder / CARD_FILE
    state = trainer.state
    trained = state.global_step > 0
    if not trained and file.is_file() and not extend:
        return  # the card of a training that this process has not seen
    groups = [] if trainer.optimizer is None else trainer.optimizer.param_groups
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    adapter = hasattr(model, "create_or_update_model_card")  # PEFT's
    section = SparsitySection(
        report,
        groups,
        picture=PICTURE_FILE if (folder / PICTURE_FILE).is_file() else None,
        skipped_steps=max((int(group.get("skipped_steps", 0)) for group in groups), default=0),
        trained=trained,
        adapter=adapter,
        asked=target_of_run(trainer.optimizer, settings) if trained else None,
        weight_bits=widths_of(model, settings) if trained else {},
        activation_bits=rounded_inputs(model),
    )
    if extend and file.is_file():
        write_text(file, add_sparsity(file.read_text(encoding="utf-8"), section))
        return
    summary = summary_of(trainer, given)
    summary.hyperparameters = {
        **(summary.hyperparameters or {}),
        "optimizer": name_of(trainer.args) + settings_in_words(groups),
        "weight_decay": trainer.args.weight_decay,
        **settings.effective,
    }
    if trained and "one_shot" in summary.hyperparameters:  # what auto has meant
        summary.hyperparameters["one_shot"] = next((group["one_shot"] for group in groups if "one_shot" in group), OFF)
    loads_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint
    card = SparsityCard(
        summary,
        section,
        state.log_history,
        best_step=state.best_global_step if loads_best else None,
        origin=origin_of(model, adapter=adapter),
    )
    write_text(file, card.render())
    if adapter:
        # Its base model, library and tags, as in Trainer.create_model_card.
        model.create_or_update_model_card(str(folder))
        write_text(file, add_tags(file.read_text(encoding="utf-8"), (*(summary.tags or ()), *section.tags)))


def target_of_run(optimizer: Any, settings: DecaySettings) -> float | None:
    """Return the fraction that should be zero in the end of all decayed weights; None without a target.

    Where groups decay to a base, it is what should be unchanged of their weights.
    """
    if optimizer is None or not any(is_decayed(group) for group in optimizer.param_groups):
        return None
    pairs = list(zip(optimizer.param_groups, group_params(optimizer), strict=True))
    to_base = [pair for pair in pairs if decays_to_base(pair[0])]
    groups, params = zip(*(to_base or pairs), strict=True)
    return overall_target(groups, settings.target_sparsity, params)


class CardCallback(TrainerCallback):
    """Writes the card at the end of training, after the files of the other callbacks."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write it."""
        self._write()
