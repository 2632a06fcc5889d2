"""The values that every backend takes for one step of one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class Hyperparameters:
    """The hyperparameters of a param group, see :class:`~hf_pdecay.AdamWLp`; all its tensors share one object."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    p_norm: float
    lambda_p: float
    keep_zeros: bool
    maximize: bool
    skip_nonfinite: bool = True
    rounds: bool = False  # whether to round stochastically also where λ_p is 0, as the weights decay at other times

    @property
    def decays(self) -> bool:
        """Whether the step is one of weights that decay; any other is torch's AdamW."""
        return self.lambda_p != 0 or self.rounds

    def update(self, fresh: Hyperparameters) -> None:
        """Take over all values of another object."""
        vars(self).update(vars(fresh))


class Structure(NamedTuple):
    """What a step needs to decay the units or N:M blocks of a tensor. Most backends leave that until after the step."""

    hyper: Hyperparameters  # with the λ_p of the group; those of the step have λ_p = 0
    dim: int  # along which the units or blocks lie
    table: Tensor | None = None  # for units, see UnitTables
    blocks: tuple[int, int] | None = None  # N and M


class TensorStep(NamedTuple):
    """One tensor's step: the tensors that it reads and writes, of one shape and on one device, and its settings."""

    param: Tensor  # a plain tensor: of a DTensor the local shard
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor  # 0-dim float32 counter, increased by the step
    awake: bool | Tensor  # False, or a 0-dim bool tensor, for a dormant tensor, which does not decay
    hyper: Hyperparameters
    place: int  # in the optimizer, from which the random bits come, see noise_place
    structure: Structure | None = None  # None if weights decay one by one
    base: Tensor | None = None  # what the weights decay to, see bases.py; None for 0


def noise_place(group: int, index: int = 0) -> int:
    """Return the place of a parameter in the optimizer, from which its random bits come."""
    return (group << 20) + index


def fuses(step: TensorStep) -> bool:
    """Whether the C++ step and the Triton kernel do the structured decay of a tensor too."""
    structure = step.structure
    if structure is None or structure.table is not None:
        return structure is not None
    # Only blocks of neighbours in memory.
    return structure.blocks == (2, 4) and step.param.stride(structure.dim) == 1


class Decay(NamedTuple):
    """The settings with which the weights of a param group decay after another optimizer's step."""

    p_norm: float
    alpha_lambda: float | Tensor  # α λ_p; a tensor is 0-dim, on the device of the weights
    keep_zeros: bool
    step: int  # its number, from which the random bits come
    finite: bool | Tensor  # whether the base did step, which on an accelerator the host does not know


def alpha_lambda_p(lr: float | Tensor, lambda_p: float, device: torch.device) -> float | Tensor:
    """Return α λ_p: a number, or a 0-dim tensor on an accelerator if the learning rate is a tensor."""
    if not isinstance(lr, Tensor) or device.type == "cpu":
        return float(lr) * float(lambda_p)
    return lr.reshape(()).to(device, non_blocking=True) * lambda_p


def smallest(dtype: torch.dtype) -> float:
    """Return the least α λ_p that changes weights of a dtype: low-precision ones decay in float32."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny


def flat_views(tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Return tensors of one shape as flat views in the order of memory and random bits; None if they differ in it."""
    order = _order(tensors)
    return None if order is None else tuple(tensor.permute(order).view(-1) for tensor in tensors)


def spacing(tensor: Tensor, dim: int) -> int:
    """Return the distance in a flat tensor from one index of a dimension to the next, if it has more than one."""
    if tensor.is_contiguous():
        return tensor.shape[dim + 1 :].numel()
    return tensor.stride(dim) if tensor.shape[dim] > 1 else tensor.numel()


def is_flat(*tensors: Tensor) -> bool:
    """Whether tensors of one shape are without gaps and in the same order of elements."""
    return _order(tensors) is not None


def _order(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """Return the order of dimensions in which all tensors are contiguous, such as channels-last, or None."""
    first = tensors[0]
    order = tuple(range(first.dim()))
    if all(tensor.is_contiguous() for tensor in tensors):
        return order
    order = tuple(sorted(order, key=lambda dim: (first.stride(dim), first.size(dim)), reverse=True))
    return order if all(tensor.permute(order).is_contiguous() for tensor in tensors) else None


def apply_factor_(weights: Tensor, factor: Tensor, dtype: torch.dtype | None = None) -> None:
    """Multiply weights by factors of at most 1, in place; a zero becomes 0, never -0.

    Weights that decay below the smallest normal number of ``dtype`` (default: their own) become 0. At p = 1 and above
    they would stay subnormal for long, which a CPU multiplies slowly.
    """
    weights.mul_(factor).add_(0.0)
    weights.masked_fill_((weights.abs() < torch.finfo(dtype or weights.dtype).tiny) & (factor < 1), 0)


class Stepped(NamedTuple):
    """A tensor around a step of the base optimizer; all tensors are plain, on one device and of one shape."""

    weight: Tensor  # after the base's step
    before: Tensor  # a copy from before that step
    averaged: Tensor | None  # z of a schedule-free optimizer, which shrinks by the same factors
    awake: bool | Tensor  # as in TensorStep, like `place`
    place: int
    first: int = 0  # place of the first element in the tensor, if these are views of a piece
    base: Tensor | None = None  # what the weights decay to; None for 0
