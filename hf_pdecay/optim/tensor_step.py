"""The values that every backend takes for one step of one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class Hyperparameters:
    """The hyperparameters of a param group; see :class:`~hf_pdecay.AdamWLp`.

    All tensors of a group share one object, which :meth:`update` brings up to date in later steps.

    Attributes:
        rounds: Whether the step rounds stochastically also where λ_p is 0, as the weights decay at other times, or
            after the step.
    """

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
    rounds: bool = False

    @property
    def decays(self) -> bool:
        """Whether the step is one of weights that decay; one that is not is torch's AdamW."""
        return self.lambda_p != 0 or self.rounds

    def update(self, fresh: Hyperparameters) -> None:
        """Take over all values of another object."""
        vars(self).update(vars(fresh))


class Structure(NamedTuple):
    """What a step needs to decay the units or N:M blocks of a tensor. Most backends leave that until after the step.

    Attributes:
        hyper: Hyperparameters of the group with their λ_p; those of the step have λ_p = 0.
        dim: Dimension along which the units or blocks lie.
        table: For units, the table of the tensor, see :class:`~.unit_tables.UnitTables`.
        blocks: N and M.
    """

    hyper: Hyperparameters
    dim: int
    table: Tensor | None = None
    blocks: tuple[int, int] | None = None


class TensorStep(NamedTuple):
    """One tensor's step: the tensors that it reads and writes, all on one device, and its hyperparameters.

    Attributes:
        param: The weights, of any shape and floating dtype; a plain tensor, which is the local shard of a DTensor.
        grad: Their gradient, of the same shape and dtype.
        exp_avg: First moment, of the same shape.
        exp_avg_sq: Second moment, of the same shape.
        step: 0-dim float32 counter, increased by the step.
        awake: False, or a 0-dim bool tensor, for a dormant tensor: it does not decay.
        hyper: Hyperparameters of the group.
        place: Place of the tensor in the optimizer, from which its random bits come, see :func:`noise_place`.
        structure: Its structured decay, if weights do not decay one by one.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    awake: bool | Tensor
    hyper: Hyperparameters
    place: int
    structure: Structure | None = None


def noise_place(group: int, index: int = 0) -> int:
    """Return the place in the optimizer, from which the random bits come, of a parameter of a param group."""
    return (group << 20) + index


def fuses(step: TensorStep) -> bool:
    """Whether the C++ step and the Triton kernel do the structured decay of a tensor too."""
    structure = step.structure
    if structure is None or structure.table is not None:
        return structure is not None
    # Only blocks of neighbours in memory.
    return structure.blocks == (2, 4) and step.param.stride(structure.dim) == 1


class Decay(NamedTuple):
    """The settings with which the weights of a param group decay after another optimizer's step.

    Attributes:
        p_norm: p.
        alpha_lambda: α λ_p, a float, or a 0-dim tensor on the device of the weights.
        keep_zeros: Whether weights that were zero before the step stay zero.
        step: Number of the step, from which the random bits come.
        finite: Whether the base did step, which on an accelerator the host does not know.
    """

    p_norm: float
    alpha_lambda: float | Tensor
    keep_zeros: bool
    step: int
    finite: bool | Tensor


def alpha_lambda_p(lr: float | Tensor, lambda_p: float, device: torch.device) -> float | Tensor:
    """Return α λ_p: a number, or a tensor on the device if the learning rate is a tensor and the device not a CPU."""
    if not isinstance(lr, Tensor) or device.type == "cpu":
        return float(lr) * float(lambda_p)
    return lr.reshape(()).to(device, non_blocking=True) * lambda_p


def smallest(dtype: torch.dtype) -> float:
    """Return the least α λ_p that changes weights of a dtype: low-precision ones decay in float32."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny


def flat_views(tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Return tensors of one shape as flat views in the order of memory and of random bits, or None if there is none."""
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
    """Return the order of dimensions in which all tensors are contiguous, such as channels-last; None if none is."""
    first = tensors[0]
    order = tuple(range(first.dim()))
    if all(tensor.is_contiguous() for tensor in tensors):
        return order
    order = tuple(sorted(order, key=lambda dim: (first.stride(dim), first.size(dim)), reverse=True))
    return order if all(tensor.permute(order).is_contiguous() for tensor in tensors) else None


def apply_factor_(weights: Tensor, factor: Tensor, dtype: torch.dtype | None = None) -> None:
    """Multiply weights by factors of at most 1, in place; a zero becomes 0, never -0.

    Weights that a factor below 1 takes below the smallest normal number of ``dtype``, by default the tensor's own,
    become 0. At p = 1 and above weights fade and would stay subnormal for long, which a CPU multiplies slowly.
    """
    weights.mul_(factor).add_(0.0)
    weights.masked_fill_((weights.abs() < torch.finfo(dtype or weights.dtype).tiny) & (factor < 1), 0)


class Stepped(NamedTuple):
    """A tensor around a step of the base optimizer; all tensors are plain, on one device and of one shape.

    Attributes:
        weight: The weights after the base's step.
        before: Their copy from before the step.
        averaged: The weights z of a schedule-free optimizer, which shrink by the same factors; else None.
        awake: As in :class:`TensorStep`.
        place: As in :class:`TensorStep`.
        first: Place of the first element, if these are views of a piece of the tensor.
    """

    weight: Tensor
    before: Tensor
    averaged: Tensor | None
    awake: bool | Tensor
    place: int
    first: int = 0
