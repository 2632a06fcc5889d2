"""How much the outputs of a matrix matter for what the model predicts: their Fisher information."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..terminal import progress
from .blocks import Target
from .budgets import histogram
from .capture import GradientCapture, Key
from .selection import float_of
from .streaming import first_hidden


# An output matters at least this much, by the mean of its matrix: magnitudes rank what has no gradient.
_LEAST = 1e-4
_TOKENS = 512  # of a batch: their activations are kept for the backward pass
_MOST_TOKENS = 8192  # that gradients are taken for: a mean of squares for each output needs no more


@dataclass(frozen=True)
class Information:
    """What gradients say about matrices.

    Args:
        outputs: How much each output's squared error matters, relative to the mean of its matrix, of shape (outputs,).
        costs: What each weight costs, w² E[x²] E[g²] N, with its inputs x, the gradients g of its outputs, and the
            number N of rows that reached it, as a :func:`.budgets.histogram`.
    """

    outputs: Mapping[Key, Tensor]
    costs: Mapping[Key, Tensor]


def output_information(
    model: nn.Module, targets: Sequence[Target], rows: Tensor, options: Mapping[str, Any], seed: int = 0
) -> Information:
    """Return how far the model's predictions move, to second order, when outputs of matrices do.

    The gradient g is that of the log-likelihood of tokens that are drawn from the model's own prediction at each place,
    so the mean of g² is the diagonal Fisher information of the outputs, and needs no labels. With a mean of x² for the
    inputs it is the diagonal of a Kronecker-factored curvature (https://huggingface.co/papers/1503.05671), which
    https://huggingface.co/papers/2312.17244 prunes language models by. A model without logits predicts its first output
    with a variance of 1.

    Args:
        model: A model in evaluation mode.
        targets: The parameters of interest.
        rows: Token ids of shape (rows, tokens), on the model's device; the first 512 tokens of some are used, about
            8,192 in all.
        options: Other arguments of the model.
        seed: For what is drawn.

    Returns:
        The information of each matrix that the rows reach.

    Raises:
        ValueError: If a gradient is NaN or infinite, or the model has none.
    """
    generator = torch.Generator(rows.device).manual_seed(seed)
    capture = GradientCapture(targets)
    some = rows[:, :_TOKENS]
    some = some[:: max(some.numel() // _MOST_TOKENS, 1)]
    batches = some.split(max(_TOKENS // some.shape[1], 1))
    with torch.enable_grad(), _without_gradients(model):
        for batch in progress(batches, "Gradients", len(batches), unit="batches"):
            with capture:
                output = model(batch, **options)
            surprise = _surprise(output, generator)
            if not surprise.requires_grad:
                raise ValueError(
                    f"Invalid method: method='fisher' with {type(model).__name__}, which computes no gradients; take "
                    "sparsegpt."
                )
            surprise.backward()
    matrices = {(target.name, number): matrix for target in targets for number, matrix in enumerate(target.matrices)}
    outputs, costs = {}, {}
    for key, summed in capture.sums.items():
        if not bool(summed.isfinite().all()):
            raise ValueError(
                f"The gradients of the outputs of {key[0]} are NaN or infinite; if the model is in float16, load it in "
                "float32 or bfloat16 (--dtype)."
            )
        mean = summed.mean()
        outputs[key] = (summed / mean).clamp_(min=_LEAST) if mean > 0 else torch.ones_like(summed)
        gradients = summed.clamp(min=_LEAST * float(mean))[:, None] / max(capture.counts[key], 1)
        weight = float_of(matrices[key])
        cost = (weight.square() * gradients * capture.inputs[key]).clamp_(min=torch.finfo(torch.float32).tiny)
        costs[key] = histogram(cost.masked_fill_(weight == 0, 0))  # zeros go before what costs too little to tell
    return Information(outputs, costs)


def _surprise(output: Any, generator: torch.Generator) -> Tensor:
    """Minus the log-likelihood of what is drawn from a model's prediction, summed over all places."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is None:
        hidden = first_hidden(output)
        if hidden is None:
            raise ValueError(
                f"Invalid method: method='fisher', and the model gives {type(output).__name__}; take wanda."
            )
        noise = torch.randn(hidden.shape, generator=generator, device=hidden.device, dtype=hidden.dtype)
        return (hidden * noise).sum()
    flat = logits.reshape(-1, logits.shape[-1])
    chances = flat.detach().float().softmax(-1)
    drawn = torch.multinomial(chances, 1, generator=generator).view(-1)
    return nn.functional.cross_entropy(flat.float(), drawn, reduction="sum")


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Have no parameter collect gradients for a while."""
    trained = [param for param in model.parameters() if param.requires_grad]
    try:
        for param in trained:
            param.requires_grad_(False)
        yield
    finally:
        for param in trained:
            param.requires_grad_(True)
