"""The loss of a teacher, from the formulas, in float64 and by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def kl64(student: Tensor, teacher: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """T² times the sum over the rows that count of Σ q log(q / p), q and p from softmax(logits / T)."""
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs, counted in zip(student.double(), teacher.double(), counts, strict=True):
        if counted:
            p, q = torch.softmax(ours / temperature, -1), torch.softmax(theirs / temperature, -1)
            total = total + temperature**2 * (q * (q / p).log()).sum()
    return total


def error64(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Σ weight |s - t|² / |t|² over tokens."""
    ours, theirs = student.double(), teacher.double()
    return (weights.double() * ((ours - theirs) ** 2).sum(-1) / (theirs**2).sum(-1)).sum()


def kept_kl64(student: Tensor, teacher: Tensor, temperature: float, top: int) -> Tensor:
    """The same for all tokens, with the classes beyond the ``top`` likeliest of the teacher taken for one."""
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(student.double(), teacher.double(), strict=True):
        p, q = torch.softmax(ours / temperature, 0), torch.softmax(theirs / temperature, 0)
        order = theirs.argsort(descending=True)
        pairs = [(p[place], q[place]) for place in order[:top]]
        if len(order) > top:
            pairs.append((p[order[top:]].sum(), q[order[top:]].sum()))
        for own, other in pairs:
            if other > 0:
                total = total + other * (other.log() - own.log())
    return total * temperature**2
