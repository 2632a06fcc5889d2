"""What a Trainer says of the model that it has trained: its sparsity, and the card beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import write_text
from ..optim.param_groups import is_decayed
from ..optim.shards import group_params, is_sharded, settle
from ..rules.assign import decayed_parameter_names
from ..sparsity.card import add_tags
from ..sparsity.counting import measure_sparsity
from ..sparsity.dead_units import count_units
from ..sparsity.file_names import CARD_FILE, PICTURE_FILE
from ..sparsity.model_card import (
    TAGS,
    SparsityCard,
    SparsitySection,
    add_sparsity,
    origin_of,
    settings_in_words,
    summary_of,
)
from ..sparsity.report import SparsityReport
from ..target.budgets import target_of_all
from .arguments import settings_of
from .optimizer import name_of
from .settings import DecaySettings


if TYPE_CHECKING:
    from torch import nn

    _Base = Trainer
else:
    _Base = object


class CardMixin(_Base):
    """The part of :class:`~hf_pdecay.trainer.trainer.PDecayTrainerMixin` that counts, and writes cards."""

    if TYPE_CHECKING:
        args: TrainingArguments
        model: nn.Module
        _card_kwargs: dict[str, Any]

        @property
        def _decays(self) -> bool: ...

        @property
        def _settings(self) -> DecaySettings: ...

        @property
        def _output_dir(self) -> Path: ...

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card into ``output_dir``; takes what ``Trainer.create_model_card`` takes.

        The card of a subclass of Trainer that writes its own, such as TRL's, is written by it and gets our section.
        """
        if not self._decays or self._writes_own_card:
            super().create_model_card(*args, **kwargs)
        else:
            self._card_kwargs.update(zip(("language", "license", "tags", "model_name"), args, strict=False))
            self._card_kwargs.update({key: value for key, value in kwargs.items() if value is not None})
        if self._decays:
            report = self._measured()
            if report is not None and self.is_world_process_zero():
                self._write_card(self._output_dir, report)

    @property
    def _writes_own_card(self) -> bool:
        return getattr(super().create_model_card, "__func__", None) is not Trainer.create_model_card

    def measure_sparsity(self) -> SparsityReport:
        """Count the zeros of the model; the decayed weights are those of the optimizer, once there is one.

        Under FSDP2 and ZeRO-3, where processes hold shards of the model, all of them must call.
        """
        settle(self.model)
        decayed = counted = None
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        if any("rule" in group or is_decayed(group) for group in groups):
            params = group_params(self.optimizer)
            decayed, counted = decayed_parameter_names(self.model, groups, params), count_units(groups, params)
        return measure_sparsity(
            self.model, decayed=decayed, near_zero_threshold=self._near_zero_threshold, units=counted
        )

    @property
    def _near_zero_threshold(self) -> float:
        settings = self._settings if self._decays else settings_of(self.args)
        return DecaySettings.near_zero_threshold if settings is None else settings.near_zero_threshold

    def _measured(self) -> SparsityReport | None:
        """Count where this process is to write, or others need it in order to count."""
        settle(self.model)
        if self.args.should_save or any(is_sharded(param) for param in self.model.parameters()):
            return self.measure_sparsity()
        return None

    def _write_card(self, folder: Path, report: SparsityReport) -> None:
        file = folder / CARD_FILE
        trained = self.state.global_step > 0
        if not trained and file.is_file() and not self._writes_own_card:
            return  # of a training that this process knows nothing of
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        model: Any = self.accelerator.unwrap_model(self.model)
        adapter = hasattr(model, "create_or_update_model_card")  # PEFT's
        section = SparsitySection(
            report,
            groups,
            picture=PICTURE_FILE if (folder / PICTURE_FILE).is_file() else None,
            skipped_steps=max((int(group.get("skipped_steps", 0)) for group in groups), default=0),
            trained=trained,
            adapter=adapter,
            asked=self._asked() if trained else None,
        )
        if self._writes_own_card and file.is_file():
            write_text(file, add_sparsity(file.read_text(encoding="utf-8"), section))
            return
        summary = summary_of(self, self._card_kwargs)
        summary.hyperparameters = {
            **(summary.hyperparameters or {}),
            "optimizer": name_of(self.args) + settings_in_words(groups),
            "weight_decay": self.args.weight_decay,
            **self._settings.effective,
        }
        card = SparsityCard(
            summary,
            section,
            self.state.log_history,
            best_step=self.state.best_global_step if self._loads_best else None,
            origin=origin_of(model, adapter=adapter),
        )
        write_text(file, card.render())
        if adapter:
            # Its base model, library and tags, as Trainer.create_model_card has them.
            model.create_or_update_model_card(str(folder))
            write_text(file, add_tags(file.read_text(encoding="utf-8"), (*(summary.tags or ()), *TAGS)))

    def _asked(self) -> float | None:
        """The fraction of all decayed weights that is to be zero in the end, if there is one."""
        optimizer = self.optimizer
        if optimizer is None or not any(is_decayed(group) for group in optimizer.param_groups):
            return None
        return target_of_all(optimizer.param_groups, self._settings.target_sparsity, group_params(optimizer))

    @property
    def _loads_best(self) -> bool:
        return bool(self.args.load_best_model_at_end and self.state.best_model_checkpoint)


class CardCallback(TrainerCallback):
    """Writes the card at the end of training, after all that other callbacks write."""

    def __init__(self, trainer: CardMixin) -> None:
        self._trainer = trainer

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write it."""
        if self._trainer._decays:
            self._trainer.create_model_card()
