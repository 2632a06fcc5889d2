"""Runs of the Trainer that ask for a sparsity; zeros are counted again from the files."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.nn.utils import prune
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_pdecay import PDecayTrainer

from ..helpers.models import build, tiny_gpt2


pytestmark = pytest.mark.usefixtures("undrawn")


MakeArgs = Callable[..., Any]
STEPS = 40


def _matrices(folder: Path) -> dict[str, torch.Tensor]:
    saved = load_file(folder / "model.safetensors")
    return {
        name: tensor for name, tensor in saved.items() if tensor.ndim == 2 and "wte" not in name and "wpe" not in name
    }


def _zeros(folder: Path, pattern: str = "") -> float:
    matrices = [matrix for name, matrix in _matrices(folder).items() if re.search(pattern, name)]
    return sum(int((matrix == 0).sum()) for matrix in matrices) / sum(matrix.numel() for matrix in matrices)


class InOrder(PDecayTrainer):
    """Takes the data in their order: a shuffled epoch that transformers 4.57 resumes goes on with other batches."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def _train(args: Any, data: Any, resume: str | None = None, **kwargs: Any) -> Any:
    trainer = InOrder(
        model=kwargs.pop("model", None) or tiny_gpt2(), args=args, train_dataset=data, eval_dataset=data, **kwargs
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


class History(TrainerCallback):
    """Notes the zeros after every step."""

    def __init__(self) -> None:
        self.zeros: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        matrices = [
            param
            for name, param in model.named_parameters()
            if param.ndim == 2 and "wte" not in name and "wpe" not in name
        ]
        self.zeros.append(
            sum(int((matrix == 0).sum()) for matrix in matrices) / sum(matrix.numel() for matrix in matrices)
        )


@pytest.mark.parametrize("target", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("features", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True, "warmup_steps": 10}])
def test_what_is_asked_for_is_what_the_file_has(
    target: float, features: dict[str, Any], make_args: MakeArgs, tokens: Any, tmp_path: Path
) -> None:
    history = History()
    _train(make_args(max_steps=STEPS, target_sparsity=target, **features), tokens, callbacks=[history])
    assert _zeros(tmp_path / "out") == pytest.approx(target, abs=1e-3)
    assert history.zeros == sorted(history.zeros)
    assert max(history.zeros) <= target + 5e-3
    assert history.zeros[: STEPS // 10] == [0.0] * (STEPS // 10)
    assert history.zeros[29] == history.zeros[-1]  # 0.75 of 40


@pytest.mark.parametrize("lr", [1e-5, 1e-4])
def test_a_pretrained_model_at_a_fine_tuning_rate(lr: float, make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    first = _train(make_args(max_steps=30, lambda_p=0.0), tokens)
    _train(make_args(max_steps=STEPS, target_sparsity=0.8, learning_rate=lr), tokens, model=first.model)
    assert _zeros(tmp_path / "out") == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "bert-classifier", "t5"])
def test_other_architectures(name: str, make_args: MakeArgs, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 64, (16,), generator=generator) for _ in range(48)]
    label = (lambda row: int(row[0]) % 2) if name == "bert-classifier" else (lambda row: row)
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label(row)} for row in rows]
    trainer = _train(make_args(max_steps=STEPS, target_sparsity=0.7), data, model=build(name))
    report = trainer.measure_sparsity()
    saved = load_file(tmp_path / "out" / "model.safetensors")
    decayed = {tensor.name for tensor in report.tensors if tensor.decayed}
    assert decayed
    zeros = sum(int((saved[key] == 0).sum()) for key in decayed)
    assert zeros / sum(saved[key].numel() for key in decayed) == pytest.approx(0.7, abs=1e-3)


def test_epochs_and_a_budget_for_each_tensor(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    _train(make_args(max_steps=-1, num_train_epochs=6, target_sparsity=0.75, sparsity_budget="tensor"), tokens)
    for matrix in _matrices(tmp_path / "out").values():
        assert int((matrix == 0).sum()) == pytest.approx(0.75 * matrix.numel(), abs=1)


def test_rules_have_targets_of_their_own(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    rules = {"attn": {"target_sparsity": 0.5}, "mlp.c_fc": {"target_sparsity": 0.95}, "h.1.mlp": "off"}
    args = make_args(max_steps=STEPS, target_sparsity=0.75, lp_rules=rules)
    _train(args, tokens)
    folder = tmp_path / "out"
    assert _zeros(folder, "attn") == pytest.approx(0.5, abs=1e-3)
    assert _zeros(folder, "c_fc") == pytest.approx(0.95, abs=1e-3)
    assert _zeros(folder, r"h\.1\.mlp\.c_proj") == 0
    on = "attn|c_fc|" + re.escape("h.0.mlp.c_proj")
    assert _zeros(folder, on) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("extra", [{}, {"optim_args": "moments=8bit"}, {"p_norm_begin": 1.5}])
@pytest.mark.parametrize("at", [10, 20, 34])
def test_a_resumed_run_goes_on_where_it_was(
    extra: dict[str, Any], at: int, make_args: MakeArgs, tokens: Any, tmp_path: Path
) -> None:
    options = {"max_steps": STEPS, "target_sparsity": 0.9, "save_strategy": "steps", "save_steps": at, **extra}
    _train(make_args(**options, output_dir=str(tmp_path / "whole")), tokens)
    _train(
        make_args(**options, output_dir=str(tmp_path / "again")),
        tokens,
        resume=str(tmp_path / f"whole/checkpoint-{at}"),
    )
    whole, again = _matrices(tmp_path / "whole"), _matrices(tmp_path / "again")
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name])
    assert _zeros(tmp_path / "again") == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("patient", [True, False])
def test_the_best_model_is_one_that_has_the_sparsity(
    patient: bool, make_args: MakeArgs, tokens: Any, tmp_path: Path
) -> None:
    # The loss on data that are learned by heart is least before the zeros, or so the metric says here.
    class Trainer(PDecayTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_loss"] = self.state.log_history[-1]["eval_loss"] = float(self.state.global_step)
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    args = make_args(
        max_steps=STEPS,
        target_sparsity=0.9,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
    )
    stopping = EarlyStoppingCallback(2) if patient else EarlyStoppingCallback(1)
    trainer = Trainer(model=tiny_gpt2(), args=args, train_dataset=tokens, eval_dataset=tokens, callbacks=[stopping])
    trainer.train()
    trainer.save_model()
    # Patience is counted from the end of the schedule on, since each evaluation before is of another model.
    assert trainer.state.global_step == (40 if patient else 35)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-30")
    assert _zeros(tmp_path / "out") == pytest.approx(0.9, abs=1e-3)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["loss"] == 30.0 and "\n- Loss: 30.0\n" in card.text, "of the model that was saved, not of the last"


@pytest.mark.parametrize("stop", [20, 34])
def test_a_run_that_stops_too_early_says_so(
    stop: int, make_args: MakeArgs, tokens: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= stop

    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        _train(make_args(max_steps=STEPS, target_sparsity=0.9), tokens, callbacks=[Stop()])
    early = "stopped after step 20, before sparsity_end at step 30" in caplog.text
    assert early == (stop == 20) and (_zeros(tmp_path / "out") < 0.85) == (stop == 20)


def test_a_target_wins_over_lambda_p_and_says_so(
    make_args: MakeArgs, tokens: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        rules = {"attn": {"lambda_p": 50.0}}
        args = make_args(max_steps=STEPS, target_sparsity=0.5, lambda_p=100.0, lp_rules=rules)
        _train(args, tokens)
    assert "target_sparsity wins over lambda_p=100 and lambda_p=50 in the rule 'attn'" in caplog.text
    assert _zeros(tmp_path / "out") == pytest.approx(0.5, abs=1e-3)


def test_a_layer_left_to_its_lambda_p_keeps_it(
    make_args: MakeArgs, tokens: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rules = {"h.0.mlp": {"lambda_p": 0.07, "target_sparsity": 0}}
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        trainer = _train(make_args(max_steps=STEPS, target_sparsity=0.5, lambda_p=None, lp_rules=rules), tokens)
    assert "wins over" not in caplog.text
    assert {group["lambda_p"] for group in trainer.optimizer.param_groups if group["decayed"]} >= {0.07}
    assert _zeros(tmp_path / "out", "attn|" + re.escape("h.1.mlp")) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("target", [None, 0.0])
def test_without_a_target_lambda_p_is_what_it_was(target: float | None, make_args: MakeArgs, tokens: Any) -> None:
    trainer = _train(make_args(target_sparsity=target, lambda_p=0.03), tokens)
    for group in trainer.optimizer.param_groups:
        assert group["lambda_p"] == (0.03 if group["decayed"] else 0)
        assert not group["keep_zeros"]


def test_p_is_annealed_without_a_target(make_args: MakeArgs, tokens: Any) -> None:
    seen: list[float] = []

    class Note(TrainerCallback):
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
        ) -> None:
            seen.append(optimizer.param_groups[0]["p_norm"])

    args = make_args(
        max_steps=20, p_norm=0.5, p_norm_begin=1.5, sparsity_begin=0, sparsity_end=0.5, sparsity_schedule="linear"
    )
    trainer = _train(args, tokens, callbacks=[Note()])
    assert seen == pytest.approx([1.5 - 0.1 * min(step, 10) for step in range(1, 21)])
    assert all(group["lambda_p"] == 0.1 for group in trainer.optimizer.param_groups if group["decayed"])


@pytest.mark.parametrize("features", [{}, {"gradient_accumulation_steps": 2, "weight_decay": 0.1}])
def test_a_model_pruned_elsewhere_keeps_its_zeros(
    features: dict[str, Any], make_args: MakeArgs, tokens: Any, tmp_path: Path
) -> None:
    model = tiny_gpt2()
    for name, module in model.named_modules():
        if "c_" in name and hasattr(module, "weight"):
            prune.l1_unstructured(module, "weight", amount=0.6)
            prune.remove(module, "weight")
    before = {name: param == 0 for name, param in model.named_parameters()}
    _train(make_args(max_steps=20, lambda_p=0.0, keep_zeros=True, **features), tokens, model=model)
    for name, matrix in _matrices(tmp_path / "out").items():
        assert torch.equal(matrix == 0, before[name])
    assert _zeros(tmp_path / "out") == pytest.approx(0.6, abs=1e-3)


def test_a_sparse_model_is_taken_further(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    first = _train(make_args(max_steps=STEPS, target_sparsity=0.5), tokens)
    gone = {name: matrix == 0 for name, matrix in _matrices(tmp_path / "out").items()}
    _train(make_args(max_steps=STEPS, target_sparsity=0.8, keep_zeros=True), tokens, model=first.model)
    for name, matrix in _matrices(tmp_path / "out").items():
        assert not matrix[gone[name]].any()
    assert _zeros(tmp_path / "out") == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_steps": 10}, "max_steps of at least"),
        ({"lp_rules": {"attn": {"target_sparsity": 0.1}}, "target_sparsity": 0.99}, "cannot be met"),
        ({"lp_rules": {"attn": {"p_norm": 2.0}}}, "p_norm=2"),
        ({"lp_rules": {"attn": {"target_sparsity": 1.5}}}, "target_sparsity"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    options: dict[str, Any], says: str, make_args: MakeArgs, tokens: Any
) -> None:
    with pytest.raises(ValueError, match=says):
        PDecayTrainer(
            model=tiny_gpt2(),
            args=make_args(**{"max_steps": 100, "target_sparsity": 0.9, **options}),
            train_dataset=tokens,
        )


def test_too_few_steps_in_epochs_are_refused_before_the_first(make_args: MakeArgs, tokens: Any) -> None:
    class OwnLoader(PDecayTrainer):
        """Only its loader knows the number of steps."""

        def get_train_dataloader(self) -> Any:
            return super().get_train_dataloader()

    args = make_args(max_steps=-1, num_train_epochs=2, target_sparsity=0.9)
    with pytest.raises(ValueError, match=r"of 12 steps only .* or as many by num_train_epochs"):
        PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=tokens)
    trainer = OwnLoader(model=tiny_gpt2(), args=args, train_dataset=tokens)
    with pytest.raises(ValueError, match="of 12 steps only"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 0.4},
        {"num_train_epochs": 1.5, "gradient_accumulation_steps": 4},
        {"num_train_epochs": 2, "per_device_train_batch_size": 7},
        {"num_train_epochs": 1, "per_device_train_batch_size": 1000},
    ],
)
def test_the_steps_of_epochs_are_those_of_the_trainer(
    options: dict[str, Any], make_args: MakeArgs, tokens: Any
) -> None:
    trainer = PDecayTrainer(model=tiny_gpt2(), args=make_args(max_steps=-1, **options), train_dataset=tokens)
    expected = trainer._expected_steps()
    trainer.train()
    assert trainer.state.max_steps == expected


def _resumed(make_args: MakeArgs, data: Any, first: dict[str, Any], then: dict[str, Any]) -> Any:
    """A run that stops after half of its steps, and one that goes on from there with other arguments."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= STEPS // 2

    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    args = make_args(**{"max_steps": STEPS, **saving, **first})
    trainer = InOrder(model=tiny_gpt2(), args=args, train_dataset=data, callbacks=[Stop()])
    trainer.train()
    trainer = InOrder(
        model=tiny_gpt2(), args=make_args(**{"max_steps": STEPS, **saving, **first, **then}), train_dataset=data
    )
    trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.mark.parametrize(
    ("then", "missing"),
    [({"max_steps": 24}, True), ({"sparsity_end": 0.4}, True), ({"sparsity_end": 0.6}, False), ({}, False)],
)
@pytest.mark.parametrize("rule", [None, {"mlp": {"group": "neuron"}, "attn": {"group": "head", "target_sparsity": 0}}])
def test_a_run_that_is_resumed_after_its_last_cut_says_so(
    rule: Any, then: dict[str, Any], missing: bool, make_args: MakeArgs, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        _resumed(make_args, tokens, {"target_sparsity": 0.8, "lp_rules": rule}, then)
    end = r"past sparsity_end at step 1[68], and \d+\.\d% of what decays is missing to target_sparsity"
    assert bool(re.search(end, caplog.text)) == missing


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        ({"target_sparsity": 0.8}, {"target_sparsity": 0.3}, r"3\d\.\d% of .* and past sparsity_begin zeros stay"),
        ({"target_sparsity": 0.8, "keep_zeros": True}, {"target_sparsity": 0.3}, "and keep_zeros keeps it"),
        ({"target_sparsity": 0.8}, {}, ""),
        ({"target_sparsity": 0.8}, {"target_sparsity": 0.9}, ""),
    ],
)
def test_a_run_that_is_sparser_than_asked_says_so(
    first: Any, then: Any, words: str, make_args: MakeArgs, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        _resumed(make_args, tokens, first, then)
    said = [record.getMessage() for record in caplog.records if "zero beyond target_sparsity" in record.getMessage()]
    assert len(said) == bool(words) and all(re.search(words, message) for message in said)


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        ({"lambda_p": 0.01}, {"lambda_p": 0.05}, "lambda_p=0.01 of .*checkpoint-20' for 'default', not with 0.05"),
        ({}, {"p_norm": 1.0}, "p_norm=0.5 of .* for 'default', not with 1.0"),
        ({}, {"keep_zeros": True}, "keep_zeros=False of .*, not with True"),
        ({"target_sparsity": 0.8}, {"target_sparsity": None}, "lambda_p=0.0.* of .*, not with 0.1"),
        (
            {"lp_rules": {"mlp": {"target_sparsity": 0.8}}},
            {"lp_rules": {"mlp": {"target_sparsity": 0.2}}},
            "target_sparsity=0.8 of .* for 'mlp', not with 0.2",
        ),
        ({"target_sparsity": 0.5}, {"target_sparsity": 0.8, "lambda_p": 0.3}, ""),
        ({"p_norm_begin": 1.5, "target_sparsity": 0.5}, {}, ""),
        ({"lambda_p": 0.01}, {"target_sparsity": 0.8}, ""),
    ],
)
def test_settings_that_the_checkpoint_wins_over_are_named(
    first: Any, then: Any, words: str, make_args: MakeArgs, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        _resumed(make_args, tokens, first, then)
    said = [record.getMessage() for record in caplog.records if "The run goes on with" in record.getMessage()]
    assert len(said) == bool(words) and all(re.search(words, message) for message in said)


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        ({"h.0": {"p_norm": 0.7}}, {"h.1": {"p_norm": 0.7}}, "rule='h.0', this optimizer has rule='default'"),
        ({"c_fc.weight": {"group": "2:4"}}, {"c_fc.weight": {"group": "1:4"}}, "group='2:4', .* group='1:4'"),
    ],
)
def test_a_checkpoint_of_other_rules_over_as_many_weights_is_refused(
    first: Any, then: Any, words: str, make_args: MakeArgs, tokens: Any
) -> None:
    """The settings of the first layer, or its moments, would go to the second."""
    with pytest.raises(ValueError, match=words):
        _resumed(make_args, tokens, {"lp_rules": first}, {"lp_rules": then})
