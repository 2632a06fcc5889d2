"""Tensors that are wholly zero when training starts: they stay undecayed until they have become non-zero.

Zero absorbs, so that such a tensor (LoRA's B, a zero-initialised head) could never learn otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed import any_nonzero


def dormant_entry(param: Tensor) -> Tensor:
    """Return the entry of a tensor's state that says whether it is wholly zero now."""
    # The only look at the weights that waits for the device, once in a tensor's life. Every tensor has the entry, as
    # torch.distributed.checkpoint loads into the state of an optimizer that has stepped the weights as they are now.
    dormant = bool(param.numel()) and not any_nonzero(param)
    return placed(torch.full((), dormant, dtype=torch.bool, device=param.device))


def placed(dormant: Tensor) -> Tensor:
    """Where the entry is looked at: on the device for a tensor that may wake there, else on the host for good."""
    return dormant if dormant.is_cpu or dormant.item() else dormant.cpu()


def wake(param: Tensor, dormant: Tensor, on_device: bool | None = None) -> bool | Tensor:
    """Note whether a tensor that began wholly zero still is, and return whether it is awake."""
    if param.device.type != "cpu" if on_device is None else on_device:
        dormant.logical_and_(~any_nonzero(param))
        return ~dormant
    if dormant.item():
        dormant.logical_and_(~any_nonzero(param))
    return not dormant.item()


def is_awake(param: Tensor, dormant: Tensor) -> bool | Tensor:
    """Whether a tensor decays in the step that is about to be made; no wait for the device."""
    if dormant.is_cpu and not dormant.item():
        return True
    return wake(param, dormant)
