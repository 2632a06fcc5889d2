"""What weights decay to: 0, or their base, the weights from which a fine-tuning run started.

Where a param group has ``decay_to="base"`` it is the *change* c = w - w₀ of each weight that decays:

    w_{n+1} = w₀ + (w' - w₀) · s / (s + α λ_p),   s = |w_n - w₀|^(2-p)

A weight whose change has died is bit-identical to its base in every dtype, because the base itself is stored and not a
sum. The base is the entry ``base`` of a parameter's state, of its shape, dtype and placement: a copy from before the
first step, unless :func:`give_bases` has given another. Zero absorbs here as well: a change of 0 stays 0 while λ_p > 0.
A change that lives, and does not decay in a step, is not rounded to 0 in it: it becomes the smallest one that the dtype
has, so that a number of unchanged weights is kept exactly.

This module has the formula for whole tensors; ``cpu/to_base.cpp`` computes the same in C++.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .param_groups import HEALING
from .tensor_step import apply_factor_
from .unit_kinds import ELEMENT, kind_of, n_of_m


ZERO, BASE = "zero", "base"
DECAY_TO = (ZERO, BASE)
"""What a param group may decay to."""

HELD = 1 - 2.0**-20
"""The least factor by which a change does not decay in a step: in a million of such steps it would not die."""


def decays_to_base(group: Mapping[str, Any]) -> bool:
    """Whether what decays in a param group is the distance of its weights from their base."""
    return group.get("decay_to") == BASE


def holds_unchanged(group: Mapping[str, Any]) -> bool:
    """Whether no unchanged weight of a group may move any more: after the last pruning of a run with a target.

    Otherwise tensors and units that have not moved yet may, as may the spare unchanged weights of an N:M block.
    """
    return decays_to_base(group) and group.get("phase") == HEALING


def decays_in_units(group: Mapping[str, Any]) -> bool:
    """Whether the weights of a group decay by units; where unchanged ones are held, those of blocks stay one by one."""
    kind = kind_of(group)
    return kind != ELEMENT and not (n_of_m(kind) is not None and holds_unchanged(group))


def base_in(state: Mapping[str, Any] | None) -> Tensor | None:
    """Return the base that the state of a parameter holds; None before its first step, and if it decays to 0."""
    return (state or {}).get("base")


def base_of(param: Tensor, optimizer: Any) -> Tensor | None:
    """Return the base of a parameter in an optimizer; None before its first step, unless one is given."""
    base = base_in(optimizer.state.get(param))
    while base is None and optimizer is not None:
        base = (getattr(optimizer, "given_bases", None) or {}).get(param)
        optimizer = getattr(optimizer, "optimizer", None)
    return base


def give_bases(optimizer: Any, bases: Mapping[Tensor, Tensor]) -> None:
    """Let parameters of an optimizer decay to other weights than those from before their first step.

    The tensors are kept as they are, so they may be memory-mapped. A base that a checkpoint has brought stays.

    Args:
        optimizer: An :class:`~hf_pdecay.AdamWLp` or :class:`~hf_pdecay.LpDecay`, which Accelerate may have wrapped.
        bases: By parameter, its base: of its shape, dtype and device, and a DTensor placed as it is if it is one.

    Raises:
        TypeError: If the optimizer is another.
        ValueError: If a base does not fit, a parameter is not in a group with ``decay_to="base"``, or it has stepped.
    """
    while not hasattr(optimizer, "take_bases") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "take_bases"):
        raise TypeError(f"Only AdamWLp and LpDecay take bases, not {type(optimizer).__name__}.")
    optimizer.take_bases(bases)


def change(weight: Tensor, base: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Return what decays of weights, in ``dtype`` (default: theirs): a new tensor w - w₀, or w without a base.

    In float32, and for bfloat16 and float16 weights in float32, it is 0 only where the two are equal.
    """
    dtype = weight.dtype if dtype is None else dtype
    return weight.to(dtype) if base is None else weight.to(dtype) - base.to(dtype)


def end_(weight: Tensor, which: Tensor, base: Tensor | None) -> None:
    """Set weights to what they decay to, in place, where ``which``, a mask of their shape, is true."""
    if base is None:
        weight.masked_fill_(which, 0)
    else:
        weight.copy_(torch.where(which, base, weight))


def decayed(
    stepped: Tensor,
    before: Tensor,
    factor: Tensor,
    base: Tensor,
    rounded: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    zeros: Tensor | None = None,
) -> Tensor:
    """Return weights after the decay of their changes, in the dtype of ``base``.

    Args:
        stepped: The weights after the optimizer's step, in the dtype of the computation.
        before: Their changes before that step, in the same dtype.
        factor: The shrink factor of each, from ``before``.
        base: The base, in the dtype of the weights.
        rounded: Rounds the result to the dtype of ``base``; None for the nearest.
        dtype: Changes below its smallest normal number become 0; None for the dtype of the computation.
        zeros: A mask of weights that become 0, whatever their base.
    """
    wide = base.to(stepped.dtype)
    after = stepped - wide
    apply_factor_(after, factor, dtype)
    held = factor >= HELD
    result = torch.where(held, stepped, wide + after)
    if zeros is not None:
        result = result.masked_fill(zeros, 0)
    stored = result.to(base.dtype) if rounded is None else rounded(result)
    # What equals its base gets the bits of it, as zeros have two signs.
    ends = torch.where(held & (before != 0), next_to(base, before), base)
    return torch.where(stored == base, ends, stored)


def next_to(base: Tensor, signs: Tensor) -> Tensor:
    """Return the numbers next to those of a base in its dtype, above where ``signs`` is above 0 and below elsewhere."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[base.element_size()]
    least = torch.ones((), dtype=whole, device=base.device).view(base.dtype)
    zero = base == 0
    # The bits of numbers above 0 have the order of the numbers, those of numbers below 0 the opposite one.
    outwards = (base > 0) == (signs > 0)
    bits = base.contiguous().view(whole)
    stepped = (bits + torch.where(outwards, 1, -1).to(whole)).view(base.dtype)
    return torch.where(zero, torch.where(signs > 0, least, -least), stepped)
