"""Pruning whole models in one go: exact counts, what stays dense, and that a run may go on with the zeros."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import hf_pdecay
from hf_pdecay import decayable_parameter_names, prune_one_shot

from ..helpers.models import build


def rows_of(count: int = 12, length: int = 16) -> torch.Tensor:
    return torch.randint(1, 64, (count, length), generator=torch.Generator().manual_seed(1))


def zeros_of(model: nn.Module, names: list[str]) -> int:
    params = dict(model.named_parameters())
    return sum(int((params[name] == 0).sum()) for name in names)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "qwen3", "modernbert"])
def test_exactly_as_many_zeros_as_asked(name: str, method: str) -> None:
    model: Any = build(name)
    before = copy.deepcopy(model)
    report = prune_one_shot(model, rows_of(), method=method, sparsity=0.37)
    pruned = [tensor for block in report.blocks for tensor in block.tensors]
    assert set(pruned) | set(report.dense) == set(decayable_parameter_names(model))
    params, old = dict(model.named_parameters()), dict(before.named_parameters())
    weights = sum(params[each].numel() for each in pruned)
    assert report.zeros == zeros_of(model, pruned) == round(0.37 * weights)
    assert not any(bool(((param == 0) & param.signbit()).any()) for param in params.values())
    assert all(torch.equal(param, old[each]) for each, param in params.items() if each not in pruned)
    assert all(param.isfinite().all() for param in params.values())
    assert hf_pdecay.measure_sparsity(model, decayed=pruned).sparsity == pytest.approx(report.sparsity)
