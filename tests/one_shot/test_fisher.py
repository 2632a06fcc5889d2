"""Pruning by what gradients say of outputs, against gradients by autograd and costs by sorting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_pdecay import prune_one_shot, sparsegpt
from hf_pdecay.one_shot.blocks import targets_of
from hf_pdecay.one_shot.budgets import divide, histogram
from hf_pdecay.one_shot.capture import Capture
from hf_pdecay.one_shot.fisher import output_information
from hf_pdecay.one_shot.sparsegpt import prune_by_hessian

from ..helpers.models import build
from .test_layers import correlated, matrix
from .test_model import rows_of, zeros_of


@pytest.mark.parametrize("name", ["llama", "bert", "qwen3"])
def test_information_is_that_of_gradients_by_autograd(name: str) -> None:
    model: Any = build(name).double().eval()
    rows = rows_of(4, 8)
    found = output_information(model, list(targets_of(model).values()), rows, {})
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for place, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(
                lambda layer, args, output, place=place: seen.update({place: (args[0].detach(), _kept(output))})
            )
    logits = model(rows).logits
    flat = logits.view(-1, logits.shape[-1])
    drawn = torch.multinomial(flat.detach().float().softmax(-1), 1, generator=torch.Generator().manual_seed(0)).view(-1)
    # In float32, as transformers' losses are.
    nn.functional.cross_entropy(flat.float(), drawn, reduction="sum").backward()
    assert len(found.outputs) > 6
    for (weight, number), importance in found.outputs.items():
        inputs, output = seen[weight.removesuffix(".weight")]
        assert number == 0 and output.grad is not None
        squares = output.grad.flatten(0, -2).square().mean(0)
        torch.testing.assert_close(importance, (squares / squares.mean()).clamp(min=1e-4), rtol=1e-4, atol=1e-6)
        param = model.get_parameter(weight).detach()
        count = inputs.flatten(0, -2).shape[0]
        moments = inputs.flatten(0, -2).square().mean(0)
        costs = count * param.square() * moments * squares.clamp(min=1e-4 * float(squares.mean()))[:, None]
        middle = float(costs.median())
        below = int((costs < middle).sum())
        bits = int(torch.tensor(middle, dtype=torch.float32).view(torch.int32)) >> 16
        counts = found.costs[weight, 0].cumsum(0)
        assert int(counts[bits - 1]) - 4 <= below <= int(counts[bits]) + 4


def _kept(output: torch.Tensor) -> torch.Tensor:
    output.retain_grad()
    return output


def test_the_model_keeps_no_gradients_and_its_frozen_parameters() -> None:
    model: Any = build("gpt2")
    model.transformer.wte.requires_grad_(False)
    asked = [param.requires_grad for param in model.parameters()]
    prune_one_shot(model, rows_of(), method="fisher", sparsity=0.5)
    assert [param.requires_grad for param in model.parameters()] == asked
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "qwen3"])
def test_the_whole_model_has_exactly_the_zeros(name: str) -> None:
    model: Any = build(name)
    report = prune_one_shot(model, rows_of(), method="fisher", sparsity=0.6)
    pruned = [tensor for block in report.blocks for tensor in block.tensors]
    assert report.zeros == zeros_of(model, pruned) == round(0.6 * report.weights)
    params = dict(model.named_parameters())
    shares = [float((params[each] == 0).float().mean()) for each in pruned]
    assert max(shares) - min(shares) > 0.01  # where a zero costs least
    assert max(shares) < 0.99


@pytest.mark.parametrize("form", [dict, tuple, "tensor"], ids=str)
def test_models_of_ones_own_may_give_what_they_like(form: Any) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 32)
            self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
            self.head = nn.Linear(32, 64)

        def forward(self, tokens: torch.Tensor) -> Any:
            hidden = self.embedding(tokens)
            for block in self.blocks:
                hidden = hidden + block(hidden).relu()
            logits = self.head(hidden)
            return {"logits": logits} if form is dict else (logits,) if form is tuple else logits

    report = prune_one_shot(Own(), rows_of(), method="fisher", sparsity=0.5)
    assert report.zeros == round(0.5 * report.weights) > 0


def test_zeros_stay_where_other_weights_cost_nothing() -> None:
    """One matrix has zeros, and the inputs of another are dead: its weights must not take their place."""
    model: Any = build("llama")
    first, second = (layer.mlp.down_proj.weight for layer in model.model.layers)
    with torch.no_grad():
        first.view(-1)[:1200] = 0
        model.model.layers[1].mlp.up_proj.weight.zero_()
    zeros = sum(int((param == 0).sum()) for param in (first, model.model.layers[1].mlp.up_proj.weight))
    total = prune_one_shot(build("llama"), rows_of(), sparsity=0.5).weights
    report = prune_one_shot(model, rows_of(), method="fisher", sparsity=(zeros + 8) / total)
    assert report.zeros == zeros + 8
    assert int((first == 0).sum()) >= 1200 and int((second == 0).sum()) <= 8


def test_outputs_that_nothing_reads_go_first() -> None:
    model: Any = build("llama")
    with torch.no_grad():  # half of the neurons of a block reach nothing
        model.model.layers[0].mlp.down_proj.weight[:, ::2] = 1e-12
    prune_one_shot(model, rows_of(), method="fisher", sparsity=0.5)
    zero = (model.model.layers[0].mlp.up_proj.weight == 0).float().mean(1)
    assert float(zero[::2].mean()) > 0.97 > 0.5 > float(zero[1::2].mean())


def test_what_the_model_says_changes_less() -> None:
    """The predictions of a model that has learned a language, a chain of tokens, move less than by SparseGPT."""
    torch.manual_seed(0)
    model: Any = build("llama")
    chain = torch.randint(1, 64, (64, 3), generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    rows = torch.zeros(96, 16, dtype=torch.int64)
    rows[:, 0] = torch.randint(1, 64, (96,), generator=generator)
    for place in range(1, 16):
        rows[:, place] = chain[rows[:, place - 1], torch.randint(0, 3, (96,), generator=generator)]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = model(rows).logits.log_softmax(-1).detach()
    moved = {}
    for method in ("fisher", "sparsegpt", "wanda"):
        model.load_state_dict(state)
        prune_one_shot(model, rows, method=method, sparsity=0.7)
        pruned = model(rows).logits.log_softmax(-1).detach()
        moved[method] = float((dense.exp() * (dense - pruned)).sum(-1).mean())
    assert moved["fisher"] < 0.9 * moved["sparsegpt"] < moved["wanda"]


def test_the_importance_of_outputs_is_a_scale_of_rows() -> None:
    weight, rows = matrix(12, 200), correlated(400, 200)
    importance = torch.logspace(-2, 2, 12, dtype=torch.float64)
    scale = importance.sqrt()[:, None]
    wanted = sparsegpt(weight * scale, rows, sparsity=0.5) / scale
    got = prune_by_hessian(weight, rows.T @ rows, 1200, importance)
    assert torch.equal(got == 0, wanted == 0)
    torch.testing.assert_close(got, wanted)


def test_hessians_are_summed_in_float32_under_autocast() -> None:
    model: Any = build("llama").eval()
    targets = targets_of(model)
    plain, mixed = (Capture(targets.values(), hessian=True) for _ in range(2))
    with torch.no_grad(), plain:
        model(rows_of())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), mixed:
        model(rows_of())
    for key, hessian in mixed.sums.items():
        assert hessian.dtype == torch.float32
        assert float((hessian - plain.sums[key]).norm() / plain.sums[key].norm()) < 0.02


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=6),
    share=st.floats(0.0, 0.97),
    seed=st.integers(0, 1000),
)
def test_zeros_go_where_they_cost_least(sizes: list[int], share: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    costs = [np.exp(3 * generator.standard_normal(size) + 4 * generator.standard_normal()) for size in sizes]
    total = round(share * sum(sizes))
    parts = divide(total, [histogram(torch.from_numpy(cost)) for cost in costs])
    assert sum(parts) == total
    limits = [int(np.ceil(max(0.98, total / sum(sizes)) * size)) for size in sizes]
    assert all(0 <= part <= limit for part, limit in zip(parts, limits, strict=True))
    if all(part < limit for part, limit in zip(parts, limits, strict=True)) and total:
        threshold = np.sort(np.concatenate(costs))[total - 1]
        for part, cost in zip(parts, costs, strict=True):
            assert (cost < threshold * 0.99).sum() <= part <= (cost <= threshold * 1.01).sum()


def test_matrices_that_are_zero_already_keep_their_zeros() -> None:
    costs = [torch.zeros(100), torch.arange(1.0, 101.0)]
    assert divide(120, [histogram(cost) for cost in costs]) == [100, 20]


def test_a_model_without_gradients_and_gradients_without_bounds_are_refused() -> None:
    frozen: Any = build("llama")
    forward = frozen.forward
    frozen.forward = torch.no_grad()(forward)
    with pytest.raises(ValueError, match="LlamaForCausalLM, which computes no gradients; take sparsegpt"):
        prune_one_shot(frozen, rows_of(), method="fisher", sparsity=0.5)
    steep: Any = build("llama")
    steep.lm_head.register_full_backward_hook(lambda layer, inward, outward: (inward[0] * torch.inf,))
    with pytest.raises(ValueError, match=r"The gradients of the outputs of model.layers.* are NaN or infinite"):
        prune_one_shot(steep, rows_of(), method="fisher", sparsity=0.5)
