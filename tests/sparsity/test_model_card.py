from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import GPT2LMHeadModel, TrainerCallback, TrainerControl, TrainerState

import hf_pdecay
from hf_pdecay import PDecayTrainer
from hf_pdecay.sparsity.command_line import command_line
from hf_pdecay.sparsity.model_card import TAGS, SparsityCard, SparsitySection, add_sparsity
from hf_pdecay.sparsity.report import SparsityReport
from hf_pdecay.trainer.card import target_of_run

from ..helpers.models import tiny_gpt2


@pytest.fixture
def trained(make_args: Callable[..., Any], tokens: Any) -> PDecayTrainer:
    args = make_args(eval_strategy="steps", eval_steps=4, lp_rules={"attn": {"p_norm": 0.6, "lambda_p": 0.2}})
    trainer = PDecayTrainer(
        model=tiny_gpt2(),
        args=args,
        train_dataset=tokens,
        eval_dataset=tokens,
        compute_metrics=lambda prediction: {"accuracy": 0.25},
    )
    trainer.train()
    return trainer


def test_the_end_of_training_writes_a_card(trained: PDecayTrainer, tmp_path: Path) -> None:
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"hf-pdecay", "sparse", "generated_from_trainer"} <= set(card.data.tags)
    report = trained.measure_sparsity()
    for shown in (f"{report.sparsity:.2%}", f"{report.model_sparsity:.2%}", f"{report.decayed.zeros:,}"):
        assert shown in card.text
    for block, totals in report.by_block().items():
        assert f"| {block} | {totals.tensors} | {totals.parameters:,} | {totals.zeros:,} |" in card.text
    # p and λ_p of each rule, and of the run.
    assert "| `attn` | 4 | 8,192 | 0.6 | 0.2 | 0 |" in card.text
    assert "| `default` | 4 | 16,384 | 0.5 | 0.1 | 0 |" in card.text
    assert "- p_norm: 0.5" in card.text and "- lambda_p: 0.1" in card.text
    assert f"- hf_pdecay {hf_pdecay.__version__}" in card.text
    assert "2404.10824" in card.text and "@article" in card.text
    assert "![Exact zeros by step and by layer](sparsity.png)" in card.text
    assert "](https://huggingface.co/)" not in card.text and "None" not in card.content


def test_evaluation_is_a_model_index(trained: PDecayTrainer, tmp_path: Path) -> None:
    # Loading parses model-index; a wrong one raises.
    card = ModelCard.load(tmp_path / "out" / "README.md", ignore_metadata_errors=False)
    results = {metric.metric_type: metric.metric_value for metric in card.data.eval_results}
    last = [entry for entry in trained.state.log_history if "eval_loss" in entry][-1]
    assert results["loss"] == pytest.approx(last["eval_loss"])
    assert results["accuracy"] == 0.25
    assert results["sparsity"] == trained.measure_sparsity().sparsity
    assert set(results) == {"loss", "accuracy", "sparsity"}
    assert {metric.task_type for metric in card.data.eval_results} == {"text-generation"}


def test_save_model_writes_one_beside_the_model(trained: PDecayTrainer, tmp_path: Path) -> None:
    trained.create_model_card(dataset="Tiny Tokens", dataset_tags="tiny", license="mit")
    trained.save_model(str(tmp_path / "elsewhere"))
    card = ModelCard.load(tmp_path / "elsewhere" / "README.md")
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()
    # What was told once is kept, and the picture is not there.
    assert card.data.license == "mit"
    assert card.data.eval_results[0].dataset_name == "Tiny Tokens"
    assert "sparsity.png" not in card.text


def test_the_card_needs_no_network(trained: PDecayTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    trained.model.config._name_or_path = "some/base"
    trained.create_model_card()
    assert "some/base" in (tmp_path / "out" / "README.md").read_text()


def test_the_command_hides_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train.py", "--hub_token", "hf_abc", "--api-key=xyz", "--p_norm", "0.5", "--tokenizer_name", "gpt2"]
    words += ["--generate_tokens=9", "--text", "a b"]
    monkeypatch.setattr(sys, "argv", words)
    shown = "python train.py --hub_token '***' '--api-key=***' --p_norm 0.5 --tokenizer_name gpt2 --generate_tokens=9"
    assert command_line() == f"{shown} --text 'a b'"


@pytest.mark.parametrize(
    ("card", "tags"),
    [
        ("---\ntags:\n- trl\n- sparse\nlicense: mit\n---\n# Theirs\n\ntext\n", ["trl", *TAGS[1:2], TAGS[0], TAGS[2]]),
        ("---\ntags: trl\nlicense: mit\n---\n# Theirs\n\ntext\n", ["trl", *TAGS]),
        ("# Theirs\n\ntext\n", [*TAGS]),
    ],
)
def test_a_section_in_a_card_of_another_library(card: str, tags: list[str]) -> None:
    first, second = (SparsitySection(SparsityReport([], 1e-13), command=command) for command in ("first", "second"))
    once = add_sparsity(card, first)
    twice = add_sparsity(once, second)
    data = ModelCard(twice).data
    assert data.tags == tags
    assert data.license == ("mit" if "license" in card else None)
    assert "# Theirs\n\ntext\n" in twice
    assert twice.count("## Sparsity") == twice.count("@article{outmezguine2024decoupled") == 1
    assert "second" in twice and "first" not in twice
    assert add_sparsity(twice, second) == twice


def test_evaluating_alone_leaves_a_card_as_it_is(
    trained: PDecayTrainer, make_args: Callable[..., Any], tokens: Any, tmp_path: Path
) -> None:
    before = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    args = make_args(learning_rate=0.5)
    for folder in (tmp_path / "out", tmp_path / "new"):
        args.output_dir = str(folder)
        trainer = PDecayTrainer(model=trained.model, args=args, eval_dataset=tokens)
        trainer.evaluate()
        trainer.save_model()
        trainer.create_model_card()
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == before
    card = ModelCard.load(tmp_path / "new" / "README.md")
    assert "Counted by `hf_pdecay`" in card.text and "Trained with" not in card.text
    assert "learning_rate" not in card.text and "### Decay" not in card.text
    assert {metric.metric_type for metric in card.data.eval_results} == {"loss", "sparsity"}
    assert "Preparation" not in card.text and "- Step:" not in card.text


def test_metrics_of_all_data_sets_and_of_the_model_that_was_loaded() -> None:
    history: list[dict[str, Any]] = [
        {"loss": 3.0, "step": 5},
        {"eval_a_loss": 2.0, "step": 5},
        {"eval_b_loss": 2.5, "eval_b_runtime": 1.0, "step": 5},
        {"eval_a_loss": 2.2, "step": 10},
        {"eval_b_loss": 2.7, "step": 10},
    ]
    later = [*history, {"train_runtime": 1.0, "step": 10}, {"eval_loss": 1.0, "step": 10}]

    def found(log_history: list[dict[str, Any]], best_step: int | None = None) -> dict[str, Any]:
        nothing: Any = None
        return SparsityCard(nothing, nothing, log_history, best_step=best_step).evaluation()

    assert found(history) == {"a_loss": 2.2, "b_loss": 2.7}
    assert found(history, 5) == found(later[:-1], 5) == {"a_loss": 2.0, "b_loss": 2.5}
    assert found(later, 5) == found(later) == {"loss": 1.0}
    assert found([]) == found([{"loss": 3.0, "step": 5}]) == {}


def test_a_model_of_a_local_folder_is_not_said_to_be_from_scratch(
    make_args: Callable[..., Any], tokens: Any, tmp_path: Path
) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    PDecayTrainer(model=model, args=make_args(max_steps=1), train_dataset=tokens).train()
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "This model was trained on an unknown dataset." in text and str(tmp_path) not in text.split("### Command")[0]


def test_the_card_says_what_was_asked_for_and_where_a_model_falls_short(
    make_args: Callable[..., Any], tokens: Any, tmp_path: Path
) -> None:
    class StopAt(TrainerCallback):
        def __init__(self, step: int) -> None:
            self._step = step

        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == self._step

    def said(*callbacks: TrainerCallback) -> tuple[bool, bool]:
        args = make_args(max_steps=40, target_sparsity=0.75)
        PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=tokens, callbacks=list(callbacks)).train()
        text = ModelCard.load(tmp_path / "out" / "README.md").text
        return (
            "The target was 75.00% of the decayed weights. The file" in text,
            "**The target of 75.00% of the decayed weights was not reached.** The file" in text,
        )

    assert said() == (True, False)
    assert said(StopAt(30)) == (True, False)  # by then the last cut is done
    assert said(StopAt(10)) == (False, True)


@pytest.mark.parametrize(
    ("rules", "asked"),
    [
        ({"attn": {"target_sparsity": 0.5}}, 0.75),  # the others have more, so that all come to the target
        ({"attn": {"target_sparsity": 0}}, None),
        ({"attn": {"group": "row"}}, None),
    ],
)
def test_what_was_asked_for_of_all(
    rules: dict[str, Any], asked: float | None, make_args: Callable[..., Any], tokens: Any
) -> None:
    args = make_args(max_steps=40, target_sparsity=0.75, lp_rules=rules)
    trainer = PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=tokens)
    assert target_of_run(trainer.create_optimizer(), args.decay_settings) == (
        asked if asked is None else pytest.approx(asked)
    )
