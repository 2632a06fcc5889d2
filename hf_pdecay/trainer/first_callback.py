"""A callback that runs before the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from transformers import TrainerCallback


if TYPE_CHECKING:
    from transformers import Trainer

Callback = TypeVar("Callback", bound="FirstCallback")


class FirstCallback(TrainerCallback):
    """A callback that must run before the others of a Trainer, which then see its results."""

    def attach(self: Callback, trainer: Trainer) -> Callback:
        """Make this the first callback of a Trainer, before its trackers, and return it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self
