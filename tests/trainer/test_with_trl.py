"""TRL's trainers, by flag and by mixin. Each run is checked on what it saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_pdecay import PDecayTrainerMixin, PDecayTrainingArguments, SparsityReport

from ..helpers.local_files import llama, run_example, sentences, zeros_on_disk


trl = pytest.importorskip("trl")

pytestmark = pytest.mark.slow

TARGET = "p_norm=0.8,target_sparsity=0.5"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def common(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_steps": 20,
        "save_steps": 20,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
    }


def _check(trainer: Any, folder: Path) -> None:
    trainer.train()
    trainer.save_model()
    assert isinstance(trainer, PDecayTrainerMixin)
    zeros = zeros_on_disk(folder)
    assert zeros == pytest.approx(0.5, abs=1e-4)
    for place in (folder, folder / "checkpoint-20"):
        assert SparsityReport.load(place / "sparsity.json").sparsity == zeros
    assert {"sparsity.jsonl", "sparsity.png"} <= {file.name for file in folder.iterdir()}
    assert any("sparsity/overall" in line for line in trainer.state.log_history) or trainer.args.logging_steps > 20
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "\n- hf-pdecay\n" in card and "- trl\n" in card  # theirs, with our section at its end, once
    assert "This model is a fine-tuned version of" in card and "TRL" in card
    assert card.count("## Sparsity") == 1 and f"{zeros:.2%} of the decayed weights" in card


@pytest.mark.usefixtures("registered")
def test_sft_by_flag(model: str, common: dict[str, Any], tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": sentences(48)})
    args = trl.SFTConfig(**common, optim="adamw_lp", optim_args=TARGET, max_length=32)
    _check(trl.SFTTrainer(model=model, args=args, train_dataset=data), tmp_path / "out")


@pytest.mark.usefixtures("registered")
def test_dpo_by_flag(model: str, common: dict[str, Any], tmp_path: Path) -> None:
    data = Dataset.from_dict({"prompt": sentences(24), "chosen": sentences(24, 1), "rejected": sentences(24, 2)})
    args = trl.DPOConfig(**common, optim="adamw_lp", optim_args=TARGET, max_length=32)
    _check(trl.DPOTrainer(model=model, args=args, train_dataset=data), tmp_path / "out")


@pytest.mark.usefixtures("registered")
def test_grpo_by_flag(model: str, common: dict[str, Any], tmp_path: Path) -> None:
    def short(completions: list[str], **kwargs: Any) -> list[float]:
        return [-float(len(completion)) for completion in completions]

    data = Dataset.from_dict({"prompt": sentences(24)})
    args = trl.GRPOConfig(
        **common, optim="adamw_lp", optim_args=TARGET, num_generations=2, max_completion_length=4, beta=0.0
    )
    trainer = trl.GRPOTrainer(model=model, reward_funcs=short, args=args, train_dataset=data)
    _check(trainer, tmp_path / "out")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("config", [trl.SFTConfig, trl.DPOConfig])
@pytest.mark.parametrize(
    ("optim", "optim_args", "message"),
    [
        ("adamw_lp", "target_sparsty=0.5", "did you mean 'target_sparsity'"),
        ("adamw_lp", "target_sparsity=50", r"Was 0\.5 meant\?"),
        ("adamw_lp", "p_norm=0.8,target_sparsity", "target_sparsity"),
        ("adamw_torch", "target_sparsity=0.5", "does not read target_sparsity=0.5, .*'adamw_lp'"),
        ("sgd", "p_norm=0.8", "does not read p_norm=0.8, .*'sgd_lp'"),
    ],
)
def test_settings_are_refused_when_arguments_are_made(
    config: Any, optim: str, optim_args: str, message: str, common: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**common, optim=optim, optim_args=optim_args)


class SparseSFTTrainer(PDecayTrainerMixin, trl.SFTTrainer):
    pass


@dataclass
class SparseSFTConfig(trl.SFTConfig, PDecayTrainingArguments):
    optim: str = "adamw_lp"


def test_sft_by_mixin(model: str, common: dict[str, Any], tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": sentences(48)})
    args = SparseSFTConfig(**common, target_sparsity=0.5, max_length=32)
    assert args.max_length == 32 and args.decay_settings.target_sparsity == 0.5
    rates = [config(str(tmp_path), bf16=False).learning_rate for config in (SparseSFTConfig, trl.SFTConfig)]
    assert rates[0] == rates[1] != PDecayTrainingArguments.learning_rate  # TRL's defaults stay
    _check(SparseSFTTrainer(model=model, args=args, train_dataset=data), tmp_path / "out")


def test_the_example(tmp_path: Path) -> None:
    run_example("sft_trl", tmp_path / "out", 0.5)
