"""The shrink of weights that another optimizer has stepped, by factors from the weights before that step.

The work is done on bounded chunks: a large tensor in parts, small ones side by side in one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import MIN_COMPILED, has_triton
from .cpu import step as compiled
from .decay import shrink_factor
from .foreach import chunk_size, chunks
from .rounding import LOW_PRECISION, noise_bits, stochastic_round
from .tensor_step import Decay, Stepped, apply_factor_, is_flat, smallest


class _Part(NamedTuple):
    """Matching views of some weights of one tensor, and the place of the first of them in it."""

    weight: Tensor
    before: Tensor
    averaged: Tensor | None
    awake: bool | Tensor
    place: int
    first: int


def copies(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors, made with few launches."""
    made = [torch.empty_like(weight) for weight in weights]
    if made:
        torch._foreach_copy_(made, list(weights))
    return made


def decay_weights(tensors: Sequence[Stepped], decay: Decay) -> None:
    """Shrink the weights of a param group, in place, after the base optimizer's step.

    On a CPU one C++ function does it where there is enough to do, and on a GPU one Triton kernel, as they do AdamWLp's
    step.
    """
    taken = _compiled(tensors, decay)
    if taken:
        weights, copied, places = zip(*((each.weight, each.before, each.place) for each in taken), strict=True)
        compiled.decay_weights(weights, copied, places, decay)
    elif has_triton(tensors[0].weight.device if tensors else None):
        from .gpu import decay as gpu_decay  # imports triton, which takes its time

        taken = [each for each in tensors if gpu_decay.takes(each)]
        by_dtype: dict[torch.dtype, list[Stepped]] = {}
        for each in taken:
            by_dtype.setdefault(each.weight.dtype, []).append(each)
        for some in by_dtype.values():
            gpu_decay.decay_weights(some, decay)
    chosen = {id(each) for each in taken}
    tensors = [each for each in tensors if id(each) not in chosen]
    for batch in _batches(tensors):
        _shrink_batch(batch, decay)


def _compiled(tensors: Sequence[Stepped], decay: Decay) -> list[Stepped]:
    """The tensors that the C++ function takes."""
    if isinstance(decay.finite, Tensor) or isinstance(decay.alpha_lambda, Tensor):
        return []
    taken = [
        each
        for each in tensors
        if each.weight.is_cpu
        and each.weight.dtype in compiled.CODES
        and each.awake is True
        and each.averaged is None
        and decay.alpha_lambda >= smallest(each.weight.dtype)
        and is_flat(each.weight, each.before)
    ]
    return taken if can_compile([each.weight for each in taken]) else []


def can_compile(weights: Sequence[Tensor]) -> bool:
    """Whether there is enough to do on a CPU for the C++ functions, and they can be had."""
    return sum(each.numel() for each in weights if each.is_cpu) >= MIN_COMPILED and compiled.unavailable() is None


def on_device(lr: float | Tensor) -> bool:
    """Whether the host does not know a learning rate without waiting for a device."""
    return isinstance(lr, Tensor) and not lr.is_cpu


def rate_on(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """Return a learning rate as a number, or as a 0-dim tensor on a device where the host does not know it."""
    return lr.reshape(()).to(device, non_blocking=True) if on_device(lr) else float(lr)  # type: ignore[union-attr]


def _batches(tensors: Sequence[Stepped]) -> Iterator[list[_Part]]:
    """Yield parts to be shrunk together, of a bounded number of weights."""
    batch: list[_Part] = []
    count = 0
    for part in _parts(tensors):
        numel = part.weight.numel()
        if batch and (count + numel > chunk_size(part.weight.device) or not _alike(batch[0], part)):
            yield batch
            batch, count = [], 0
        batch.append(part)
        count += numel
    if batch:
        yield batch


def _parts(tensors: Sequence[Stepped]) -> Iterator[_Part]:
    for weight, before, averaged, awake, place in tensors:
        first = 0
        for views in chunks(weight, before, *(() if averaged is None else (averaged,))):
            yield _Part(views[0], views[1], None if averaged is None else views[2], awake, place, first)
            first += views[0].numel()


def _alike(one: _Part, other: _Part) -> bool:
    """Whether two parts can share a buffer. A tensor that may be asleep is alone."""
    same = one.weight.device == other.weight.device and one.weight.dtype == other.weight.dtype
    return same and one.awake is True and other.awake is True


def _shrink_batch(batch: Sequence[_Part], decay: Decay) -> None:
    head = batch[0]
    stored = [part.weight for part in batch]
    before = _joined([part.before for part in batch])
    weights = _joined(stored)
    dtype = weights.dtype
    low = dtype in LOW_PRECISION
    working = torch.float32 if low else dtype

    factor = None
    if head.awake is not False:
        factor = shrink_factor(before.to(working), decay.p_norm, decay.alpha_lambda)
        for condition in (head.awake, decay.finite):
            if isinstance(condition, Tensor):
                factor = torch.where(condition.to(factor.device), factor, torch.ones_like(factor))
    zeros = before == 0 if decay.keep_zeros else None
    noise = noise_bits(decay.step, head.place, head.first, weights.numel(), weights.device) if low else None

    result = _shrunk(weights.to(working), factor, zeros)
    if noise is not None:
        result = stochastic_round(result, dtype, noise)
    _store(result, stored)

    averaged = [part.averaged for part in batch if part.averaged is not None]
    if not averaged:
        return
    z = _shrunk(_joined(averaged).to(working), factor, zeros)
    if factor is not None:
        # The average of two weights is zero where both are.
        z.masked_fill_((result == 0) & (factor < 1), 0)
    _store(z if noise is None else stochastic_round(z, dtype, noise ^ (noise >> 16)), averaged)


def _shrunk(weights: Tensor, factor: Tensor | None, zeros: Tensor | None) -> Tensor:
    """Weights after the shrink: in place where they are of the dtype that it is computed in."""
    if factor is not None:
        apply_factor_(weights, factor)
    if zeros is not None:
        weights.masked_fill_(zeros, 0)
    return weights


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor as it is, or several as one flat copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def _store(result: Tensor, stored: Sequence[Tensor]) -> None:
    if len(stored) == 1:
        if result is not stored[0]:
            stored[0].copy_(result)
        return
    pieces = result.split([tensor.numel() for tensor in stored])
    torch._foreach_copy_(list(stored), [piece.view(each.shape) for piece, each in zip(pieces, stored, strict=True)])
