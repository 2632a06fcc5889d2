"""Stock Trainers by every name that ``--optim`` takes: targets reached, counted again from disk, and resumed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_pdecay import AdamWLp, LpDecay, PDecayTrainer, PDecayTrainingArguments
from hf_pdecay.optim.optimizer_names import OPTIMIZERS

from ..helpers.models import tiny_gpt2


pytestmark = pytest.mark.usefixtures("undrawn")


OPTIONS = {
    "adamw_lp": "moments=bfloat16",
    "sgd_lp": "momentum=0.9,nesterov=true",
    "muon_lp": "momentum=0.9",
    "adafactor_lp": "d=2",
    "lion_8bit_lp": "min_8bit_size=256",
    "adamw_bnb_8bit_lp": "min_8bit_size=256",
    "adamw_torch_8bit_lp": "block_size=128",
}
RUN = {"use_cpu": True, "report_to": "none", "max_steps": 24, "logging_steps": 6, "disable_tqdm": True}
RUN |= {"learning_rate": 5e-3, "save_strategy": "steps", "save_steps": 12}  # an epoch


def here(name: str) -> Any:
    package = OPTIMIZERS[name].package
    missing = package is not None and importlib.util.find_spec(package[0]) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"needs {package}"))


def train(folder: Path, name: str, data: Any, resume: bool = False) -> Trainer:
    options = ",".join(filter(None, ["target_sparsity=0.7", OPTIONS.get(name)]))
    args = TrainingArguments(str(folder), optim=name, optim_args=options, **RUN)
    trainer = Trainer(model=tiny_gpt2(), args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


def counted(folder: Path) -> float:
    saved = load_file(folder / "model.safetensors")
    report = json.loads((folder / "sparsity.json").read_text())
    decayed = [saved[entry["name"]] for entry in report["tensors"] if entry["decayed"]]
    return sum(int((weight == 0).sum()) for weight in decayed) / sum(weight.numel() for weight in decayed)


@pytest.mark.parametrize("name", [here(name) for name in OPTIMIZERS])
def test_the_target_is_reached_and_a_resumed_run_ends_the_same(
    name: str, registered: None, eager: None, tokens: Any, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer = train(whole, name, tokens)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, AdamWLp if name == "adamw_lp" else LpDecay)
    assert counted(whole) == pytest.approx(0.7, abs=1e-3)
    before = tiny_gpt2().state_dict()
    moved = load_file(whole / "model.safetensors")
    assert all(not torch.equal(moved[key], before[key]) for key in moved)
    train(cut, name, tokens)
    (cut / "checkpoint-24" / "trainer_state.json").unlink()
    train(cut, name, tokens, resume=True)
    again = load_file(cut / "model.safetensors")
    assert all(torch.equal(again[key], moved[key]) for key in moved)
    assert (cut / "sparsity.jsonl").read_text() == (whole / "sparsity.jsonl").read_text()
    lines = (whole / "README.md").read_text(encoding="utf-8").splitlines()
    said = next(line for line in lines if line.startswith(f"- optimizer: {name}"))
    assert ("betas=" in said) == (name not in ("sgd_lp", "adafactor_lp")), said
    assert ("momentum=0.9, nesterov=True" in said) == (name in ("sgd_lp", "muon_lp")), said
    assert ("eps=" in said) == (name != "sgd_lp"), said


def test_arguments_of_our_own_take_the_names_too(tokens: Any, tmp_path: Path) -> None:
    args = PDecayTrainingArguments(str(tmp_path), optim="sgd_lp", optim_args="momentum=0.9", target_sparsity=0.7, **RUN)
    trainer = PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=tokens)
    trainer.train()
    trainer.save_model()
    assert trainer.optimizer.optimizer.param_groups[0]["momentum"] == 0.9
    assert counted(tmp_path) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sgd_lp", "moments=bfloat16", "the key 'moments' .* is not known; "),
        ("sgd_lp", "momentum=1.5", r"momentum='1.5' for optim='sgd_lp'; it must be a number in \[0, 1\)"),
        ("adamw_lp", "momentum=0.9", "the key 'momentum' .* did you mean 'moments'"),
    ],
)
def test_options_of_another_optimizer_are_told(
    name: str, options: str, words: str, registered: None, tokens: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        Trainer(
            model=tiny_gpt2(),
            args=TrainingArguments(str(tmp_path), optim=name, optim_args=options, **RUN),
            train_dataset=tokens,
        )
