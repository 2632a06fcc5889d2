"""The norm by which the Trainer clips gradients tells the optimizer that they are finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ..optim.decay_optimizer import DecayOptimizer


_BETWEEN = "on_pre_optimizer_step"  # the event between clipping and the step


def share_grad_norm(trainer: Trainer, optimizer: DecayOptimizer) -> None:
    """Give the optimizer the gradient norm that a Trainer computes, so that it need not look for NaN itself."""
    clip = trainer.accelerator.clip_grad_norm_
    if isinstance(clip, partial) and clip.func is _clip_and_tell:
        # Do not keep alive the optimizer of an earlier model of model_init.
        clip = trainer.accelerator.clip_grad_norm_ = clip.args[0]
    if not trainer.is_deepspeed_enabled:
        # DeepSpeed has stepped before the Trainer gets the norm.
        trainer.accelerator.clip_grad_norm_ = partial(_clip_and_tell, clip, optimizer, trainer.callback_handler)


def _clip_and_tell(
    clip: Callable[..., Any],
    optimizer: DecayOptimizer,
    handler: CallbackHandler,
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2,
) -> Any:
    """Clip as ``Accelerator.clip_grad_norm_`` does, and tell the optimizer the norm of what was clipped."""
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norm = clip(params, max_norm, norm_type)
    # The optimizer sees later changes of gradients, but not those through `.data`, which a callback may make. Norms of
    # type 0 and below can be finite where a gradient is not.
    told = norm_type > 0 and not any(map(_comes_between, handler.callbacks))
    optimizer.take_norm(norm if told else None, params)
    return norm


def _comes_between(callback: TrainerCallback) -> bool:
    """Whether a callback does something between clipping and the step."""
    own = getattr(type(callback), _BETWEEN, None)
    return _BETWEEN in vars(callback) or own is not getattr(TrainerCallback, _BETWEEN)
