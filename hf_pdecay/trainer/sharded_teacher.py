"""A teacher under FSDP2: divided among the processes as the model is, so that none keeps a second copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn


if TYPE_CHECKING:
    from transformers import Trainer


def sharded(trainer: Trainer, teacher: nn.Module) -> Callable[..., Any]:
    """Divide a frozen teacher among the processes of a Trainer, which must all call; return how it is called.

    Accelerate divides it as it will the model: by the same layers, or those of the teacher's own class.
    """
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import FSDPModule

    with _layers_of(trainer.accelerator.state.fsdp_plugin, teacher):
        whole = fsdp2_prepare_model(trainer.accelerator, teacher)
    units = [module for module in whole.modules() if isinstance(module, FSDPModule)]

    @torch.no_grad()
    def call(**inputs: Any) -> Any:
        outputs = whole(**inputs)
        for unit in units:  # without a backward pass some stay whole
            unit.reshard()
        return outputs

    return call


@contextmanager
def _layers_of(plugin: Any, teacher: nn.Module) -> Iterator[None]:
    """Have Accelerate take a teacher's own layers where it is told of another class's, and forget them afterwards."""
    kept = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    classes = {type(module).__name__ for module in teacher.modules()}
    if not classes.issuperset(kept[1] or ()):
        plugin.transformer_cls_names_to_wrap = None
    try:
        yield
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = kept
