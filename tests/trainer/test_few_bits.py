from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments, SparsityReport

from ..helpers.models import build, tiny_gpt2


RUN: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "max_steps": 24,
    "logging_steps": 6,
    "save_strategy": "steps",
    "save_steps": 8,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
    "disable_tqdm": True,
    "one_shot": "off",
}
DENSE = {"lambda_p": 0.0}


@pytest.fixture(scope="module")
def data() -> Any:
    from datasets import Dataset

    rows = torch.randint(0, 64, (64, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def _trainer(folder: Path, data: Any, model: nn.Module | None = None, **options: Any) -> PDecayTrainer:
    callbacks = options.pop("callbacks", None)
    args = PDecayTrainingArguments(str(folder), **{**RUN, **options})
    return PDecayTrainer(
        model=tiny_gpt2() if model is None else model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
    )


def _loss_of(folder: Path, data: Any) -> float:
    """The loss of what plain ``from_pretrained`` loads."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = PDecayTrainer(
        model=model,
        args=PDecayTrainingArguments(str(folder / "evaluation"), use_cpu=True, report_to="none", disable_tqdm=True),
        eval_dataset=data,
    )
    return float(trainer.evaluate()["eval_loss"])


def _levels(weight: torch.Tensor) -> int:
    """The most values in a block of a Conv1D's weight."""
    return max(len(block.unique()) for part in weight.split(128) for block in part.T)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 2, 1.58, 1])
def test_what_is_saved_is_what_was_evaluated(bits: float, sparse: bool, data: Any, tmp_path: Path) -> None:
    options = {"target_sparsity": 0.6} if sparse else DENSE
    trainer = _trainer(tmp_path, data, weight_bits=bits, eval_strategy="steps", eval_steps=8, **options)
    trainer.train()
    trainer.save_model()
    printed = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.evaluate()["eval_loss"] == printed[-1] == _loss_of(tmp_path, data)
    assert _loss_of(tmp_path / "checkpoint-16", data) == printed[1]

    saved = load_file(tmp_path / "model.safetensors")
    assert list(saved) == list(load_file(tmp_path / "checkpoint-16" / "model.safetensors"))
    rounded = [name for name in saved if "c_" in name and name.endswith("weight")]
    assert len(rounded) == 8
    levels = 2 ** int(bits) + (bits == 1.58) + sparse * (bits in (1, 2))
    assert max(_levels(saved[name]) for name in rounded) <= levels
    assert _levels(saved["transformer.wte.weight"].T) == 32  # left alone
    report = SparsityReport.load(tmp_path / "sparsity.json")
    for tensor in report.tensors:
        assert tensor.zeros == int((saved[tensor.name] == 0).sum())
    if sparse and bits != 1.58:
        assert report.sparsity == pytest.approx(0.6, abs=1e-3)
    # The log counts what would be saved, not the latent weights.
    logged = [line["sparsity/overall"] for line in trainer.state.log_history if "sparsity/overall" in line]
    assert logged[-1] == report.sparsity == SparsityReport.load(tmp_path / "checkpoint-24" / "sparsity.json").sparsity
    assert (bits == 1.58 or (sparse and bits == 4)) == (logged[0] > 0.1)
    trainer.model.save_pretrained(tmp_path / "by_itself")
    assert (tmp_path / "by_itself" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_the_zeros_of_2_4_stay(data: Any, tmp_path: Path) -> None:
    rules = {"mlp": {"group": "2:4", "weight_bits": 1}, "attn": {"target_sparsity": 0.5}}
    trainer = _trainer(tmp_path, data, lp_rules=rules, weight_bits=4)
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    for name in ("transformer.h.0.mlp.c_fc.weight", "transformer.h.1.mlp.c_proj.weight"):
        blocks = saved[name].unflatten(0, (-1, 4))
        assert ((blocks == 0).sum(1) == 2).all()
        assert _levels(saved[name]) <= 3
    assert 4 < _levels(saved["transformer.h.0.attn.c_attn.weight"]) <= 15


class _Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 13:
            raise KeyboardInterrupt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"weight_bits": 4, "target_sparsity": 0.6}, {"weight_bits": 1, **DENSE}])
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
    for name in ("model.safetensors", "checkpoint-24/model.safetensors", "sparsity.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    latent = [torch.load(folder / "checkpoint-24" / "latent_weights.pt")["weights"] for folder in (whole, cut)]
    assert latent[0].keys() == latent[1].keys()
    assert all(torch.equal(latent[0][name], latent[1][name]) for name in latent[0])
    rounded = load_file(whole / "model.safetensors")
    assert not torch.equal(rounded["transformer.h.0.mlp.c_fc.weight"], latent[0]["transformer.h.0.mlp.c_fc.weight"])


def test_resuming_with_other_widths_is_refused(data: Any, tmp_path: Path) -> None:
    _trainer(tmp_path, data, weight_bits=4, **DENSE).train()
    for options in ({"weight_bits": 2}, {}):
        with pytest.raises(ValueError, match=r"Invalid weight_bits: in the run of .* is 4 bits, and in this one"):
            _trainer(tmp_path, data, **options, **DENSE).train(resume_from_checkpoint=True)
    dense = tmp_path / "dense"
    _trainer(dense, data, **DENSE).train()
    with pytest.raises(ValueError, match=r"is not rounded, and in this one 4 bits"):
        _trainer(dense, data, weight_bits=4, **DENSE).train(resume_from_checkpoint=True)


def test_an_interrupted_run_leaves_the_rounded_model(data: Any, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, data, weight_bits=2, callbacks=[_Kill()], **DENSE)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert _levels(trainer.model.transformer.h[0].mlp.c_fc.weight.detach()) <= 4
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())


def test_the_best_model_is_loaded_as_it_was_evaluated(data: Any, tmp_path: Path) -> None:
    # The best is the worst here, so that it is not the last.
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = _trainer(tmp_path, data, weight_bits=4, eval_strategy="steps", eval_steps=8, **options, **DENSE)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.evaluate()["eval_loss"] == max(losses) != losses[-1]


def test_a_second_training_goes_on_from_the_rounded_model(data: Any, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, data, weight_bits=4, **DENSE)
    trainer.train()
    before = trainer.model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    trainer.train()
    after = trainer.model.transformer.h[0].mlp.c_fc.weight.detach()
    assert not torch.equal(before, after) and _levels(before) <= 16 and _levels(after) <= 16


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"bf16": True, "torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"optim": "sgd_lp", "learning_rate": 0.1},
        pytest.param(
            {"teacher": "self"},
            marks=pytest.mark.skipif(tf.__version__.startswith("4"), reason="a teacher takes transformers 5"),
        ),
    ],
)
def test_with_other_settings(options: dict[str, Any], data: Any, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, data, weight_bits=4, target_sparsity=0.5, **options)
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    assert 2 < _levels(saved["transformer.h.0.mlp.c_fc.weight"]) <= 15
    assert SparsityReport.load(tmp_path / "sparsity.json").sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.slow
def test_compiled_by_inductor(data: Any, tmp_path: Path) -> None:
    losses = {}
    for name, compiled in {"plain": {}, "compiled": {"torch_compile": True}}.items():
        options = {"weight_bits": 4, "activation_bits": 8, "target_sparsity": 0.5, "learning_rate": 1e-3}
        trainer = _trainer(tmp_path / name, data, build("llama"), **options, **compiled, save_strategy="no")
        trainer.train()
        trainer.save_model()
        losses[name] = float(trainer.evaluate()["eval_loss"])
        assert SparsityReport.load(tmp_path / name / "sparsity.json").sparsity == pytest.approx(0.5, abs=1e-3)
        # Compiled operations differ in the last bits, and with them an input between two codes.
        assert _loss_of(tmp_path / name, data) == pytest.approx(losses[name], abs=1e-3)
    assert losses["compiled"] == pytest.approx(losses["plain"], abs=5e-3)


def test_evaluation_without_training_takes_the_model_as_it_is(data: Any, tmp_path: Path) -> None:
    exact = _trainer(tmp_path, data, **DENSE).evaluate()["eval_loss"]
    trainer = _trainer(tmp_path, data, weight_bits=1, **DENSE)
    assert trainer.evaluate()["eval_loss"] == exact
    assert torch.equal(trainer.model.transformer.h[0].mlp.c_fc.weight, tiny_gpt2().transformer.h[0].mlp.c_fc.weight)


def test_a_run_that_prunes_at_once(data: Any, tmp_path: Path) -> None:
    options = {"target_sparsity": 0.5, "one_shot": "fisher", "max_steps": 60}
    trainer = _trainer(tmp_path, data, build("llama"), weight_bits=4, **options)
    trainer.train()
    assert trainer.measure_sparsity().sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.skipif(tf.__version__.startswith("4"), reason="this release of transformers has lists of experts")
def test_experts(data: Any, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, data, build("mixtral"), weight_bits=1, target_sparsity=0.5)
    trainer.train()
    experts = [param for name, param in trainer.model.named_parameters() if param.dim() == 3]
    assert experts
    for param in experts:
        for block in param.detach().flatten(0, 1):
            assert len(block.unique()) <= 3
    with torch.no_grad():
        assert not any((param == 0).all() for param in experts)


class _Bypassing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(64, 8), nn.Linear(8, 8), nn.Linear(8, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.embed(input_ids) @ self.inner.weight)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.usefixtures("lora_beside_torchao")
def test_refusals(data: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the model uses inner.weight without calling its layer"):
        _trainer(tmp_path, data, _Bypassing(), weight_bits=4).train()
    rules = {"inner.weight": {"weight_bits": None}}
    _trainer(tmp_path, data, _Bypassing(), weight_bits=4, lp_rules=rules).train()
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match="weights are rounded beside adapters"):
        _trainer(tmp_path, data, adapted, weight_bits=4)
    with pytest.raises(ValueError, match=r"weight_bits=3; it must be one of 8, 4, 2, 1.58, 1"):
        _trainer(tmp_path, data, weight_bits=3)
    with pytest.raises(ValueError, match=r"'mlp': Invalid weight_bits: weight_bits=5"):
        _trainer(tmp_path, data, lp_rules={"mlp": {"weight_bits": 5}})
    with pytest.raises(ValueError, match=r"optim='adamw_torch' does not read .*weight_bits=4"):
        _trainer(tmp_path, data, optim="adamw_torch", weight_bits=4)


@pytest.mark.usefixtures("lora_beside_torchao")
def test_an_adapter_on_a_rounded_model(data: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    trainer = _trainer(tmp_path, data, weight_bits=4, **DENSE)
    trainer.train()
    before = trainer.model.transformer.h[0].attn.c_attn.weight.detach().clone()
    adapted = get_peft_model(trainer.model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    _trainer(tmp_path / "adapter", data, adapted, **DENSE).train()
    assert torch.equal(before, adapted.base_model.model.transformer.h[0].attn.c_attn.base_layer.weight)


def test_zeros_and_the_rounding_of_torchao(data: Any, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = build("llama")
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=16, is_symmetric=True)
    quantize_(model, QATConfig(weight_config=weights, step="prepare"), filter_fn=lambda _, name: name.endswith("proj"))
    trainer = _trainer(tmp_path, data, model, target_sparsity=0.5)
    trainer.train()
    assert trainer.measure_sparsity().sparsity == pytest.approx(0.5, abs=1e-3)
    zeros = {}
    for name, module in model.named_modules():
        if name.endswith("proj"):
            zeros[name] = module.weight == 0
            assert zeros[name].any() and not module.weight_fake_quantizer(module.weight)[zeros[name]].any()
    quantize_(model, QATConfig(step="convert"), filter_fn=lambda _, name: name.endswith("proj"))
    quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(16)), filter_fn=lambda _, name: name.endswith("proj"))
    for name, module in model.named_modules():
        if name.endswith("proj"):
            assert type(module) is nn.Linear and not module.weight.dequantize()[zeros[name]].any()
    with pytest.raises(ValueError, match=r"no weight can be rounded|quantised already"):
        _trainer(tmp_path / "again", data, model, weight_bits=4)


def test_a_search_over_bits(data: Any, tmp_path: Path) -> None:
    pytest.importorskip("optuna")

    args = PDecayTrainingArguments(str(tmp_path), **{**RUN, "save_strategy": "epoch", "max_steps": 12}, **DENSE)
    trainer = PDecayTrainer(model_init=lambda _: tiny_gpt2(), args=args, train_dataset=data, eval_dataset=data)
    levels = []

    class Count(TrainerCallback):
        def on_train_end(self, *_: Any, **kwargs: Any) -> None:
            levels.append(_levels(kwargs["model"].transformer.h[0].mlp.c_fc.weight.detach()))

    trainer.add_callback(Count())
    trainer.hyperparameter_search(
        lambda trial: {"weight_bits": trial.suggest_categorical("weight_bits", [2.0, 1.0])},
        n_trials=2,
        backend="optuna",
    )
    assert all(count <= 4 for count in levels) and len(levels) == 2


def _with_outliers(model: Any) -> Any:
    """A model in which a block of each matrix has one large weight, beside which most others have code 0."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "proj" in name:
                param[::3, 5] = 20 * param.std()
    return model


@pytest.mark.parametrize("one_shot", ["fisher", "off"])
@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_are_those_of_the_target_beside_large_weights(
    bits: int, one_shot: str, data: Any, tmp_path: Path
) -> None:
    options = {"target_sparsity": 0.5, "one_shot": one_shot, "max_steps": 60, "learning_rate": 1e-3}
    trainer = _trainer(tmp_path, data, _with_outliers(build("llama")), weight_bits=bits, **options)
    zeros = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            zeros.append(trainer.measure_sparsity().sparsity)

    trainer.add_callback(Watch())
    trainer.train()
    assert trainer.measure_sparsity().sparsity == pytest.approx(0.5, abs=1e-4)
    assert zeros[45:] == [pytest.approx(0.5, abs=1e-4)] * 15
    if bits == 4:  # until then, small weights have code 0
        assert zeros[3] > 0.02


def test_weights_that_are_rounded_to_0_go_first() -> None:
    from hf_pdecay import AdamWLp, SparsityControl

    for marked, wanted in ((10, True), (300, False)):
        weight = nn.Parameter(torch.rand(20, 40, generator=torch.Generator().manual_seed(0)) + 0.1)
        marks = torch.zeros(800, dtype=torch.bool)
        marks[-marked:] = True
        with torch.no_grad():
            weight.view(-1)[-marked:] += 10  # none that magnitude would choose
        optimizer = AdamWLp([weight], lr=1e-4)
        control = SparsityControl(optimizer, 40, target_sparsity=0.25, sparsity_decay=0)
        control.first = lambda marks=marks, weight=weight: {id(weight): marks.view(20, 40)}  # type: ignore[misc]
        for step in range(1, 41):
            control.before_step(step)
            weight.grad = torch.full_like(weight, 1e-3)
            optimizer.step()
            control.after_step(step)
        assert int((weight == 0).sum()) == 200
        assert bool((weight.view(-1)[-marked:] == 0).all()) is wanted
