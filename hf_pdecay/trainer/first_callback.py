"""The base of callbacks that run before the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainerCallback


if TYPE_CHECKING:
    from transformers import Trainer
    from typing_extensions import Self


class FirstCallback(TrainerCallback):
    """A callback that must run before the others of a Trainer, which then see its results."""

    def attach(self, trainer: Trainer) -> Self:
        """Make this the first callback of a Trainer, before its trackers, and return it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self
