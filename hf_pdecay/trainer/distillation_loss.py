"""How far a student is from its teacher, in logits and in hidden states, with gradients that are computed at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


# Values of a chunk of logits in float32: what a CPU's caches hold, and what keeps a GPU busy.
_CHUNK = {"cpu": 2**18}
_CHUNK_ELSEWHERE = 2**24


def entropies(logits: Tensor) -> Tensor:
    """Return the entropy of each distribution in nats, in float32; logits are (..., classes)."""
    rows = logits.detach().reshape(-1, logits.shape[-1])
    size = max(1, _CHUNK.get(logits.device.type, _CHUNK_ELSEWHERE) // rows.shape[-1])
    logs = (torch.log_softmax(chunk.float(), -1) for chunk in rows.split(size))
    return torch.cat([torch.special.entr(chunk.exp()).sum(-1) for chunk in logs]).reshape(logits.shape[:-1])


def kl_sum(student: Tensor, teacher: Tensor, counts: Tensor, temperature: float) -> Tensor:
    r"""Return the sum over the tokens that count of :math:`T^2 \, \mathrm{KL}(\mathrm{teacher} \| \mathrm{student})`.

    Both distributions are softmax(logits / T); :math:`T^2` keeps the size of the gradient (Hinton et al.,
    https://huggingface.co/papers/1503.02531). Softmax is in float32 or wider, a chunk of tokens at a time, and the
    gradient takes the place of the teacher's logits in memory where their type and shape allow it.

    Args:
        student: Logits, (..., classes).
        teacher: Logits of the same tokens, which may be overwritten. If the two have another number of classes, the
            first that both have count.
        counts: Which tokens count, booleans of shape (...).
        temperature: T, above 0.
    """
    shape = -1, student.shape[-1]
    result: Tensor = _KlSum.apply(
        student.reshape(shape), teacher.reshape(-1, teacher.shape[-1]), counts.reshape(-1), temperature
    )
    return result


class _KlSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counts: Tensor, temperature: float) -> Tensor:
        same = student.shape == teacher.shape and student.dtype == teacher.dtype
        gradient = teacher if same else torch.empty_like(student)
        classes = min(student.shape[-1], teacher.shape[-1])
        wide = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=student.device)
        size = max(1, _CHUNK.get(student.device.type, _CHUNK_ELSEWHERE) // classes)
        for begin in range(0, student.shape[0], size):
            chunk = slice(begin, begin + size)
            if counts.device.type == "cpu" and not counts[chunk].any():  # elsewhere a look would wait for the device
                gradient[chunk] = 0
                continue
            ours, theirs = (each[chunk, :classes].to(wide) for each in (student, teacher))
            if temperature != 1:
                ours, theirs = ours / temperature, theirs / temperature
            p, q = torch.softmax(ours, -1), torch.softmax(theirs, -1)
            # Σ q (log q - log p), with log q = logit - log of its sum. A class that the teacher rules out, by a logit
            # of -inf, adds nothing.
            terms = (theirs - ours).mul_(q).masked_fill_(q == 0, 0)
            divergences = terms.sum(-1) + _log_sum(ours, p) - _log_sum(theirs, q)
            total += divergences.masked_fill_(~counts[chunk], 0).sum()
            slope = p.sub_(q).masked_fill_(~counts[chunk, None], 0)
            if temperature != 1:
                slope.mul_(temperature)
            gradient[chunk, :classes] = slope.to(gradient.dtype)
        gradient[:, classes:] = 0
        ctx.gradient = gradient
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("kl_sum keeps its gradient for one backward pass.")
        return gradient.mul_(upstream), None, None, None


def _log_sum(logits: Tensor, softmax: Tensor) -> Tensor:
    """Log Σ exp(logit), from the largest logit and its probability."""
    return logits.amax(-1) - softmax.amax(-1).log()


def error_sum(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over tokens of ``weight · ‖student − teacher‖² / ‖teacher‖²``, in float32 or wider.

    It is the loss of SquareHead (https://huggingface.co/papers/2310.06927) with each token normalised by itself, so
    that a sum over several batches is that of one. Tokens whose teacher is 0 count nothing.

    Args:
        student: Hidden states of a layer, (..., width).
        teacher: Those of the teacher, of the same shape.
        weights: What each token counts, (...).
    """
    result: Tensor = _ErrorSum.apply(student, teacher, weights)
    return result


class _ErrorSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        theirs = teacher.to(wide)
        norms = theirs.square().sum(-1)
        per_norm = (weights.to(wide) / norms).masked_fill_(norms == 0, 0)
        difference = student.to(wide) - theirs
        total = (difference.square().sum(-1) * per_norm).sum()
        ctx.gradient = difference.mul_(2 * per_norm.unsqueeze(-1)).to(student.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return ctx.gradient * upstream.to(ctx.gradient.dtype), None, None
