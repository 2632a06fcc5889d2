from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments, SparsityReport, round_activations
from hf_pdecay.low_bit.inputs import rounded_inputs, stated_widths

from ..helpers.models import build, tiny_gpt2
from .test_few_bits import DENSE, _Bypassing, _Kill, _levels, _loss_of, _trainer
from .test_few_bits import data as data


BOTH = {"weight_bits": 4, "activation_bits": 8, "target_sparsity": 0.6}
INPUTS = {"activation_bits": 4, **DENSE}


def _rounded_loss_of(folder: Path, data: Any) -> float:
    """The loss of what ``from_pretrained`` loads and ``round_activations`` completes."""
    model = round_activations(AutoModelForCausalLM.from_pretrained(folder))
    args = PDecayTrainingArguments(str(folder / "e"), use_cpu=True, report_to="none", disable_tqdm=True, optim="sgd")
    return float(PDecayTrainer(model=model, args=args, eval_dataset=data).evaluate()["eval_loss"])


@pytest.mark.parametrize("options", [BOTH, INPUTS])
def test_the_loss_that_was_printed_after_loading(
    options: dict[str, Any], data: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _trainer(tmp_path, data, eval_strategy="steps", eval_steps=8, **options)
    trainer.train()
    trainer.save_model()
    printed = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.evaluate()["eval_loss"] == printed[-1] == _rounded_loss_of(tmp_path, data)
    assert _rounded_loss_of(tmp_path / "checkpoint-16", data) == printed[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not rounded_inputs(model) and len(stated_widths(getattr(model.config, "hf_pdecay", None))) == 8
    # Our own Trainer rounds what the config states, and says so.
    assert "round their inputs" not in caplog.text
    assert _loss_of(tmp_path, data) == printed[-1]
    assert "8 layers round their inputs here too" in caplog.text

    saved = load_file(tmp_path / "model.safetensors")
    assert _levels(saved["transformer.h.0.mlp.c_fc.weight"]) <= 15 or "weight_bits" not in options
    if "target_sparsity" in options:
        assert SparsityReport.load(tmp_path / "sparsity.json").sparsity == pytest.approx(0.6, abs=1e-3)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"- activation_bits: {options['activation_bits']}" in card
    assert f"Layers round their inputs, to {options['activation_bits']} bits in 8 layers" in card
    assert "hf_pdecay.round_activations(model)" in card
    assert ("The weights have 4 bits in 8 tensors" in card) == ("weight_bits" in options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [BOTH, INPUTS])
def test_a_resumed_run_ends_bit_identical(
    options: dict[str, Any], dtype: torch.dtype, data: Any, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer = _trainer(whole, data, tiny_gpt2().to(dtype), **options)
    trainer.train()
    trainer.save_model()
    with pytest.raises(KeyboardInterrupt):
        _trainer(cut, data, tiny_gpt2().to(dtype), callbacks=[_Kill()], **options).train()
    resumed = _trainer(cut, data, tiny_gpt2().to(dtype), **options)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    for name in ("model.safetensors", "config.json", "checkpoint-24/model.safetensors", "sparsity.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def test_resuming_with_other_widths_is_refused(data: Any, tmp_path: Path) -> None:
    _trainer(tmp_path / "rounded", data, **INPUTS).train()
    _trainer(tmp_path / "exact", data, **DENSE).train()
    for folder, options, before, now in (
        ("rounded", {"activation_bits": 8}, "4 bits", "8 bits"),
        ("rounded", {}, "4 bits", "not rounded"),
        ("exact", {"activation_bits": 8}, "not rounded", "8 bits"),
    ):
        message = rf"Invalid activation_bits: in the run of .* the input of .* is {before}, and in this one {now}"
        with pytest.raises(ValueError, match=message):
            _trainer(tmp_path / folder, data, **{**DENSE, **options}).train(resume_from_checkpoint=True)


def test_rules(data: Any, tmp_path: Path) -> None:
    rules = {"mlp": {"activation_bits": 4}, "c_attn": {"activation_bits": None, "weight_bits": 2}}
    trainer = _trainer(tmp_path, data, lp_rules=rules, activation_bits=8, **DENSE)
    trainer.train()
    widths = rounded_inputs(trainer.model)
    assert {name for name, bits in widths.items() if bits == 4} == {name for name in widths if "mlp" in name}
    assert {name for name, bits in widths.items() if bits == 8} == {f"transformer.h.{n}.attn.c_proj" for n in (0, 1)}
    assert _levels(trainer.model.transformer.h[0].attn.c_attn.weight.detach()) <= 4
    assert _levels(trainer.model.transformer.h[0].mlp.c_fc.weight.detach()) > 16


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"bf16": True, "torch_compile": True, "torch_compile_backend": "aot_eager"},
        pytest.param(
            {"teacher": "self"},
            marks=pytest.mark.skipif(tf.__version__.startswith("4"), reason="a teacher takes transformers 5"),
        ),
    ],
)
def test_with_other_settings(options: dict[str, Any], data: Any, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, data, **BOTH, **options)
    trainer.train()
    trainer.save_model()
    assert SparsityReport.load(tmp_path / "sparsity.json").sparsity == pytest.approx(0.6, abs=1e-3)
    assert len(rounded_inputs(trainer.model)) == 8
    if "bf16" not in options:
        assert trainer.evaluate()["eval_loss"] == _rounded_loss_of(tmp_path, data)


@pytest.mark.skipif(tf.__version__.startswith("4"), reason="a teacher takes transformers 5")
def test_a_teacher_computes_with_exact_inputs(data: Any, tmp_path: Path) -> None:
    from hf_pdecay.trainer.teacher import _frozen_copy

    trainer = _trainer(tmp_path, data, **INPUTS)
    assert rounded_inputs(trainer.model)
    teacher = _frozen_copy(trainer, trainer.model, None)
    assert not rounded_inputs(teacher) and rounded_inputs(trainer.model)


def test_a_run_that_prunes_at_once_sees_exact_inputs(data: Any, tmp_path: Path) -> None:
    seen = []
    trainer = _trainer(tmp_path, data, build("llama"), **{**BOTH, "one_shot": "fisher", "max_steps": 60})
    around = trainer.without_rounding

    class Look:
        def __enter__(self) -> None:
            self.context = around()
            self.context.__enter__()
            seen.append(rounded_inputs(trainer.model))

        def __exit__(self, *args: Any) -> None:
            self.context.__exit__(*args)

    trainer.without_rounding = Look
    trainer.train()
    assert seen == [{}, {}] and len(rounded_inputs(trainer.model)) == 14  # as it reads rows, and as it prunes
    assert trainer.measure_sparsity().sparsity == pytest.approx(0.6, abs=1e-3)


@pytest.mark.skipif(tf.__version__.startswith("4"), reason="this release of transformers has lists of experts")
def test_fused_experts_are_refused_by_name(data: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"what .*experts.* multiplies is made inside of its module"):
        _trainer(tmp_path, data, build("mixtral"), **INPUTS)
    trainer = _trainer(tmp_path, data, build("mixtral"), lp_rules={"experts": {"activation_bits": None}}, **INPUTS)
    trainer.train()
    assert rounded_inputs(trainer.model)


@pytest.mark.usefixtures("lora_beside_torchao")
def test_refusals(data: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the model uses inner.weight without calling its layer"):
        _trainer(tmp_path, data, _Bypassing(), **INPUTS).train()
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match="Invalid activation_bits: inputs are rounded beside adapters"):
        _trainer(tmp_path, data, adapted, **INPUTS)
    for width in (3, "four", 16, True):
        with pytest.raises(ValueError, match=r"activation_bits=.*; it must be (one of 8, 4, 2, 1.58, 1|a number)"):
            _trainer(tmp_path, data, activation_bits=width)
    with pytest.raises(ValueError, match=r"'mlp': Invalid activation_bits: activation_bits=5"):
        _trainer(tmp_path, data, lp_rules={"mlp": {"activation_bits": 5}})
    with pytest.raises(ValueError, match=r"optim='adamw_torch' does not read .*activation_bits=4"):
        _trainer(tmp_path, data, optim="adamw_torch", activation_bits=4)


@pytest.mark.usefixtures("lora_beside_torchao")
def test_an_adapter_on_a_model_with_rounded_inputs(data: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    trainer = _trainer(tmp_path, data, **INPUTS)
    trainer.train()
    trainer.save_model()
    loss, widths = trainer.evaluate()["eval_loss"], rounded_inputs(trainer.model)
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    for model in (trainer.model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        adapted = get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
        second = _trainer(tmp_path / "adapter", data, adapted, **DENSE)
        assert second.evaluate()["eval_loss"] == loss and rounded_inputs(adapted) == widths
        second.train()
        merged = adapted.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        assert (tmp_path / "merged" / "config.json").read_text(encoding="utf-8") == config


def test_a_config_of_another_model(data: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_gpt2()
    model.config.hf_pdecay = {"activation_bits": {"model.layers.0.mlp.up_proj": 8}}
    _trainer(tmp_path, data, model, **DENSE)
    assert "its inputs are not rounded here: Invalid bits: model.layers.0.mlp.up_proj is no layer" in caplog.text


def test_a_model_without_a_config(data: Any, tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(64, 8), nn.Linear(8, 8), nn.Linear(8, 64)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.head(self.inner(self.embed(input_ids)))
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    trainer = _trainer(tmp_path, data, Plain(), **INPUTS)
    trainer.train()
    trainer.save_model()
    assert rounded_inputs(trainer.model) == {"inner": 4, "head": 4}


def test_a_second_training_goes_on_with_rounded_inputs(data: Any, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path / "first", data, **INPUTS)
    trainer.train()
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    second = _trainer(tmp_path / "second", data, model, **DENSE)
    second.train()
    second.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    _trainer(tmp_path / "second", data, model, **DENSE).train(resume_from_checkpoint=True)
    assert rounded_inputs(second.model) == rounded_inputs(trainer.model)
    assert second.evaluate()["eval_loss"] == _rounded_loss_of(tmp_path / "second", data)
    exact = round_activations(AutoModelForCausalLM.from_pretrained(tmp_path / "second"), {})
    exact.save_pretrained(tmp_path / "third")
    assert "activation_bits" not in (tmp_path / "third" / "config.json").read_text(encoding="utf-8")
