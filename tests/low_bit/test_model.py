from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_pdecay.low_bit.grid import grid_of
from hf_pdecay.low_bit.layers import roundable
from hf_pdecay.low_bit.model import RoundedModel
from hf_pdecay.low_bit.transform import Layout, round_blocks
from hf_pdecay.rules.spec import parse_rules
from hf_pdecay.rules.widths import widths_by_name

from ..helpers.models import build


TEXT = ("gpt2", "llama", "qwen3", "gemma", "bert", "modernbert", "mixtral")


def _inputs(name: str) -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def _grids(model: nn.Module, **options: Any) -> dict[str, Any]:
    return {name: grid_of(width) for name, width in widths_by_name(model, 4, [], **options).items()}


@pytest.mark.parametrize("name", TEXT)
def test_loss_and_gradient_are_those_of_the_rounded_weights(name: str) -> None:
    model = build(name).eval()
    reference, inputs = copy.deepcopy(model), _inputs(name)
    rounded = RoundedModel(model, _grids(model))
    names, modules = list(dict(model.named_parameters())), list(map(type, model.modules()))
    model(**inputs).loss.backward()

    params, able, grid = dict(reference.named_parameters()), roundable(reference), grid_of(4)
    weights = {each: round_blocks(params[each], able[each].layout, grid) for each in rounded.parameters()}
    torch.func.functional_call(reference, weights, kwargs=inputs).loss.backward()
    for each, param in model.named_parameters():
        other = params[each].grad
        assert (param.grad is None) == (other is None)
        assert param.grad is None or torch.allclose(param.grad, other, rtol=1e-4, atol=1e-6), each
    assert rounded.find_bypassed() is None
    assert list(dict(model.named_parameters())) == names and list(map(type, model.modules())) == modules

    with torch.no_grad():
        by_hooks = model(**inputs).loss
        latent = {each: param.clone() for each, param in rounded.parameters().items()}
        with rounded.rounded():
            in_parameters = model(**inputs).loss
            held = {each: param.clone() for each, param in rounded.parameters().items()}
        assert all(torch.equal(latent[each], param) for each, param in rounded.parameters().items())
        rounded.end()
        at_the_end = model(**inputs).loss
    assert by_hooks == in_parameters == at_the_end
    assert all(torch.equal(held[each], param) for each, param in rounded.parameters().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_rounded_by_default_and_by_rules() -> None:
    model = build("llama")
    default = widths_by_name(model, 4, [])
    assert set(default) == {name for name, param in model.named_parameters() if "proj" in name}
    rules = parse_rules({"mlp": {"weight_bits": 2}, "q_proj": {"weight_bits": None}, "embed": {"weight_bits": 8}})
    widths = widths_by_name(model, None, rules)
    assert set(widths.values()) == {2, 8} and widths["model.embed_tokens.weight"] == 8
    assert {name for name, width in widths.items() if width == 2} == {name for name in default if "mlp" in name}
    assert not any("q_proj" in name for name in widths_by_name(model, 4, rules))
    with pytest.raises(ValueError, match=r"'norm' has weight_bits=4, and .*norm.weight is no matrix of floats"):
        widths_by_name(model, 4, parse_rules({"norm": {"weight_bits": 4}}))
    with pytest.raises(ValueError, match=r"pattern 'mlq' matches no trainable parameter"):
        widths_by_name(model, 4, parse_rules({"mlq": {"weight_bits": 4}}))
    # A pattern of everything does not take embeddings, which decay by no default.
    assert set(widths_by_name(model, None, parse_rules({".": {"weight_bits": 4}}))) == set(default)


def test_what_cannot_be_rounded() -> None:
    with pytest.raises(ValueError, match="no weight can be rounded"):
        widths_by_name(nn.Sequential(nn.LayerNorm(4)), 4, [])
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised already"):
        widths_by_name(model, 4, [])
    pruned = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.utils.prune.l1_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"0.weight is under torch.nn.utils.prune"):
        widths_by_name(pruned, 4, [])


def test_a_tied_embedding_that_is_named() -> None:
    model = build("qwen3").eval()
    widths = widths_by_name(model, None, parse_rules({"embed": {"weight_bits": 2}}))
    assert list(widths) == ["model.embed_tokens.weight"]
    assert len(roundable(model)["model.embed_tokens.weight"].uses) == 2
    rounded = RoundedModel(model, {name: grid_of(width, sparse=True) for name, width in widths.items()})
    inputs = _inputs("qwen3")
    loss = model(**inputs).loss
    rounded.end()
    assert loss == model(**inputs).loss
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(len(row.unique()) <= 5 for row in model.lm_head.weight)


@pytest.mark.parametrize(
    ("module", "shape", "layout"),
    [
        (nn.Linear(200, 3), (2, 200), Layout(3, 200, 1)),
        (Conv1D(3, 200), (2, 200), Layout(1, 200, 3)),
        (nn.Conv2d(4, 6, 3), (2, 4, 8, 8), Layout(6, 36, 1)),
        (nn.ConvTranspose1d(4, 6, 3), (2, 4, 8), Layout(1, 4, 18)),
    ],
)
def test_layouts(module: nn.Module, shape: tuple[int, ...], layout: Layout) -> None:
    model = nn.Sequential(module)
    assert roundable(model)["0.weight"].layout == layout
    rounded = RoundedModel(model, {"0.weight": grid_of(1.58)})
    x = torch.randn(*shape)
    output = model(x)
    rounded.end()
    assert torch.equal(output, model(x))
    assert (module.weight == 0).any() and module.weight.view(layout)[:, :, 0].unique().numel() > 1


def test_attention_of_torch() -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    model = nn.Sequential(attention)
    names = ["0.in_proj_weight", "0.out_proj.weight"]
    rounded = RoundedModel(model, dict.fromkeys(names, grid_of(2)))
    x = torch.randn(2, 5, 16)
    output, _ = attention(x, x, x)
    output.sum().backward()
    assert rounded.find_bypassed() is None
    assert all(param.grad.any() for param in rounded.parameters().values())
    rounded.end()
    assert torch.equal(output, attention(x, x, x)[0])


class _Bypassing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight.T


def test_a_weight_that_is_used_without_its_layer_is_found() -> None:
    model = _Bypassing()
    rounded = RoundedModel(model, {"inner.weight": grid_of(4)})
    assert rounded.find_bypassed() is None  # no gradient yet
    model(torch.randn(2, 8)).sum().backward()
    assert rounded.find_bypassed() == "inner.weight"


def test_an_error_in_a_forward_pass_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    rounded = RoundedModel(model, {"0.weight": grid_of(4)})
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 9))
    assert model[0].weight is rounded.parameters()["0.weight"]
    before = model[0].weight.clone()
    with pytest.raises(RuntimeError, match="stop"), rounded.rounded():
        assert not torch.equal(before, model[0].weight)
        raise RuntimeError("stop")
    assert torch.equal(before, model[0].weight)
    x = torch.randn(2, 8)
    assert torch.equal(model(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpoints(use_reentrant: bool) -> None:
    model = build("llama").train()
    RoundedModel(model, _grids(model))
    inputs = _inputs("llama")
    model(**inputs).loss.backward()
    gradients = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**inputs).loss.backward()
    # transformers 4 computes in another order with checkpoints, also without rounding.
    bound = 0.0 if int(tf.__version__.partition(".")[0]) >= 5 else 1e-5
    for grad, param in zip(gradients, model.parameters(), strict=True):
        assert float((grad - param.grad).abs().max()) <= bound * float(grad.abs().max())


def test_compiled_as_one_graph() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    RoundedModel(model, {"0.weight": grid_of(4), "2.weight": grid_of(1)})
    x = torch.randn(2, 64)
    plain = model(x)
    plain.sum().backward()
    gradients = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outputs = compiled(x)
    assert torch.allclose(plain, outputs, atol=1e-6)
    outputs.sum().backward()
    for grad, param in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(grad, param.grad, atol=1e-5)


def test_before_a_run_has_its_zeros_small_weights_are_rounded_to_0() -> None:
    model = nn.Sequential(nn.Linear(128, 1, bias=False))
    weight = torch.linspace(-0.3, 0.3, 128).view(1, 128)
    weight[0, 7], weight[0, 9] = 4.0, 0.0
    with torch.no_grad():
        model[0].weight.copy_(weight)
    small = (weight.abs() < 4 / 7 / 2) & (weight != 0)
    rounded = RoundedModel(model, {"0.weight": grid_of(4, sparse=True, exact=True)})
    x = torch.eye(128)
    assert int((model(x) == 0).sum()) == 1  # the weight of 0 alone
    rounded.exact = False
    assert torch.equal(model(x).view(-1) == 0, (small | (weight == 0)).view(-1))
    ((param, marks),) = rounded.vanishing()
    assert param is model[0].weight and torch.equal(marks, small) and not rounded.exact
    rounded.exact = True
    assert torch.equal(next(rounded.vanishing())[1], small) and rounded.exact
    loose = RoundedModel(nn.Sequential(nn.Linear(128, 1)), {"0.weight": grid_of(4, sparse=True)})
    assert not list(loose.vanishing())
