"""Runs that prune their model at once, from rows of their training data."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments, decayable_parameter_names

from ..helpers.models import build


class _Watch(TrainerCallback):
    """Notes which weights are zero after each step."""

    def __init__(self) -> None:
        self.zeros: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.zeros.append({name: model.get_parameter(name) == 0 for name in decayable_parameter_names(model)})

    @property
    def shares(self) -> list[float]:
        return [
            sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
            for masks in self.zeros
        ]


def _data(padded: bool = False) -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(1, 64, (80, 16), generator=torch.Generator().manual_seed(1))
    if not padded:
        return [{"input_ids": row, "labels": row} for row in rows]
    lengths = torch.randint(4, 17, (80,), generator=torch.Generator().manual_seed(2)).tolist()
    data = []
    for row, length in zip(rows, lengths, strict=True):
        mask = (torch.arange(16) < length).long()
        data.append({"input_ids": row * mask, "attention_mask": mask, "labels": row.masked_fill(mask == 0, -100)})
    return data


def _trainer(out: Path, model: Any = None, **options: Any) -> tuple[PDecayTrainer, _Watch]:
    torch.manual_seed(0)
    watch = _Watch()
    data = options.pop("data", None) or _data()
    given = {"max_steps": 40, "target_sparsity": 0.5, "one_shot": "fisher", "save_strategy": "no", **options}
    args = PDecayTrainingArguments(
        str(out), per_device_train_batch_size=8, report_to="none", use_cpu=True, disable_tqdm=True, **given
    )
    trainer = PDecayTrainer(
        model=build("llama") if model is None else model, args=args, train_dataset=data, callbacks=[watch]
    )
    return trainer, watch


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"one_shot": "sparsegpt"},
        {"one_shot": "wanda", "sparsity_budget": "tensor"},
        {"bf16": True, "learning_rate": 1e-2},
        {"target_sparsity": 0.4, "lp_rules": {"down_proj": {"target_sparsity": 0.2}}},
        {"target_sparsity": None, "lp_rules": {".*": {"group": "2:4"}}},
        {"data": _data(padded=True)},
    ],
    ids=str,
)
def test_the_zeros_come_at_once_and_stay(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer, watch = _trainer(tmp_path, **options)
    trainer.train()
    target = options.get("target_sparsity") or 0.5
    # Halfway from a tenth of 40 steps to three quarters of them.
    assert watch.shares == [0.0] * 16 + [pytest.approx(target, abs=1e-4)] * 24
    last = watch.zeros[-1]
    assert all(torch.equal(mask, last[name]) for masks in watch.zeros[16:] for name, mask in masks.items())
    if options.get("sparsity_budget") == "tensor":
        assert all(float(mask.float().mean()) == pytest.approx(0.5, abs=1e-3) for mask in last.values())


def test_the_run_sees_the_rows_that_it_would_see_in_the_same_order(tmp_path: Path) -> None:
    seen: dict[str, list[int]] = {"fisher": [], "off": []}

    class Recording(PDecayTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen[self.args.one_shot] += inputs["input_ids"][:, :4].flatten().tolist()  # type: ignore[attr-defined]
            return super().training_step(model, inputs, *args, **kwargs)

    for method in seen:
        trainer, _ = _trainer(tmp_path, one_shot=method)
        trainer.__class__ = Recording
        trainer.train()
    assert seen["fisher"] == seen["off"] != []


def test_what_lies_outside_the_blocks_is_pruned_on_the_schedule(tmp_path: Path) -> None:
    trainer, watch = _trainer(tmp_path, build("bert-classifier"), data=_labelled())
    trainer.train()
    assert 0.3 < watch.shares[16] < 0.5 - 1e-3
    assert watch.shares[-1] == pytest.approx(0.5, abs=1e-4)


def _labelled() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row["input_ids"], "labels": torch.tensor(number % 2)} for number, row in enumerate(_data())]


@pytest.mark.parametrize("step", [8, 16, 24])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, step: int) -> None:
    """Also from the step at whose end the model is pruned, 17, and from before it."""
    saving = {"save_strategy": "steps", "save_steps": 8, "one_shot": "auto", "data": _COUNTING}
    trainer, _ = _trainer(tmp_path, _trained(build("llama")), **saving)
    trainer.train()
    assert sum(int((param == 0).sum()) for param in trainer.model.parameters()) > 0
    resumed, _ = _trainer(tmp_path, **saving)  # from an untrained model: the checkpoint says what the run began with
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    for (name, param), other in zip(trainer.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(param, other), name


def test_an_untrained_run_that_is_resumed_prunes_step_by_step(tmp_path: Path) -> None:
    """Though its model knows its language by then."""
    saving = {"save_strategy": "steps", "save_steps": 10, "one_shot": "auto", "data": _COUNTING, "learning_rate": 1e-2}
    trainer, watch = _trainer(tmp_path, **saving)
    trainer.train()
    assert watch.shares[14] > 0
    resumed, _ = _trainer(tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for (name, param), other in zip(trainer.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(param, other), name


def test_a_sparse_model_is_not_pruned_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, watch = _trainer(tmp_path)
    trainer.train()
    first = watch.zeros[-1]
    caplog.clear()
    again, watch = _trainer(tmp_path / "again", trainer.model)
    again.train()
    assert "Pruned to" not in caplog.text
    assert all(torch.equal(mask, first[name]) for masks in watch.zeros for name, mask in masks.items())


def _trained(model: Any) -> Any:
    """A model that has learned to count."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        rows = (torch.randint(1, 60, (16, 1)) + torch.arange(16)) % 64
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


_COUNTING = [{"input_ids": row, "labels": row} for row in (torch.arange(80)[:, None] + torch.arange(16)) % 64]


def test_by_default_a_pretrained_model_is_pruned_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "hf_pdecay")
    trainer, watch = _trainer(tmp_path / "untrained", one_shot="auto", data=_COUNTING)
    trainer.train()
    assert 0 < watch.shares[12] < 0.5 and "Pruned to" not in caplog.text
    trainer, watch = _trainer(tmp_path / "trained", _trained(build("llama")), one_shot="auto", data=_COUNTING)
    trainer.train()
    assert (
        watch.shares[15:17] == [0, pytest.approx(0.5, abs=1e-4)] and "Pruned to 50.00% zeros by fisher" in caplog.text
    )
    for name, options in (("bert-classifier", {"data": _labelled()}), ("llama", {"one_shot": "off"})):
        trainer, watch = _trainer(tmp_path / name, build(name), **{"one_shot": "auto", **options})
        assert trainer.callback_handler.callbacks  # made without an error
    trainer.train()
    assert 0 < watch.shares[12] < 0.5


def test_beyond_half_of_the_weights_the_schedule_prunes(tmp_path: Path) -> None:
    trainer, watch = _trainer(tmp_path, target_sparsity=0.8)
    trainer.train()
    assert watch.shares[15:17] == [0, pytest.approx(0.5, abs=1e-4)]
    assert watch.shares == sorted(watch.shares)
    assert watch.shares[-1] == pytest.approx(0.8, abs=1e-4)
    first = watch.zeros[16]
    assert all(bool((masks[name] >= mask).all()) for masks in watch.zeros[16:] for name, mask in first.items())


def test_the_card_and_the_log_say_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        trainer, _ = _trainer(tmp_path)
        trainer.train()
    assert "Pruned to 50.00% zeros by fisher, from 64 rows of 16 tokens" in caplog.text
    assert "one_shot" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("llama", {"one_shot": "obs"}, "one_shot='obs'; it must be one of"),
        ("llama", {"target_sparsity": None}, "one_shot='fisher' without a target"),
        ("llama", {"lp_rules": {".*": {"group": "row"}}}, "the targets are for row"),
        ("t5", {}, "T5ForConditionalGeneration is an encoder-decoder"),
    ],
)
def test_what_cannot_be_is_said_before_training(tmp_path: Path, model: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _trainer(tmp_path, build(model), **options)


def test_batches_without_tokens_and_too_few_are_refused(tmp_path: Path) -> None:
    images = [{"pixel_values": torch.rand(1, 16, 16), "labels": torch.tensor(0)} for _ in range(16)]
    trainer, _ = _trainer(tmp_path, build("vit"), data=images)
    with pytest.raises(ValueError, match="no input_ids of shape"):
        trainer.train()
