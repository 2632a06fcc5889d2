from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_pdecay import PDecayTrainer, SparsityCallback, measure_sparsity
from hf_pdecay.sparsity.history import read_history
from hf_pdecay.sparsity.picture import plot_sparsity
from hf_pdecay.target.forecast import DecayingGroup, forecast

from ..helpers.models import tiny_gpt2


MakeArgs = Callable[..., Any]


class _CountByHand(TrainerCallback):
    """Counts the zeros of GPT-2's matrices at every log event, on its own."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, model: nn.Module, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            matrices = [param for name, param in model.named_parameters() if ".c_" in name and param.ndim == 2]
            zeros = sum((param == 0).sum().item() for param in matrices)
            self.seen[state.global_step] = zeros / sum(param.numel() for param in matrices)
            assert logs["sparsity/overall"] == self.seen[state.global_step]


def _run(args: Any, data: Any, **kwargs: Any) -> PDecayTrainer:
    trainer = PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=data, eval_dataset=data, **kwargs)
    trainer.train()
    return trainer


def test_logs_reach_the_history_the_file_and_later_callbacks(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    counter = _CountByHand()
    trainer = _run(make_args(max_steps=12, eval_strategy="steps", eval_steps=6), tokens, callbacks=[counter])
    assert list(counter.seen) == [2, 4, 6, 8, 10, 12]
    assert counter.seen[12] > 0
    logged = {entry["step"]: entry["sparsity/overall"] for entry in trainer.state.log_history if "loss" in entry}
    history = read_history(tmp_path / "out")
    assert logged == counter.seen == {line["step"]: line["sparsity"] for line in history}
    assert history[-1]["layers"].keys() == {
        tensor.name for tensor in measure_sparsity(trainer.model).tensors if tensor.decayed
    }
    assert not any(key.startswith("sparsity/layer") for entry in trainer.state.log_history for key in entry)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations and not any("sparsity/overall" in entry for entry in evaluations)


def test_tensorboard_gets_every_layer(
    make_args: MakeArgs, tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Where transformers 5 and 4.57 look for the place of the event files.
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    args = make_args(report_to="tensorboard", sparsity_logging="layer")
    _run(args, tokens)
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    history = read_history(tmp_path / "out")
    scalars = {(event.step, round(event.value, 5)) for event in events.Scalars("train/sparsity/overall")}
    assert scalars == {(line["step"], round(line["sparsity"], 5)) for line in history}
    for name, sparsity in history[-1]["layers"].items():
        assert events.Scalars(f"train/sparsity/layer/{name}")[-1].value == pytest.approx(sparsity)


def test_a_stock_trainer_may_attach_it(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=4, logging_steps=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    counter = _CountByHand()
    trainer = Trainer(model=tiny_gpt2(), args=args, train_dataset=tokens, callbacks=[counter])
    SparsityCallback().attach(trainer)
    trainer.train()
    assert counter.seen == {2: 0.0, 4: 0.0}
    assert (tmp_path / "out" / "sparsity.json").is_file()


def test_history_of_a_resumed_run_has_no_gap_and_no_double_line(
    make_args: MakeArgs, tokens: Any, tmp_path: Path
) -> None:
    _run(make_args(save_strategy="steps", save_steps=4), tokens)
    whole = (tmp_path / "out" / "sparsity.jsonl").read_text()
    # As a crash leaves it: lines beyond the checkpoint, and one cut short.
    (tmp_path / "out" / "sparsity.jsonl").write_text(whole + '{"step": 10, "epo')
    trainer = PDecayTrainer(model=tiny_gpt2(), args=make_args(), train_dataset=tokens, eval_dataset=tokens)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert (tmp_path / "out" / "sparsity.jsonl").read_text() == whole


def test_a_new_run_starts_a_new_history_and_says_where_the_old_one_is(
    make_args: MakeArgs, tokens: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _run(make_args(), tokens)
    first = (tmp_path / "out" / "sparsity.jsonl").read_text()
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        _run(make_args(max_steps=4), tokens)
    assert [line["step"] for line in read_history(tmp_path / "out")] == [2, 4]
    assert (tmp_path / "out" / "sparsity.1.jsonl").read_text() == first
    assert f"which are in {tmp_path / 'out' / 'sparsity.1.jsonl'} now" in caplog.text
    second = (tmp_path / "out" / "sparsity.jsonl").read_text()
    _run(make_args(max_steps=2), tokens)
    assert (tmp_path / "out" / "sparsity.2.jsonl").read_text() == second


def test_a_run_that_resumes_from_elsewhere_does_not_continue_the_lines_of_another(
    make_args: MakeArgs, tokens: Any, tmp_path: Path
) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    _run(make_args(output_dir=elsewhere, save_strategy="steps", save_steps=6), tokens)
    _run(make_args(lambda_p=0.3), tokens)
    other = (tmp_path / "out" / "sparsity.jsonl").read_text()
    trainer = PDecayTrainer(model=tiny_gpt2(), args=make_args(), train_dataset=tokens)
    trainer.train(resume_from_checkpoint=f"{elsewhere}/checkpoint-6")
    assert [line["step"] for line in read_history(tmp_path / "out")] == [8]
    assert (tmp_path / "out" / "sparsity.1.jsonl").read_text() == other


def test_a_trainer_may_log_without_a_history(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    class Quiet(PDecayTrainer):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    trainer = Quiet(model=tiny_gpt2(), args=make_args(), train_dataset=tokens)
    trainer.train()
    assert not trainer.state.log_history
    assert [line["step"] for line in read_history(tmp_path / "out")] == [2, 4, 6, 8]


def test_it_prints_the_groups_and_the_result(
    make_args: MakeArgs, tokens: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = _run(make_args(), tokens)
    printed = capsys.readouterr().out
    assert printed.count("Parameter groups") == 1
    assert printed.count("Exact zeros") == 1
    assert f"{trainer.measure_sparsity().sparsity:.2%}" in printed


def test_the_picture_is_one(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    from matplotlib.image import imread

    _run(make_args(), tokens)
    picture = imread(tmp_path / "out" / "sparsity.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 800
    assert picture[..., :3].std() > 0.05


@pytest.mark.parametrize(("steps", "layers"), [(1, 1), (2, 3), (30, 90), (1, 0)])
def test_pictures_of_any_size(steps: int, layers: int, tmp_path: Path) -> None:
    history = [
        {"step": 10 * step, "sparsity": 0.5, "model_sparsity": 0.4, "layers": {f"l{row}": 0.5 for row in range(layers)}}
        for step in range(1, steps + 1)
    ]
    plot_sparsity(history, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="history is empty"):
        plot_sparsity([], tmp_path / "none.png")


def test_a_run_without_a_log_event_has_its_end(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    trainer = _run(make_args(logging_strategy="no", max_steps=2), tokens)
    (line,) = read_history(tmp_path / "out")
    assert (line["step"], line["sparsity"]) == (2, trainer.measure_sparsity().sparsity)
    assert (tmp_path / "out" / "sparsity.json").is_file()
    assert (tmp_path / "out" / "sparsity.png").is_file()


def test_a_hopeless_lambda_is_told_beforehand(
    make_args: MakeArgs, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        _run(make_args(learning_rate=5e-5, p_norm=0.8, lambda_p=0.01), tokens)
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_pdecay")]
    assert "can zero at most 0.1% of these weights" in message
    assert message.index("Give a target_sparsity") < message.index("lambda_p of about")
    # The λ_p that it names would zero half of the weights if no gradient held them up.
    named = float(message.split("lambda_p of about ")[1].split(",")[0])
    model = tiny_gpt2()
    weights = torch.cat(
        [param.flatten() for name, param in model.named_parameters() if ".c_" in name and param.ndim == 2]
    )
    lr_sum = sum(5e-5 * (8 - step) / 8 for step in range(8))
    below = (weights.abs() < (1.2 * named * lr_sum) ** (1 / 1.2)).double().mean().item()
    assert below == pytest.approx(0.5, abs=0.03)


def test_a_hopeful_lambda_is_not(make_args: MakeArgs, tokens: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        _run(make_args(lambda_p=0.5), tokens)
    assert not [record for record in caplog.records if record.name.startswith("hf_pdecay")]


def test_p_of_two_and_more_gives_no_zeros() -> None:
    param = nn.Parameter(torch.randn(10))
    group = {"params": [param], "p_norm": 2.0, "lambda_p": 0.1, "rule": "default"}
    (sentence,) = forecast([DecayingGroup(0, group, group["params"])], [1.0])
    assert "no zeros" in sentence
    assert forecast([DecayingGroup(0, {**group, "lambda_p": 0.0}, group["params"])], [1.0]) == []


def test_keep_zeros_warns_of_what_can_never_learn(
    make_args: MakeArgs, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_gpt2()
    nn.init.zeros_(model.transformer.h[0].mlp.c_proj.weight)
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        PDecayTrainer(model=model, args=make_args(keep_zeros=True, lambda_p=0.5), train_dataset=tokens).train()
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("hf_pdecay")]
    assert [message for message in messages if "transformer.h.0.mlp.c_proj.weight is wholly zero" in message]


def test_a_run_that_learns_nothing_says_so_at_once(
    make_args: MakeArgs, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.nan
    PDecayTrainer(model=model, args=make_args(max_steps=8, logging_steps=2), train_dataset=tokens).train()
    said = [record.message for record in caplog.records if "were skipped" in record.message]
    assert said[0].startswith("All 2 steps so far were skipped") and said[1].startswith("All 8 steps were skipped")
    assert len(said) == 2


def test_wholly_zero_tensors_are_named(
    make_args: MakeArgs, tokens: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _run(make_args(max_steps=8, lp_rules={"h.0.attn": {"lambda_p": 1e4}}), tokens)
    said = [record.message for record in caplog.records if "wholly zero" in record.message]
    names = "transformer.h.0.attn.c_attn.weight, transformer.h.0.attn.c_proj.weight. If"
    assert len(said) == 1 and said[0].startswith(f"2 of 8 decayed tensors are wholly zero: {names}")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "2 of the 8 decayed tensors are wholly zero." in card


def test_bad_logging_name() -> None:
    with pytest.raises(ValueError, match="sparsity_logging='all'; it must be one of overall, layer"):
        SparsityCallback("all")


def test_history_lines_are_json(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    _run(make_args(), tokens)
    for line in (tmp_path / "out" / "sparsity.jsonl").read_text().splitlines():
        assert {"step", "epoch", "sparsity", "model_sparsity", "near_zeros", "skipped_steps", "layers"} == set(
            json.loads(line)
        )
