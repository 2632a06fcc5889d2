"""Hooks with which a `Trainer` computes the measurements of this package.

Each function returns keyword arguments for a `Trainer`:

    args.batch_eval_metrics = True
    trainer = PDecayTrainer(model=model, args=args, ..., **causal_lm_hooks())

Logits are reduced batch by batch on the device that computed them; they are never held for a whole evaluation set.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from . import load_measurement


if TYPE_CHECKING:
    from transformers import EvalPrediction

__all__ = ["causal_lm_hooks", "classification_hooks", "reduce_causal_lm_logits"]


def reduce_causal_lm_logits(logits: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce logits to the inputs of the `token_metrics` measurement.

    Args:
        logits: Scores of shape (batch, positions, vocabulary), or a tuple that starts with them.
        labels: Token ids of shape (batch, positions), not shifted; positions with -100 are left out.

    Returns:
        The most probable next token and the negative log-likelihood (nats) of the true one, each of shape
        (batch, positions - 1).
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    scores, targets = scores[:, :-1], labels[:, 1:]
    nll = cross_entropy(scores.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=-100)
    return scores.argmax(dim=-1), nll.view(targets.shape)


def causal_lm_hooks() -> dict[str, Any]:
    """Return hooks for perplexity and token accuracy of a causal language model; needs `batch_eval_metrics`."""
    metric = load_measurement("token_metrics")

    def compute_metrics(evaluated: "EvalPrediction", compute_result: bool = True) -> dict[str, float]:
        predictions, nll = (torch.as_tensor(value).cpu().numpy() for value in evaluated.predictions)
        references = torch.as_tensor(evaluated.label_ids)[:, 1:].cpu().numpy()
        metric.add_batch(predictions=predictions, references=references, nll=nll)
        if not compute_result:
            return {}
        results = metric.compute()
        return {name: results[name] for name in ("perplexity", "token_accuracy")}  # the Trainer has its own loss

    return {"compute_metrics": compute_metrics, "preprocess_logits_for_metrics": reduce_causal_lm_logits}


def classification_hooks(num_labels: int) -> dict[str, Any]:
    """Return hooks for accuracy and F1 of a classifier with `num_labels` classes."""
    metric = load_measurement("classification")

    def compute_metrics(evaluated: "EvalPrediction") -> dict[str, float]:
        results: dict[str, float] = metric.compute(
            predictions=evaluated.predictions, references=evaluated.label_ids, num_labels=num_labels
        )
        return results

    def reduce_logits(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
        return scores.argmax(dim=-1)

    return {"compute_metrics": compute_metrics, "preprocess_logits_for_metrics": reduce_logits}
