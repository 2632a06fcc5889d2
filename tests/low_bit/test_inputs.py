from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_pdecay import round_activations
from hf_pdecay.low_bit.grid import WIDTHS, grid_of
from hf_pdecay.low_bit.inputs import exact_inputs, rounded_inputs, stated_widths
from hf_pdecay.rules.spec import parse_rules
from hf_pdecay.rules.widths import input_widths

from ..helpers.models import build
from .test_transform import _by_blocks


def _inputs() -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def _rounded(name: str, width: float = 4) -> Any:
    model = build(name).eval()
    return round_activations(model, input_widths(model, width, []))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("layer", "shape", "features"),
    [
        (nn.Linear(300, 5), (2, 3, 300), -1),
        (nn.Linear(40, 5), (40,), -1),
        (Conv1D(5, 200), (2, 3, 200), -1),
        (nn.Conv2d(130, 6, 3), (2, 130, 4, 5), -3),
        (nn.Conv1d(8, 6, 3, groups=2), (8, 9), -2),
        (nn.ConvTranspose1d(8, 6, 3), (2, 8, 9), -2),
    ],
)
def test_value_and_gradient_are_those_of_the_formula(
    layer: nn.Module, shape: tuple[int, ...], features: int, width: float
) -> None:
    layer = copy.deepcopy(layer).double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    rows = theirs.movedim(features, -1)
    expected = _by_blocks(rows.reshape(-1, rows.shape[-1]), grid_of(width)).view(rows.shape).movedim(-1, features)
    reference = layer(expected)
    model = round_activations(nn.Sequential(layer), {"0": width})
    output = model(ours)
    assert torch.allclose(output, reference, rtol=1e-10, atol=1e-10)
    for each in (output, reference):
        each.square().sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8)
    name = "input" if isinstance(layer, (nn.Linear, nn.Conv2d)) else None
    assert name is None or torch.equal(layer(**{name: x}), output)


@settings(deadline=None, max_examples=40)
@given(
    width=st.sampled_from(WIDTHS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_tokens_of_zeros_and_the_largest_numbers(width: float, dtype: torch.dtype, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 200, generator=generator)
    x[torch.rand(6, 200, generator=generator) < share] *= 1e9
    limit = torch.finfo(dtype).max if dtype == torch.float16 else 1e18  # its square is no float32
    x = x.clamp(-limit, limit).to(dtype)
    x[0], x[1] = 0, limit
    x.requires_grad_()
    layer = round_activations(nn.Sequential(nn.Identity(), nn.Linear(200, 4)), {"1": width})[1]
    ((rounded,), _) = next(iter(layer._forward_pre_hooks.values()))(layer, (x,), {})
    assert rounded.dtype == dtype and rounded.isfinite().all() and not rounded[0].any()
    rounded.float().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and torch.equal(x.grad[0], torch.ones(200, dtype=dtype))


def test_no_token_at_all() -> None:
    model = round_activations(nn.Sequential(nn.Linear(200, 4)), {"0": 8})
    x = torch.zeros(0, 200, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 200)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "bert", "modernbert", "t5"])
def test_the_config_says_what_is_rounded(name: str, tmp_path: Path) -> None:
    model = _rounded(name)
    widths = rounded_inputs(model)
    assert widths and set(widths.values()) == {4} and widths == stated_widths(getattr(model.config, "hf_pdecay", None))
    with torch.no_grad():
        loss = model(**_inputs()).loss
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert loaded(**_inputs()).loss != loss and not rounded_inputs(loaded)
        assert round_activations(loaded)(**_inputs()).loss == loss
        with exact_inputs(model):
            assert model(**_inputs()).loss != loss and not stated_widths(getattr(model.config, "hf_pdecay", None))
        assert model(**_inputs()).loss == loss and stated_widths(getattr(model.config, "hf_pdecay", None)) == widths


def test_the_model_without_its_head_and_with_it(tmp_path: Path) -> None:
    model = _rounded("llama")
    model.save_pretrained(tmp_path / "whole")
    base = round_activations(AutoModel.from_pretrained(tmp_path / "whole"))
    assert len(rounded_inputs(base)) == len(rounded_inputs(model)) == 14
    ids = _inputs()["input_ids"]
    with torch.no_grad():
        assert torch.equal(base(ids)[0], model.model(ids)[0])
    base.save_pretrained(tmp_path / "base")
    whole = round_activations(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert rounded_inputs(whole) == rounded_inputs(model)


def test_an_empty_mapping_ends_it(tmp_path: Path) -> None:
    model = round_activations(_rounded("llama"), {})
    assert not rounded_inputs(model) and not hasattr(model.config, "hf_pdecay")
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in model.modules())
    with torch.no_grad():
        assert model(**_inputs()).loss == build("llama").eval()(**_inputs()).loss
    with pytest.raises(ValueError, match="config of the model states no activation_bits"):
        round_activations(model)


def test_a_second_call_replaces_the_first() -> None:
    model = _rounded("llama")
    round_activations(model, {"model.layers.0.mlp.down_proj": 8})
    assert rounded_inputs(model) == {"model.layers.0.mlp.down_proj": 8}
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 1


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"model.layers.7.mlp.down_proj": 8}, r"model.layers.7.mlp.down_proj is no layer of the model"),
        ({"model.norm": 8}, r"model.norm is neither a linear layer nor a convolution"),
        ({"lm_head": 3}, r"activation_bits=3; it must be one of 8, 4, 2, 1.58, 1"),
    ],
)
def test_bad_values_change_nothing(bits: dict[str, float], message: str) -> None:
    model = _rounded("llama")
    before = rounded_inputs(model)
    with pytest.raises(ValueError, match=message):
        round_activations(model, bits)
    assert rounded_inputs(model) == before == stated_widths(getattr(model.config, "hf_pdecay", None))


def test_copies_round_too() -> None:
    model = _rounded("llama")
    with torch.no_grad():
        loss = model(**_inputs()).loss
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other(**_inputs()).loss == loss and rounded_inputs(other) == rounded_inputs(model)


def test_which_inputs_by_default_and_by_rules() -> None:
    model = build("llama")
    default = input_widths(model, 8, [])
    assert set(default) == {name for name, module in model.named_modules() if name.endswith("proj")}
    rules = parse_rules({"mlp": {"activation_bits": 4}, "q_proj": {"activation_bits": None, "weight_bits": 2}})
    widths = input_widths(model, 8, rules)
    assert {name for name, bits in widths.items() if bits == 4} == {name for name in default if "mlp" in name}
    assert not any("q_proj" in name for name in widths)
    assert set(input_widths(model, None, rules).values()) == {4}
    assert "lm_head" in input_widths(model, 8, parse_rules({"lm_head": {"activation_bits": 8}}))
    for pattern in ("embed_tokens", "norm"):
        with pytest.raises(ValueError, match=rf"'{pattern}' has activation_bits=8, and .* is not the weight of a lin"):
            input_widths(model, 8, parse_rules({pattern: {"activation_bits": 8}}))
    # The head of a tied embedding has inputs.
    tied = input_widths(build("qwen3"), None, parse_rules({"embed": {"activation_bits": 8}}))
    assert tied == {"lm_head": 8}


def test_inputs_that_no_hook_sees() -> None:
    attention = nn.Sequential(nn.MultiheadAttention(16, 2), nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"what 0.in_proj_weight multiplies is made inside of its module"):
        input_widths(attention, 8, [])
    assert input_widths(attention, 8, parse_rules({r"0\.": {"activation_bits": None}})) == {"1": 8}
    with pytest.raises(ValueError, match="no layer can round its inputs"):
        input_widths(nn.Sequential(nn.LayerNorm(4)), 8, [])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpoints(use_reentrant: bool) -> None:
    model = _rounded("llama").train()
    model(**_inputs()).loss.backward()
    gradients = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**_inputs()).loss.backward()
    for grad, param in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(grad, param.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_graph(dynamic: bool) -> None:
    model = nn.Sequential(nn.Linear(200, 64), nn.GELU(), nn.Linear(64, 64))
    round_activations(model, {"0": 8, "2": 4})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (3, 5):
        x = torch.randn(2, rows, 200)
        gradients = []
        for each in (model, compiled):
            model.zero_grad()
            output = each(x)
            output.square().sum().backward()
            gradients.append([output.detach(), *(param.grad for param in model.parameters())])
        for plain, other in zip(*gradients, strict=True):
            assert torch.allclose(plain, other, rtol=1e-4, atol=1e-4)
    assert rounded_inputs(compiled) == {"0": 8, "2": 4}
    assert not rounded_inputs(round_activations(compiled, {}))


def test_under_autocast() -> None:
    model = round_activations(nn.Sequential(nn.Linear(256, 8)), {"0": 8})
    x = torch.randn(64, 256, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32 and x.grad.isfinite().all()
