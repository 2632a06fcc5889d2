from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments


class _Watch(TrainerCallback):
    """Notes the zeros of the blocks after each step."""

    def __init__(self) -> None:
        self.zeros: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.zeros.append(_zeros(kwargs["model"]))


def _zeros(model: Any) -> float:
    some = [param for name, param in model.named_parameters() if ".h." in name and param.dim() > 1]
    return sum(int((param == 0).sum()) for param in some) / sum(param.numel() for param in some)


def _model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16))


def _trainer(model: Any, out: Path, target: float | None = 0.8, **options: Any) -> tuple[PDecayTrainer, _Watch]:
    torch.manual_seed(1)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 60, (64, 16))]
    watch = _Watch()
    model_init = options.pop("model_init", None)
    options = {"max_steps": 60, "target_sparsity": target, "learning_rate": 1e-3, "save_strategy": "no", **options}
    args = PDecayTrainingArguments(str(out), report_to="none", use_cpu=True, disable_tqdm=True, **options)
    return PDecayTrainer(model=model, args=args, train_dataset=data, callbacks=[watch], model_init=model_init), watch


def test_a_second_train_keeps_the_zeros_of_the_first(tmp_path: Path) -> None:
    trainer, watch = _trainer(_model(), tmp_path)
    trainer.train()
    first = list(watch.zeros)
    assert first[0] == 0 and first[-1] == pytest.approx(0.8, abs=1e-4)
    for _ in range(2):
        watch.zeros.clear()
        trainer.train()
        assert set(watch.zeros) == {first[-1]}


def test_a_new_run_from_a_sparse_model_keeps_its_zeros_and_makes_more(tmp_path: Path) -> None:
    trainer, _ = _trainer(_model(), tmp_path / "one")
    trainer.train()
    trainer.save_model()
    for target in (0.8, 0.9):
        model = GPT2LMHeadModel.from_pretrained(tmp_path / "one")
        trainer, watch = _trainer(model, tmp_path / "two", target)
        trainer.train()
        assert watch.zeros == sorted(watch.zeros) and watch.zeros[0] == pytest.approx(0.8, abs=1e-4)
        assert watch.zeros[-1] == pytest.approx(target, abs=1e-4)
        moved = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
        assert (moved != 0).any()


def test_a_smaller_target_lets_the_zeros_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = _trainer(_model(), tmp_path / "one")
    trainer.train()
    trainer.save_model()
    trainer, watch = _trainer(GPT2LMHeadModel.from_pretrained(tmp_path / "one"), tmp_path / "two", 0.5)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert watch.zeros[-1] == pytest.approx(0.5, abs=1e-4)
    assert "made anew" in caplog.text


@pytest.mark.parametrize("kind", ["row", "neuron", "head", "2:4"])
def test_units_of_a_sparse_model_stay_dead(tmp_path: Path, kind: str) -> None:
    pattern = "attn" if kind == "head" else "mlp.*weight" if kind in ("row", "2:4") else "mlp"
    rules = {pattern: {"group": kind, **({} if kind == "2:4" else {"target_sparsity": 0.5})}}
    trainer, _ = _trainer(_model(), tmp_path / "one", None, lp_rules=rules)
    trainer.train()
    trainer.save_model()
    sparse = _zeros(trainer.model)
    trainer, watch = _trainer(GPT2LMHeadModel.from_pretrained(tmp_path / "one"), tmp_path / "two", None, lp_rules=rules)
    trainer.train()
    assert sparse > 0.1 and min(watch.zeros) >= sparse - 0.02


def test_a_run_that_goes_on_from_a_sparse_start_is_the_same_run(tmp_path: Path) -> None:
    trainer, _ = _trainer(_model(), tmp_path / "one")
    trainer.train()
    trainer.save_model()
    models = []
    for part in ("whole", "parts"):
        model = GPT2LMHeadModel.from_pretrained(tmp_path / "one")
        saving = {"save_strategy": "steps", "save_steps": 4}
        trainer, _ = _trainer(model, tmp_path / part, 0.9, **saving)
        trainer.train()
        models.append(model)
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "one")
    trainer, watch = _trainer(model, tmp_path / "parts", 0.9)
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert watch.zeros[0] == pytest.approx(0.8, abs=1e-4)
    for one, other in zip(models[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_new_model_of_model_init_starts_dense(tmp_path: Path) -> None:
    trainer, watch = _trainer(None, tmp_path, model_init=_model)
    trainer.train()
    watch.zeros.clear()
    trainer.train()
    assert watch.zeros[0] == 0 and watch.zeros[-1] == pytest.approx(0.8, abs=1e-4)
    assert json.loads((tmp_path / "sparsity.json").read_text())["sparsity"] == pytest.approx(0.8, abs=1e-4)
