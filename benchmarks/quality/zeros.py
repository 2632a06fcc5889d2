"""Zeros and weights of the models of the quality benchmark, counted without hf_pdecay's own counter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_pdecay import decayable_parameter_names

from .methods import matrices


EDGES = [-8 + 0.25 * number for number in range(37)]


def fraction(model: nn.Module) -> float:
    """Return the fraction of exact zeros in the pruned weights."""
    weights = matrices(model) or [param for name, param in model.named_parameters() if ".parametrizations." in name]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def dead(model: nn.Module) -> list[str]:
    """Return the names of the pruned weights that are wholly zero: what they multiply is lost."""
    chosen = set(decayable_parameter_names(model))
    return [name for name, param in model.named_parameters() if name in chosen and not param.any()]


def spread(model: nn.Module) -> dict[str, Any]:
    """Return the distribution of the pruned weights and of the zeros.

    Returns:
        ``weights``: the number of zeros, and the number of other weights in each quarter of a decade of magnitude;
        ``layers``: the fractions of zero weights, of wholly zero rows and of wholly zero columns of each matrix.
    """
    chosen = set(decayable_parameter_names(model))
    params = {name: param.detach() for name, param in model.named_parameters() if name in chosen}
    magnitudes = torch.cat([param.abs().reshape(-1) for param in params.values()])
    logs = magnitudes[magnitudes > 0].log10().clamp(EDGES[0], EDGES[-1])
    counts = torch.histogram(logs, torch.tensor(EDGES)).hist.long().tolist()
    layers = {}
    for name, param in params.items():
        zero = (param == 0).flatten(1)
        zeros = {"sparsity": zero, "rows": zero.all(1), "columns": zero.all(0)}
        layers[name] = {key: round(float(flags.float().mean()), 5) for key, flags in zeros.items()}
    return {"weights": {"zeros": int((magnitudes == 0).sum()), "edges": EDGES, "counts": counts}, "layers": layers}
