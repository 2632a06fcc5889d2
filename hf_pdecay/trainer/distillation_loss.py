"""How far a student is from its teacher, in logits and in hidden states, with gradients that are computed at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


TOP = 64
"""How many probabilities of a token :func:`summary` keeps."""


# Values of a chunk of logits in float32: what a CPU's caches hold, and what keeps a GPU busy.
_CHUNK = {"cpu": 2**18}
_CHUNK_ELSEWHERE = 2**24
_TINY = torch.finfo(torch.float32).tiny


def entropies(logits: Tensor) -> Tensor:
    """Return the entropy of each distribution in nats, in float32; logits are (..., classes)."""
    rows = logits.detach().reshape(-1, logits.shape[-1])
    logs = (torch.log_softmax(rows[chunk].float(), -1) for chunk in _chunks(rows.shape[0], rows.shape[1], rows.device))
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


class _Kept(torch.autograd.Function):
    """A sum whose forward pass leaves the gradient for its first argument as ``ctx.gradient``; the others have none."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("The loss of a teacher keeps its gradient for one backward pass.")
        return gradient.mul_(upstream), *[None] * (len(ctx.needs_input_grad) - 1)


class _KlSum(_Kept):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counts: Tensor, temperature: float) -> Tensor:
        same = student.shape == teacher.shape and student.dtype == teacher.dtype
        gradient = teacher if same else torch.empty_like(student)
        classes = min(student.shape[-1], teacher.shape[-1])
        wide = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=student.device)
        here = counts.device.type == "cpu"  # elsewhere a look at values would wait for the device
        places = counts.nonzero()[:, 0] if here else None
        for rows in _chunks(student.shape[0] if places is None else len(places), classes, student.device):
            if places is None:
                ours, theirs = (each[rows, :classes].to(wide) for each in (student, teacher))
            else:
                ours, theirs = (each[:, :classes].index_select(0, places[rows]).to(wide) for each in (student, teacher))
            if temperature != 1:
                ours, theirs = ours / temperature, theirs / temperature
            p, q = torch.softmax(ours, -1), torch.softmax(theirs, -1)
            # Σ q (log q - log p), with log q = logit - log of its sum.
            divergences = _weighed_sum(theirs - ours, q, here) + _log_sum(ours, p) - _log_sum(theirs, q)
            slope = p.sub_(q)
            if temperature != 1:
                slope.mul_(temperature)
            if places is None:
                total += divergences.masked_fill_(~counts[rows], 0).sum()
                gradient[rows, :classes] = slope.masked_fill_(~counts[rows, None], 0).to(gradient.dtype)
            else:
                total += divergences.sum()
                gradient[:, :classes].index_copy_(0, places[rows], slope.to(gradient.dtype))
        if places is not None:
            gradient.index_fill_(0, (~counts).nonzero()[:, 0], 0)
        if classes < gradient.shape[-1]:
            gradient[:, classes:] = 0
        ctx.gradient = gradient
        return total * temperature**2


def _weighed_sum(values: Tensor, weights: Tensor, here: bool) -> Tensor:
    """Sum the values of each row by their weights; what has no weight, as at a logit of -inf, adds nothing."""
    products = values.mul_(weights)
    sums = products.sum(-1)
    if here and sums.isfinite().all():  # the mask takes longer than all else, on a CPU
        return sums
    return products.masked_fill_(weights == 0, 0).sum(-1)


def _log_sum(logits: Tensor, softmax: Tensor) -> Tensor:
    """Log Σ exp(logit), from the largest logit and its probability."""
    return logits.amax(-1) - softmax.amax(-1).log()


class Answers(NamedTuple):
    """What is kept of a teacher's distributions.

    Args:
        ids: The classes with the largest probabilities, (tokens, at most :data:`TOP`), int32.
        logs: Logarithms of these probabilities, float16.
        tails: Of the other classes, (tokens, 4), float32: log of the sum of their probabilities, mean of their log
            probabilities as they are weighed by them, log of their number, and plain mean of their log probabilities.
        classes: Number of classes in all.
    """

    ids: Tensor
    logs: Tensor
    tails: Tensor
    classes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.ids.nbytes + self.logs.nbytes + self.tails.nbytes

    def to(self, device: torch.device) -> Answers:
        """Return them on a device."""
        return Answers(self.ids.to(device), self.logs.to(device), self.tails.to(device), self.classes)


def joined(answers: Sequence[Answers]) -> Answers:
    """Return the answers of several rows with the same number of classes as those of one."""
    ids, logs, tails, classes = zip(*answers, strict=True)
    return Answers(torch.cat(ids), torch.cat(logs), torch.cat(tails), classes[0])


def summary(logits: Tensor) -> Answers:
    """Return what is kept of logits, (tokens, classes)."""
    classes = logits.shape[-1]
    width = min(TOP, classes)
    empty = logits.new_empty
    parts = [Answers(empty((0, width)).int(), empty((0, width)).half(), empty((0, 4)).float(), classes)]
    for chunk in _chunks(logits.shape[0], classes, logits.device):
        logs = torch.log_softmax(logits[chunk].float(), -1)
        top, ids = logs.topk(width, -1)
        mass = logs.exp().scatter_(-1, ids, 0)
        total = mass.sum(-1)
        finite = logs.isfinite().scatter_(-1, ids, False)
        logs.masked_fill_(~finite, 0)
        number = finite.sum(-1)
        slope = (mass * logs).sum(-1) / total.clamp(min=_TINY)
        mean = logs.sum(-1) / number.clamp(min=1)
        tails = torch.stack([total.log(), slope, number.log(), mean], -1)
        parts.append(Answers(ids.int(), top.half(), tails, classes))
    return joined(parts)


def _distribution(answers: Answers, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
    """Log probabilities at a temperature: of the classes that are kept, and of all others together.

    The logarithm of Σ exp(b · log probability) over the others is known at b = 1 and b = 0, with its slopes. In between
    it is the cubic through them, and beyond b = 1, where it counts little, its tangent.
    """
    end, slope, begin, mean = answers.tails[rows].unbind(-1)
    b = 1 / temperature
    if b == 1:
        tail = end
    elif b > 1:
        tail = end + (b - 1) * slope
    else:
        tail = (2 * b**3 - 3 * b**2 + 1) * begin + (b**3 - 2 * b**2 + b) * mean
        tail = tail + (3 * b**2 - 2 * b**3) * end + (b**3 - b**2) * slope
    tail = tail.masked_fill(end == -math.inf, -math.inf)
    both = torch.cat([answers.logs[rows].float() * b, tail[:, None]], -1).log_softmax(-1)
    return both[:, :-1], both[:, -1]


def kept_kl_sum(student: Tensor, answers: Answers, places: Tensor, temperature: float) -> Tensor:
    r"""Return :func:`kl_sum` of what is kept of a teacher, with all classes that are not kept taken for one.

    That is at most the divergence of the whole distributions. The student's probabilities of these classes keep their
    proportions.

    Args:
        student: Logits, (..., classes).
        answers: Of the tokens that count, one after another.
        places: The numbers of these tokens among all of ``student``, (tokens,).
        temperature: T, above 0.
    """
    result: Tensor = _KeptKlSum.apply(student.reshape(-1, student.shape[-1]), answers, places, temperature)
    return result


class _KeptKlSum(_Kept):
    @staticmethod
    def forward(ctx: Any, student: Tensor, answers: Answers, places: Tensor, temperature: float) -> Tensor:
        gradient = torch.zeros_like(student)
        classes = answers.classes
        wide = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=student.device)
        for rows in _chunks(len(places), classes, student.device):
            ids = answers.ids[rows].long()
            logs, tail = _distribution(answers, rows, temperature)
            q, rest = logs.exp(), tail.exp()
            ours = student[places[rows], :classes].to(wide) / temperature
            p = torch.softmax(ours, -1)
            kept = p.gather(-1, ids)
            own = ours.gather(-1, ids) - ours.logsumexp(-1, keepdim=True)
            p.scatter_(-1, ids, 0)
            left = p.sum(-1).clamp(min=_TINY)
            terms = ((logs - own) * q).masked_fill_(q == 0, 0).sum(-1)
            total += (terms + ((tail - left.log()) * rest).masked_fill_(rest == 0, 0)).sum()
            p.mul_(1 - (rest / left)[:, None]).scatter_(-1, ids, (kept - q).to(wide))
            if temperature != 1:
                p.mul_(temperature)
            gradient[places[rows], :classes] = p.to(gradient.dtype)
        ctx.gradient = gradient
        return total * temperature**2


def _chunks(rows: int, classes: int, device: torch.device) -> Iterator[slice]:
    size = max(1, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // classes)
    return (slice(begin, begin + size) for begin in range(0, rows, size))


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
