"""TRL's fused head, which gives the loss of each token and no logits: what it returns, computed from logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .distillation_loss import entropies


FUSED = "fused_lm_head"
"""The argument by which TRL's trainers ask a model for it."""

_IGNORED = -100


def without_fused_head(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a model such that it returns logits and no loss."""
    return {key: value for key, value in inputs.items() if key not in (FUSED, "labels", "shift_labels")}


def with_fused_fields(outputs: Any, inputs: Mapping[str, Any]) -> Any:
    """Add to a model's outputs, from its logits, what the fused head returns for the inputs with labels."""
    logits, labels = outputs.logits, inputs.get("shift_labels")
    if labels is None:
        logits, labels = logits[:, :-1], inputs["labels"][:, 1:]
    mask = labels != _IGNORED
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2).float(), labels, ignore_index=_IGNORED, reduction="none"
    )
    outputs.log_probs = -losses
    outputs.entropy = entropies(logits).masked_fill(~mask, 0)
    outputs.is_top1 = (logits.argmax(-1) == labels) & mask
    outputs.label_mask = mask
    return outputs
