"""Quantising whole models in one go: which zeros and codes they have then, and what is left alone."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import hf_pdecay
from hf_pdecay import decayable_parameter_names, quantize_one_shot
from hf_pdecay.one_shot.blocks import targets_of
from hf_pdecay.storage.codes import find_codes

from ..helpers.models import build
from .test_model import _keep, rows_of


def sparse(name: str, zeros: float = 0.5) -> Any:
    model: Any = build(name)
    generator = torch.Generator().manual_seed(0)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for each in decayable_parameter_names(model):
            params[each][torch.rand(params[each].shape, generator=generator) < zeros] = 0
    return model


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "qwen3", "modernbert"])
def test_every_zero_is_kept_and_every_weight_has_a_code(name: str, seen: bool) -> None:
    model = sparse(name)
    before = copy.deepcopy(model)
    report = quantize_one_shot(model, rows_of() if seen else None, bits=4, block=16)
    names = [tensor for block in report.blocks for tensor in block.tensors]
    assert len(names) == len(set(names)) and set(names) | set(report.left) == set(decayable_parameter_names(model))
    params, old, targets = dict(model.named_parameters()), dict(before.named_parameters()), targets_of(model)
    for each, param in params.items():
        if each not in names:
            assert torch.equal(param, old[each])
            continue
        assert bool((param[old[each] == 0] == 0).all()) and not torch.equal(param, old[each])
        for matrix in targets[each].matrices:
            find_codes(matrix, 4, 16)
    assert report.zeros == sum(int((old[each] == 0).sum()) for each in names)
    assert report.zeros + report.new_zeros == sum(int((params[each] == 0).sum()) for each in names)
    assert all((block.output_error is not None) == (seen and ".0" in block.name) for block in report.blocks[:1])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_blocks_one_at_a_time_give_what_whole_passes_give(name: str) -> None:
    model: Any = sparse(name).double().eval()
    slow, rows = copy.deepcopy(model), rows_of()
    report = quantize_one_shot(model, rows, bits=3, block=16)
    for block in report.blocks:
        inputs: dict[str, torch.Tensor] = {}
        layers = {slow.get_submodule(each.removesuffix(".weight")): each for each in block.tensors}
        handles = [layer.register_forward_pre_hook(partial(_keep, layers, inputs)) for layer in layers]
        with torch.no_grad():
            slow(rows)
        for handle in handles:
            handle.remove()
        for layer, each in layers.items():
            weight, linear = layer.weight.detach(), isinstance(layer, nn.Linear)
            new = hf_pdecay.gptq(weight if linear else weight.T, inputs[each], bits=3, block=16)
            weight.copy_(new if linear else new.T)
    for (each, param), other in zip(model.named_parameters(), slow.parameters(), strict=True):
        assert torch.allclose(param, other, rtol=1e-6, atol=1e-8), each


def test_gptq_moves_outputs_less_than_rounding() -> None:
    dense, rows = sparse("llama").eval(), rows_of(24, 32)
    logits = []
    with torch.no_grad():
        for given in (None, rows):
            model = copy.deepcopy(dense)
            quantize_one_shot(model, given, bits=3, block=16)
            logits.append(float((model(rows).logits - dense(rows).logits).norm()))
    assert logits[1] < 0.95 * logits[0]


def test_what_no_row_reaches_is_rounded() -> None:
    model = sparse("mixtral")
    report = quantize_one_shot(model, rows_of(1, 4))  # 4 tokens, 2 of 4 experts each: some get none
    assert report.unseen and all("experts" in name for name in report.unseen)
    every = sum(target.param.shape[0] for name, target in targets_of(model).items() if "experts" in name)
    assert len(set(report.unseen)) == len(report.unseen) < every
    model = sparse("bert-classifier")
    report = quantize_one_shot(model, rows_of())
    assert "bert.pooler.dense.weight" in report.unseen
    assert str(report.bits) in str(report.to_dict()) and report.method == "gptq"


def test_encoder_decoders_and_models_without_blocks_are_rounded_without_rows() -> None:
    assert quantize_one_shot(sparse("t5")).method == "rtn"
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    names = [tensor for block in quantize_one_shot(model).blocks for tensor in block.tensors]
    assert names == ["0.weight", "2.weight"]


def test_bad_input() -> None:
    model = sparse("llama")
    with pytest.raises(ValueError, match=r"Invalid bits: bits=16"):
        quantize_one_shot(model, bits=16)
    with pytest.raises(ValueError, match=r"Invalid rows"):
        quantize_one_shot(model, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="encoder-decoder"):
        quantize_one_shot(sparse("t5"), rows_of())
    with pytest.raises(ValueError, match="nothing to do"):
        quantize_one_shot(nn.Embedding(4, 4))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN"):
        quantize_one_shot(model)
    model = build("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="quantized"):
        quantize_one_shot(model)
