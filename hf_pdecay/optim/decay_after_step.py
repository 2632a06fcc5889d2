"""The decay of weights that another optimizer has stepped, by factors from the weights before it, in bounded chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .backends import MIN_COMPILED, has_triton
from .bases import change, decayed
from .cpu import step as compiled
from .decay import shrink_factor
from .foreach import chunk_size, chunks
from .rounding import LOW_PRECISION, noise_bits, stochastic_round
from .tensor_step import Decay, Stepped, apply_factor_, is_flat, smallest


def copies(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors, made with few launches."""
    made = [torch.empty_like(weight) for weight in weights]
    if made:
        torch._foreach_copy_(made, list(weights))
    return made


def decay_weights(tensors: Sequence[Stepped], decay: Decay) -> None:
    """Decay the weights of a param group, in place, after the base's step: in C++ or Triton where that pays."""
    taken = _compiled(tensors, decay)
    if taken:
        compiled.decay_weights(taken, decay)
    elif has_triton(tensors[0].weight.device if tensors else None):
        from .gpu import decay as gpu_decay  # imports triton, which takes its time

        taken = [tensor for tensor in tensors if gpu_decay.takes(tensor)]
        by_dtype: dict[torch.dtype, list[Stepped]] = {}
        for tensor in taken:
            by_dtype.setdefault(tensor.weight.dtype, []).append(tensor)
        for alike in by_dtype.values():
            gpu_decay.decay_weights(alike, decay)
    chosen = {id(tensor) for tensor in taken}
    for batch in _batches([tensor for tensor in tensors if id(tensor) not in chosen]):
        _decay_batch(batch, decay)


def _compiled(tensors: Sequence[Stepped], decay: Decay) -> list[Stepped]:
    """Return the tensors that the C++ function takes."""
    if isinstance(decay.finite, Tensor) or isinstance(decay.alpha_lambda, Tensor):
        return []
    taken = [
        tensor
        for tensor in tensors
        if tensor.weight.is_cpu
        and tensor.weight.dtype in compiled.CODES
        and tensor.awake is True
        and tensor.averaged is None
        and decay.alpha_lambda >= smallest(tensor.weight.dtype)
        and is_flat(tensor.weight, tensor.before, *(() if tensor.base is None else (tensor.base,)))
    ]
    return taken if can_compile([tensor.weight for tensor in taken]) else []


def can_compile(weights: Sequence[Tensor]) -> bool:
    """Whether there is enough to do on a CPU for the C++ functions, and they are available."""
    return sum(weight.numel() for weight in weights if weight.is_cpu) >= MIN_COMPILED and compiled.unavailable() is None


def on_device(lr: float | Tensor) -> bool:
    """Whether the host does not know a learning rate without waiting for a device."""
    return isinstance(lr, Tensor) and not lr.is_cpu


def rate_on(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """Return a learning rate as a number, or as a 0-dim tensor on a device where the host does not know it."""
    return lr.reshape(()).to(device, non_blocking=True) if on_device(lr) else float(lr)  # type: ignore[union-attr]


def _batches(tensors: Sequence[Stepped]) -> Iterator[list[Stepped]]:
    """Yield pieces that decay together, of a bounded number of weights."""
    batch: list[Stepped] = []
    count = 0
    for piece in _pieces(tensors):
        numel = piece.weight.numel()
        if batch and (count + numel > chunk_size(piece.weight.device) or not _alike(batch[0], piece)):
            yield batch
            batch, count = [], 0
        batch.append(piece)
        count += numel
    if batch:
        yield batch


def _pieces(tensors: Sequence[Stepped]) -> Iterator[Stepped]:
    """Yield matching views of each tensor, of a bounded number of weights."""
    for tensor in tensors:
        first = 0
        # A tensor with a base has no average.
        more = [extra for extra in (tensor.averaged, tensor.base) if extra is not None]
        for weight, before, *rest in chunks(tensor.weight, tensor.before, *more):
            averaged, base = (None, *rest) if tensor.base is not None else (*rest, None, None)[:2]
            yield tensor._replace(weight=weight, before=before, averaged=averaged, first=first, base=base)
            first += weight.numel()


def _alike(one: Stepped, other: Stepped) -> bool:
    """Whether two pieces can share a buffer; a tensor that may be dormant cannot."""
    same = one.weight.device == other.weight.device and one.weight.dtype == other.weight.dtype
    same = same and (one.base is None) == (other.base is None)
    return same and one.awake is True and other.awake is True


def _decay_batch(batch: Sequence[Stepped], decay: Decay) -> None:
    head = batch[0]
    stored = [piece.weight for piece in batch]
    before = _joined([piece.before for piece in batch])
    weights = _joined(stored)
    dtype = weights.dtype
    low = dtype in LOW_PRECISION
    working = torch.float32 if low else dtype

    # Where α λ_p is known to be 0 there is nothing to do to changes.
    asleep = head.base is not None and not isinstance(decay.alpha_lambda, Tensor) and decay.alpha_lambda == 0
    base = None if head.base is None or asleep else _joined([piece.base for piece in batch if piece.base is not None])
    changes = change(before, base, working)
    factor = None
    if head.awake is not False and not asleep:
        factor = shrink_factor(changes, decay.p_norm, decay.alpha_lambda)
        for condition in (head.awake, decay.finite):
            if isinstance(condition, Tensor):
                factor = torch.where(condition.to(factor.device), factor, torch.ones_like(factor))
    zeros = before == 0 if decay.keep_zeros else None
    noise = noise_bits(decay.step, head.place, head.first, weights.numel(), weights.device) if low else None

    def rounded(values: Tensor) -> Tensor:
        return values if noise is None else stochastic_round(values, dtype, noise)

    if base is not None and factor is not None:
        result = decayed(weights.to(working), changes, factor, base, rounded, zeros=zeros)
    else:
        result = rounded(_decayed(weights.to(working), factor, zeros))
    _store(result, stored)

    averaged = [piece.averaged for piece in batch if piece.averaged is not None]
    if not averaged:
        return
    z = _decayed(_joined(averaged).to(working), factor, zeros)
    if factor is not None:
        # The average of two weights is zero where both are.
        z.masked_fill_((result == 0) & (factor < 1), 0)
    _store(z if noise is None else stochastic_round(z, dtype, noise ^ (noise >> 16)), averaged)


def _decayed(weights: Tensor, factor: Tensor | None, zeros: Tensor | None) -> Tensor:
    """Return the weights after the decay: in place if they have the working dtype."""
    if factor is not None:
        apply_factor_(weights, factor)
    if zeros is not None:
        weights.masked_fill_(zeros, 0)
    return weights


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return one tensor itself, or several as one flat copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def _store(result: Tensor, stored: Sequence[Tensor]) -> None:
    if len(stored) == 1:
        if result is not stored[0]:
            stored[0].copy_(result)
        return
    results = result.split([tensor.numel() for tensor in stored])
    torch._foreach_copy_(list(stored), [new.view(old.shape) for new, old in zip(results, stored, strict=True)])
