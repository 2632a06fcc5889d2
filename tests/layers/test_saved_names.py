"""One name for each tensor: the model's own, by which rules, preview, sparsity.json and report call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    ViTConfig,
    ViTForImageClassification,
)

from hf_pdecay import measure_sparsity, report_folder
from hf_pdecay.cli.main import main
from hf_pdecay.layers.matrices import decayable_parameter_names
from hf_pdecay.layers.saved_names import NamesInModel, names_in_files
from hf_pdecay.rules.assign import assign


pytest.importorskip("transformers.core_model_loading", reason="transformers 4 saves what there is")

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def vit() -> Any:
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4))


def mixtral() -> Any:
    config = MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=3, vocab_size=32)
    return AutoModelForCausalLM.from_config(config)


def llava() -> Any:
    text = SIZES | {"model_type": "llama", "vocab_size": 64, "num_key_value_heads": 2}
    vision = SIZES | {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=5))


MODELS = {"vit": vit, "mixtral": mixtral, "llava": llava}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = MODELS[request.param]()
    for param in made.parameters():
        nn.init.normal_(param)
    with torch.no_grad():
        for name in decayable_parameter_names(made):
            made.get_parameter(name).view(-1)[::3] = 0
    return made


def test_report_sparsity_json_preview_and_rules_have_the_names_of_the_model(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path)
    own = {name: tuple(param.shape) for name, param in model.named_parameters()}
    report = report_folder(tmp_path).sparsity
    counted = measure_sparsity(model, decayed=decayable_parameter_names(model))
    assert {tensor.name: tensor.shape for tensor in report.tensors} == own
    for one, other in zip(*(sorted(r.tensors, key=lambda t: t.name) for r in (report, counted)), strict=True):
        assert (one.name, one.parameters, one.zeros, one.decayed) == (
            other.name,
            other.parameters,
            other.zeros,
            other.decayed,
        )
        assert one.norm == pytest.approx(other.norm, rel=1e-5)
    assert main(["preview", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr().out
    assert {tensor["name"] for tensor in json.loads(printed[printed.index("{") :])["tensors"]} == set(own)


def test_rules_take_the_name_in_files_too(model: Any) -> None:
    saved = names_in_files(model)
    assert saved
    for name in decayable_parameter_names(model):
        for pattern in (name, *(saved.get(name, ()) if len(saved.get(name, ())) == 1 else ())):
            found = assign(model, p_norm=0.8, rules={pattern: {"p_norm": 0.5}})
            assert [taken for taken, how in found.items() if how.rule == pattern] == [name]


def test_names_in_files_come_back_as_those_of_the_model(model: Any, tmp_path: Path) -> None:
    own = NamesInModel(model)
    for name, aliases in names_in_files(model).items():
        assert {own(alias) for alias in aliases} == {name}
    assert own("of nobody") == "of nobody" and NamesInModel(None)("a.b") == "a.b"


def test_a_part_of_a_fused_parameter_is_no_match() -> None:
    model = mixtral()
    for pattern in (r"experts\.0\.w1", "w1", "block_sparse_moe.experts.0.w1.weight"):
        with pytest.raises(ValueError, match=r"both are parts of model\.layers\.\d\.mlp\.experts\.gate_up_proj, which"):
            assign(model, p_norm=0.8, rules={pattern: {"p_norm": 0.5}})
    found = assign(model, p_norm=0.8, rules={r"block_sparse_moe\.experts": {"p_norm": 0.5}})
    taken = [name for name, how in found.items() if how.p_norm == 0.5]
    assert len(taken) == 4 and all(".mlp.experts." in name for name in taken)


def test_a_large_model_on_the_meta_device_is_cut_on_the_meta_device() -> None:
    with torch.device("meta"):
        config = MixtralConfig(num_hidden_layers=1, num_local_experts=8)
        model = AutoModelForCausalLM.from_config(config)
    assert len(names_in_files(model)["model.layers.0.mlp.experts.gate_up_proj"]) == 16
