"""The two hooks through which a `Trainer` computes the measurements of this package.

Each function returns keyword arguments for `Trainer` and its subclasses:

    args.batch_eval_metrics = True
    trainer = PDecayTrainer(model=model, args=args, ..., **causal_lm_hooks())

Logits are reduced on the device that computed them, batch by batch: those of a whole evaluation set are never held.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from . import load_measurement


if TYPE_CHECKING:
    from transformers import EvalPrediction

__all__ = ["causal_lm_hooks", "classification_hooks", "reduce_causal_lm_logits"]


def reduce_causal_lm_logits(logits: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce logits to what the `token_metrics` measurement needs.

    Args:
        logits: Scores of shape (batch, positions, vocabulary), or a tuple that starts with them.
        labels: Token ids of shape (batch, positions), not shifted; -100 marks positions to leave out.

    Returns:
        The most probable next token and the negative log-likelihood (nats) of the true one, each of shape
        (batch, positions - 1).
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    scores, targets = scores[:, :-1], labels[:, 1:]
    nll = cross_entropy(scores.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=-100)
    return scores.argmax(dim=-1), nll.view(targets.shape)


def causal_lm_hooks() -> dict[str, Any]:
    """Perplexity and token accuracy of a causal language model, for a `Trainer` with `batch_eval_metrics`."""
    metric = load_measurement("token_metrics")

    def compute_metrics(evaluated: "EvalPrediction", compute_result: bool = True) -> dict[str, float]:
        predictions, nll = (torch.as_tensor(part).cpu().numpy() for part in evaluated.predictions)
        references = torch.as_tensor(evaluated.label_ids)[:, 1:].cpu().numpy()
        metric.add_batch(predictions=predictions, references=references, nll=nll)
        if not compute_result:
            return {}
        results = metric.compute()
        return {name: results[name] for name in ("perplexity", "token_accuracy")}  # Trainer has a loss of its own

    return {"compute_metrics": compute_metrics, "preprocess_logits_for_metrics": reduce_causal_lm_logits}


def classification_hooks(num_labels: int) -> dict[str, Any]:
    """Accuracy and F1 of a classifier of `num_labels` classes, for a `Trainer`."""
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
